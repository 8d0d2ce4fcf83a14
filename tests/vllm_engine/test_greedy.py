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
        assert (cached > 0) == (model.config.model_type != "qwen" or not model.config.use_dynamic_ntk)
        # New prompts that share a beginning with old ones.
        longer = [ids + tail for ids, tail in zip(prompts, make_prompts(seed=2), strict=True)][:4]
        assert continued(llm, longer)[0] == greedy(model, longer)


def test_ntk_and_the_ratios_matter(written):
    """The prompts above would tell a missing factor or ratio."""
    prompts = make_prompts()
    for golden, field, value in (("qwen", "use_dynamic_ntk", False), ("qwen", "use_logn_attn", False)):
        folder, model = written(golden)
        without = AutoModelForCausalLM.from_pretrained(folder, **{field: value})
        differs = [a != b for a, b in zip(greedy(model, prompts), greedy(without, prompts), strict=True)]
        assert any(differs)
    for golden in ("chatglm2_6b_32k", "chatglm3_6b_32k"):
        folder, model = written(golden)
        without = AutoModelForCausalLM.from_pretrained(folder, rope_ratio=1)
        assert greedy(model, prompts) != greedy(without, prompts)


def test_windows(tmp_path):
    folder = write_checkpoint("qwen", tmp_path, window_sizes=[48, None])
    model, prompts = AutoModelForCausalLM.from_pretrained(folder), make_prompts()
    with engine(folder, max_num_batched_tokens=64) as llm:
        assert continued(llm, prompts)[0] == greedy(model, prompts)


@pytest.mark.parametrize("bits", (8, 4))
def test_integer_weights_become_floats(bits, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(write_checkpoint("chatglm2_6b", tmp_path / "float"))
    model.quantize(bits).save_pretrained(tmp_path / "quantized", max_shard_size="100KB")
    assert len(list((tmp_path / "quantized").glob("*.safetensors"))) > 2  # weights and scales lie apart
    prompts = make_prompts()
    with engine(tmp_path / "quantized") as llm:
        assert continued(llm, prompts)[0] == greedy(model, prompts)


@pytest.mark.parametrize("golden, targets", [
    ("baichuan2_7b", ["W_pack", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    ("qwen", ["c_attn", "attn.c_proj", "w1", "w2", "mlp.c_proj"]),
    ("chatglm3_6b", ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
])  # fmt: skip
def test_lora(golden, targets, written, tmp_path):
    """An adapter that PEFT trained on the original's module names, beside requests without one."""
    from peft import LoraConfig, get_peft_model
    from vllm.lora.request import LoRARequest

    folder, model = written(golden)
    prompts = make_prompts()
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(folder)
    adapted = get_peft_model(base, LoraConfig(r=8, target_modules=targets, init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path)
    expected = greedy(model, prompts), greedy(adapted, prompts)
    assert all(plain != changed for plain, changed in zip(*expected, strict=True))
    # On a CPU vLLM 0.32 gives requests without an adapter, beside others, the one in the last slot: that is left empty here.
    with engine(folder, enable_lora=True, max_lora_rank=8, max_loras=2) as llm:
        adapter = LoRARequest("adapter", 1, str(tmp_path))
        mixed = [None, adapter] * len(prompts)
        found, _ = continued(llm, [ids for ids in prompts for _ in range(2)], lora_request=mixed)
    assert (found[0::2], found[1::2]) == expected


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
@pytest.mark.parametrize("golden", ("baichuan2_13b", "qwen", "chatglm2_6b_32k"))
def test_half_precision(golden, dtype, written):
    """The likeliest next tokens of long prompts, where rounding leaves a clear one."""
    folder, model = written(golden)
    prompts = make_prompts(lengths=(50, 200, 300))
    with engine(folder, dtype=dtype) as llm:
        found, _ = continued(llm, prompts)
    for ids, tokens in zip(prompts, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert logits.max() - logits[tokens[0]] < 0.3
