"""Every way of transformers to quantize, on every architecture: which layers, the forward pass, and what a saved folder gives."""

import pytest
import torch
import transformers
from torch import nn

from hf_cnllm import ChatGLMQuantizationConfig
from hf_cnllm.cli.quantize import linear_layers
from hf_cnllm.families import FAMILIES, Shape, family_with
from hf_cnllm.loss.norm_head import NormHead
from quantization_table import METHODS, is_installed

SHAPE = Shape(hidden_size=128, layers=1, heads=4, ffn_size=128, vocab_size=96)
ARCHITECTURES = [name for family in FAMILIES for name in family.architectures]
WITH_CHATGLM_LAYERS = ("chatglm", "chatglm2", "glm", "glm130b")
# 8 bits keep more than 4; random weights of one layer.
LARGEST_ERROR = {"8": 0.05, "4": 0.3}
CASES = [
    pytest.param(
        architecture,
        name,
        marks=[
            pytest.mark.skipif(not is_installed(method.package), reason=f"needs {method.package}"),
            *([pytest.mark.slow] if name == "quanto-int4" else []),  # it compiles its kernels first
        ],
        id=f"{architecture}-{name}",
    )
    for architecture in ARCHITECTURES
    for name, method in METHODS.items()
    if not method.only or architecture in WITH_CHATGLM_LAYERS
]


def checkpoint(architecture, folder):
    """Saves a model with a plain, untied head, and returns the class to load it with, and the model."""
    family = family_with(architecture)
    config = family.make_config(architecture, SHAPE, tie_word_embeddings=False)
    torch.manual_seed(0)
    auto_class = getattr(transformers, family.generates_with)
    model = auto_class.from_config(config).eval()
    model.save_pretrained(folder)
    return auto_class, model


def make_ids(model, architecture):
    ids = torch.randint(3, 80, (2, 12), generator=torch.Generator().manual_seed(0))
    for offset, name in enumerate(family_with(architecture).architectures[architecture].prompt_end):
        ids[:, 6 + offset] = getattr(model.config, name)
    return ids


@pytest.mark.parametrize("architecture, method", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_method(architecture, method, dtype, tmp_path):
    auto_class, floats = checkpoint(architecture, tmp_path / "floats")
    ids = make_ids(floats, architecture)
    model = auto_class.from_pretrained(
        tmp_path / "floats", quantization_config=METHODS[method].make_config(), dtype=dtype, device_map="cpu"
    )
    kept = {name for name, is_float in linear_layers(model).items() if is_float}
    assert linear_layers(model).keys() == linear_layers(floats).keys()
    assert [model.get_submodule(name) for name in kept] == [model.get_output_embeddings()]
    assert type(model.get_output_embeddings()) is type(floats.get_output_embeddings())

    if method.startswith("quanto"):
        with pytest.raises(ValueError, match="not serializable"):
            model.save_pretrained(tmp_path / "quantized")
    else:
        # Before any forward pass: on some CPUs bitsandbytes then packs 4-bit weights in a way that it cannot undo.
        model.save_pretrained(tmp_path / "quantized")
        logits = model(ids).logits
        again = auto_class.from_pretrained(tmp_path / "quantized", device_map="cpu")
        assert linear_layers(again) == linear_layers(model)
        assert torch.equal(again(ids).logits, logits)

    expected = floats(ids).logits
    error = (model(ids).logits.float() - expected).norm() / expected.norm()
    assert 0 < error < LARGEST_ERROR["4" if "4" in method else "8"]


@pytest.mark.parametrize("method", [name for name in METHODS if name.startswith(("torchao-int8", "quanto-int8"))])
def test_norm_head_is_never_quantized(method, tmp_path):
    if not is_installed(METHODS[method].package):
        pytest.skip(f"needs {METHODS[method].package}")
    auto_class, _ = checkpoint("baichuan-alibi", tmp_path)
    # A list of one's own replaces that of transformers, with the head in it.
    config, down_proj = METHODS[method].make_config(), "model.layers.0.mlp.down_proj"
    config.modules_to_not_convert = [down_proj]
    with pytest.raises(ValueError, match="NormHead, this model's `lm_head`, cannot be quantized"):
        auto_class.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    config.modules_to_not_convert = [down_proj, "lm_head"]
    model = auto_class.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    kept = {name for name, is_float in linear_layers(model).items() if is_float}
    assert kept == {down_proj, "lm_head"} and isinstance(model.lm_head, NormHead)


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in WITH_CHATGLM_LAYERS])
def test_chatglms_own_method_is_for_chatglms_layers(architecture, tmp_path):
    auto_class, _ = checkpoint(architecture, tmp_path)
    with pytest.raises(ValueError, match="has no layers of ChatGLM's names"):
        auto_class.from_pretrained(tmp_path, quantization_config=ChatGLMQuantizationConfig(bits=8))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_are_of_the_class_that_replacements_look_for(architecture, tmp_path):
    """bitsandbytes and others replace `type(module) is nn.Linear`, no subclass."""
    _, model = checkpoint(architecture, tmp_path)
    classes = {type(module) for module in model.base_model.modules() if isinstance(module, nn.Linear)}
    assert classes == {nn.Linear}
