"""Exports are what vLLM's own Llama, Qwen2 and GLM serve, with the greedy tokens of the original."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from exportable import KINDS, write_checkpoint
from hf_cnllm.conversion.adapters import export_adapter
from hf_cnllm.conversion.checkpoint import export_checkpoint
from vllm_engine.checkpoints import HEAD_DIM, greedy, make_prompts

pytest.importorskip("vllm.version")  # not `vllm` alone: pytest's path could lead to a folder of that name

from vllm_engine.engine import continued, engine


@pytest.mark.parametrize(
    "name", ["baichuan", "baichuan2", "qwen", "chatglm2", "chatglm2-32k", "chatglm3", "chatglm2-llama"]
)
def test_greedy(name, tmp_path):
    kind = KINDS[name]._replace(dtype=torch.float32)
    write_checkpoint(kind, tmp_path / "source", std=0.15, head_dim=HEAD_DIM)
    export_checkpoint(tmp_path / "source", tmp_path / "out", kind.target)
    prompts = make_prompts()
    expected = greedy(AutoModelForCausalLM.from_pretrained(tmp_path / "source").eval(), prompts)
    assert len({tuple(ids) for ids in expected}) == len(prompts)
    with engine(tmp_path / "out") as llm:
        assert "hf_cnllm" not in llm.apply_model(lambda model: type(model).__module__)[0]
        assert continued(llm, prompts)[0] == expected


def test_an_adapter_that_was_exported_with_its_model(tmp_path):
    from peft import LoraConfig, get_peft_model
    from vllm.lora.request import LoRARequest

    kind = KINDS["qwen"]
    write_checkpoint(kind, tmp_path / "source", std=0.15, head_dim=HEAD_DIM)
    export_checkpoint(tmp_path / "source", tmp_path / "out", kind.target)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    adapted = get_peft_model(base, LoraConfig(r=8, init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    export_adapter(tmp_path / "adapter", base.config, kind.target, tmp_path / "out", tmp_path / "exported")
    prompts = make_prompts()
    with engine(tmp_path / "out", enable_lora=True, max_lora_rank=8) as llm:
        adapter = LoRARequest("adapter", 1, str(tmp_path / "exported"))
        assert continued(llm, prompts, lora_request=adapter)[0] == greedy(adapted, prompts)
        assert continued(llm, prompts)[0] != greedy(adapted, prompts)
