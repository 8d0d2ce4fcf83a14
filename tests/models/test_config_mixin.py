"""What all configurations refuse in a config.json: numbers that are none, kernels by name, pointers to code."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from goldens import GOLDENS
from hf_cnllm import FAMILIES

EXAMPLES = ("baichuan_7b", "baichuan2_13b", "chatglm_6b", "chatglm2_6b", "glm", "glm130b", "qwen")
NO_NUMBERS = (float("nan"), float("inf"), -float("inf"))


def config_json(name: str) -> dict:
    return json.loads((GOLDENS / name / "config.json").read_text())


def folder_with(tmp_path, config: dict):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


FLOATS = [
    (name, field)
    for name in EXAMPLES
    for field, value in AutoConfig.from_pretrained(GOLDENS / name).to_dict().items()
    if isinstance(value, float)
]


@pytest.mark.parametrize(("name", "field"), FLOATS)
@pytest.mark.parametrize("value", NO_NUMBERS)
def test_every_number_is_finite(name, field, value, tmp_path):
    with pytest.raises(StrictDataclassError, match=f"`{field}`"):
        AutoConfig.from_pretrained(folder_with(tmp_path, config_json(name) | {field: value}))


@given(st.sampled_from(EXAMPLES), st.sampled_from(NO_NUMBERS), st.lists(st.sampled_from(["a", 0]), max_size=4))
def test_numbers_are_looked_for_at_any_depth_and_under_any_key(name, value, path):
    for step in path:
        value = {step: value} if isinstance(step, str) else [1.5, value]
    config = AutoConfig.from_pretrained(GOLDENS / name)
    with pytest.raises(StrictDataclassError, match=r"`note.*must be a finite number"):
        type(config)(**(config_json(name) | {"note": value}))


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_epsilon_is_not_negative(name, tmp_path):
    (field,) = {
        key for key in AutoConfig.from_pretrained(GOLDENS / name).to_dict() if key.endswith(("eps", "epsilon"))
    }
    with pytest.raises(StrictDataclassError, match=f"`{field}` must not be negative, got -1e-05"):
        AutoConfig.from_pretrained(folder_with(tmp_path, config_json(name) | {field: -1e-5}))


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize(
    "kernel", ["planted/kernel", "planted/kernel@v1:name", "./planted", {"": "planted/kernel"}, 3]
)
def test_a_checkpoint_names_no_kernel(name, key, kernel, tmp_path):
    folder = folder_with(tmp_path, config_json(name) | {key: kernel})
    with pytest.raises(ValueError, match=f"`{key}`.*a checkpoint names no code"):
        AutoConfig.from_pretrained(folder)
    config_class = type(AutoConfig.from_pretrained(GOLDENS / name))
    with pytest.raises(ValueError, match="a checkpoint names no code"):
        config_class.from_json_file(folder / "config.json")


@pytest.mark.parametrize("name", EXAMPLES)
def test_callers_and_checkpoints_choose_among_the_kernels_that_are_there(name, tmp_path):
    folder = folder_with(tmp_path, config_json(name) | {"attn_implementation": "eager"})
    assert AutoConfig.from_pretrained(folder)._attn_implementation == "eager"
    assert AutoConfig.from_pretrained(folder, attn_implementation="sdpa")._attn_implementation == "sdpa"
    assert AutoConfig.from_pretrained(folder, attn_implementation="my/kernel")._attn_implementation == "my/kernel"


@pytest.mark.parametrize("name", EXAMPLES)
def test_pointers_to_code_are_not_kept(name, tmp_path):
    pointers = {
        "auto_map": {"AutoModelForMultipleChoice": "code.Model"},
        "custom_pipelines": {"x": {"impl": "code.X"}},
    }
    folder = folder_with(tmp_path, config_json(name) | pointers)
    config_class = type(AutoConfig.from_pretrained(folder))
    for config in (
        AutoConfig.from_pretrained(folder, trust_remote_code=True),
        config_class.from_pretrained(folder),
        config_class.from_json_file(folder / "config.json"),
        config_class(**config_json(name) | pointers),
    ):
        assert not any(hasattr(config, key) or key in config.to_dict() for key in pointers)


def test_every_configuration_is_covered():
    found = {type(AutoConfig.from_pretrained(GOLDENS / name)) for name in EXAMPLES}
    assert found >= {config for family in FAMILIES for config in family.variants or (family.config,)}
