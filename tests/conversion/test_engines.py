"""Exported folders in what serves and compiles any Llama, Qwen2 or GLM, without this package."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from openai_server import ALONE, running_server

pytestmark = pytest.mark.slow
CHATS = ("baichuan2", "qwen", "chatglm3")


@pytest.fixture(scope="module")
def server():
    pytest.importorskip("fastapi")
    with running_server(program=ALONE) as address:
        yield address


@pytest.mark.parametrize("name", CHATS)
def test_transformers_serve(name, checkpoint, exported, server):
    """The answers of the original's `generate`."""
    openai = pytest.importorskip("openai")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(name))
    messages = [{"role": "user", "content": "你好"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint(name)).eval()
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    completion = openai.OpenAI(base_url=server, api_key="none").chat.completions.create(
        model=str(exported(name)), messages=messages, max_tokens=12, temperature=0
    )
    assert completion.usage.prompt_tokens == inputs["input_ids"].shape[1]
    length = len(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    exported_tokenizer = AutoTokenizer.from_pretrained(exported(name))
    expected = exported_tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert completion.choices[0].message.content == expected and length


def with_onnx_runtime(file, inputs):
    runtime = pytest.importorskip("onnxruntime", reason="the lane `integrations` installs it")
    return runtime.InferenceSession(file).run(None, inputs)[0]


def with_openvino(file, inputs):
    openvino = pytest.importorskip("openvino", reason="the lane `integrations` installs it")
    exactly = {"INFERENCE_PRECISION_HINT": "f32"}
    return openvino.compile_model(file, "CPU", exactly)(inputs)[0]


@pytest.mark.parametrize("engine", [with_onnx_runtime, with_openvino])
@pytest.mark.parametrize("name", CHATS)
def test_onnx(name, engine, exported, checkpoint, tmp_path):
    """docs/export.md's lines, and what reads ONNX, at sizes that the example did not have."""
    pytest.importorskip("onnxscript", reason="the lane `integrations` installs it")
    model = AutoModelForCausalLM.from_pretrained(exported(name)).eval().requires_grad_(False)
    ids = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    torch.onnx.export(
        model,
        (),
        tmp_path / "model.onnx",
        kwargs={"input_ids": ids[:, :5], "attention_mask": torch.ones_like(ids[:, :5]), "use_cache": False},
        dynamic_shapes={"input_ids": free, "attention_mask": free, "use_cache": None},
        dynamo=True,
    )
    inputs = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
    logits = engine(tmp_path / "model.onnx", inputs)
    expected = AutoModelForCausalLM.from_pretrained(checkpoint(name)).eval()(ids).logits
    assert (torch.from_numpy(logits) - expected).abs().max() < 1e-4
