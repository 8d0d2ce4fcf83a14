"""Two processes: tensor and pipeline parallel."""

import pytest
from transformers import AutoModelForCausalLM

from vllm_engine.checkpoints import greedy, make_prompts, write_checkpoint

pytest.importorskip("vllm.version")

from vllm_engine.engine import continued, engine


@pytest.mark.parametrize("golden", ("baichuan2_13b", "qwen", "chatglm2_6b_32k"))
@pytest.mark.parametrize(
    "way",
    (
        {"tensor_parallel_size": 2},
        # On a CPU a pipeline works with compiled models only; here Dynamo traces them and compiles nothing.
        {"pipeline_parallel_size": 2, "enforce_eager": False, "compilation_config": {"mode": 1, "backend": "eager"}},
    ),
    ids=("tensor", "pipeline"),
)
def test_two_processes(golden, way, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    folder = write_checkpoint(golden, tmp_path)
    prompts = make_prompts()
    with engine(folder, max_num_batched_tokens=64, **way) as llm:
        assert continued(llm, prompts)[0] == greedy(AutoModelForCausalLM.from_pretrained(folder), prompts)
