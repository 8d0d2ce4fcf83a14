"""vLLM's greedy tokens are those of transformers' `generate`, in every way that it computes them."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from vllm_engine.checkpoints import NEW_TOKENS, SUBJECTS, greedy, make_prompts, write_checkpoint

pytest.importorskip("vllm.version")  # not `vllm` alone: pytest's path could lead to a folder of that name

from vllm_engine.engine import continued, engine


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Golden -> its checkpoint and model, made when first asked for."""
    made = {}

    def get(golden: str):
        if golden not in made:
            folder = write_checkpoint(golden, tmp_path_factory.mktemp(golden))
            made[golden] = folder, AutoModelForCausalLM.from_pretrained(folder).eval()
        return made[golden]

    return get


@pytest.mark.parametrize("golden", SUBJECTS)
def test_whole_chunked_and_cached(golden, written):
    folder, model = written(golden)
    prompts = make_prompts()
    expected = greedy(model, prompts)
    assert len({tuple(ids) for ids in expected}) == len(prompts)
    assert sum(len(set(ids)) for ids in expected) > len(prompts) * NEW_TOKENS / 4  # attention has a say
    with engine(folder, max_num_batched_tokens=2048) as llm:
        assert continued(llm, prompts) == (expected, 0)
    with engine(folder, max_num_batched_tokens=64, enable_chunked_prefill=True, enable_prefix_caching=True) as llm:
        assert continued(llm, prompts)[0] == expected
        again, cached = continued(llm, prompts)
        assert again == expected
        assert (cached > 0) == (not model.config.model_type == "qwen" or not model.config.use_dynamic_ntk)
        # New prompts that share a beginning with old ones.
        longer = [ids + tail for ids, tail in zip(prompts, make_prompts(seed=2), strict=True)][:4]
        assert continued(llm, longer)[0] == greedy(model, longer)
