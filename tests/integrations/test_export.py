"""`torch.export` and ONNX: one graph for every batch and length, whose logits are the model's own."""

import pytest
import torch
import transformers
from torch.export import Dim

from hf_cnllm.families import FAMILIES, Shape, family_with

SHAPE = Shape(hidden_size=32, layers=1, heads=4, ffn_size=64, vocab_size=96)
# Trained lengths that the inputs below fall short of and exceed: ChatGLM2 has something to say there, Qwen to compute.
OVERRIDES = {"qwen": {"seq_length": 16}, "chatglm2": {"seq_length": 16}}
ARCHITECTURES = [name for family in FAMILIES for name in family.architectures]
EXAMPLE = (2, 10)
OTHER_SIZES = [(1, 5), (3, 33), (2, 300)]  # 300: more than what gets a dense mask in eager mode
FREE = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
BOTH_FREE = {"input_ids": FREE, "attention_mask": FREE}

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


def make_model(architecture, **overrides):
    family = family_with(architecture)
    config = family.make_config(architecture, SHAPE, **OVERRIDES.get(architecture, {}), **overrides)
    model = getattr(transformers, family.generates_with).from_config(config).eval().requires_grad_(False)
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.normal_(std=weight.shape[1] ** -0.5)  # so that every position counts
    return model


def make_inputs(model, architecture, batch, length, padded=True):
    """A batch of texts, the first of which has padding on the left where there is another one."""
    ids = torch.randint(3, 80, (batch, length), generator=torch.Generator().manual_seed(length))
    for offset, name in enumerate(family_with(architecture).architectures[architecture].prompt_end):
        ids[:, length // 2 + offset] = getattr(model.config, name)
    mask = torch.ones_like(ids)
    mask[: padded and batch - 1, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def check(model, architecture, run):
    for batch, length in (EXAMPLE, *OTHER_SIZES):
        inputs = make_inputs(model, architecture, batch, length)
        expected, tokens = model(**inputs, use_cache=False).logits, inputs["attention_mask"].bool()
        torch.testing.assert_close(run(inputs)[tokens], expected[tokens], atol=1e-4, rtol=1e-4)


@architectures
def test_one_graph_for_all_sizes(architecture):
    model = make_model(architecture)
    inputs = make_inputs(model, architecture, *EXAMPLE)
    program = torch.export.export(
        model, (), inputs | {"use_cache": False}, dynamic_shapes=BOTH_FREE | {"use_cache": None}
    )
    graph = program.module()
    check(model, architecture, lambda inputs: graph(**inputs, use_cache=False).logits)


@pytest.mark.parametrize("architecture", ["qwen", "chatglm2", "baichuan-alibi"])
def test_packed_rows_in_a_graph_of_padded_ones(architecture):
    model = make_model(architecture)
    inputs = make_inputs(model, architecture, *EXAMPLE)
    program = torch.export.export(
        model, (), inputs | {"use_cache": False}, dynamic_shapes=BOTH_FREE | {"use_cache": None}
    )
    packed = make_inputs(model, architecture, 2, 48)
    packed["attention_mask"] = torch.tensor([[1] * 30 + [2] * 18, [1] * 8 + [2] * 20 + [3] * 20])
    expected = model(**packed, use_cache=False).logits
    torch.testing.assert_close(program.module()(**packed, use_cache=False).logits, expected, atol=1e-4, rtol=1e-4)


@architectures
@pytest.mark.slow
def test_onnx(architecture, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = make_model(architecture)
    inputs = make_inputs(model, architecture, *EXAMPLE)
    file = str(tmp_path / "model.onnx")
    torch.onnx.export(
        model,
        (),
        file,
        kwargs=inputs | {"use_cache": False},
        dynamic_shapes=BOTH_FREE | {"use_cache": None},
        dynamo=True,
    )
    session = onnxruntime.InferenceSession(file)
    names = [node.name for node in session.get_inputs()]

    def run(inputs):
        return torch.from_numpy(session.run(None, {name: inputs[name].numpy() for name in names})[0])

    check(model, architecture, run)


def static_cache_module(architecture):
    executorch = pytest.importorskip("transformers.integrations.executorch")
    model = make_model(architecture)
    model.generation_config.cache_implementation = "static"
    return model, executorch.TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=16)


# GLM as it is without an attention mask: causal.
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in ("chatglm", "glm130b")])
def test_prompts_and_steps_with_a_static_cache(architecture):
    """transformers' own door, whose graphs ExecuTorch runs: the cache is a buffer, its filled length an input."""
    model, module = static_cache_module(architecture)
    ids, places = make_inputs(model, architecture, 1, 12)["input_ids"], torch.arange(12)
    free_length = {"input_ids": {1: Dim.DYNAMIC}, "cache_position": {0: Dim.DYNAMIC}}
    graph = module.export(ids, cache_position=places, dynamic_shapes=free_length, strict=False).module()
    step = module.export(ids[:, :1], cache_position=places[:1], strict=False).module()
    expected = model(ids, use_cache=False).logits
    for part in (slice(0, 5), slice(5, 12)):
        logits = graph(input_ids=ids[:, part], cache_position=places[part])
        torch.testing.assert_close(logits, expected[:, part], atol=1e-4, rtol=1e-4)
    for place in range(12):
        logits = step(input_ids=ids[:, place : place + 1], cache_position=places[place : place + 1])
        torch.testing.assert_close(logits, expected[:, place : place + 1], atol=1e-4, rtol=1e-4)


def test_chatglm_with_a_cache_needs_positions():
    model, module = static_cache_module("chatglm")
    ids = make_inputs(model, "chatglm", 1, 12)["input_ids"]
    with pytest.raises(ValueError, match="pass 2-row `position_ids`"):
        module.export(ids, strict=False)
