"""transformers' insides: what is relied on holds here, and a release that changes it ends in an error that names it."""

import ast
import functools
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
)

import hf_cnllm
from goldens import GOLDENS
from hf_cnllm import _compat
from hf_cnllm._compat import CACHE, UnsupportedTransformersError, check_transformers, modeling
from hf_cnllm._contract import broken_promises

SOURCES = sorted(Path(hf_cnllm.__file__).parent.rglob("*.py"))
FUTURE = Version("5.99.0")

GLM_TOKENS = {"mask_token_id": 8, "sop_token_id": 9, "eop_token_id": 10}
MODELS = {
    "baichuan_rope": (AutoModelForCausalLM, "baichuan2_7b", {}),
    "baichuan_alibi": (AutoModelForCausalLM, "baichuan2_13b", {}),
    "qwen": (AutoModelForCausalLM, "qwen", {}),
    "chatglm": (AutoModel, "chatglm_6b_3layer", {}),
    "chatglm2": (AutoModel, "chatglm2_6b", {}),
    "glm": (AutoModelForSeq2SeqLM, "glm", GLM_TOKENS),
    "glm130b": (AutoModelForSeq2SeqLM, "glm130b", {"gmask_token_id": 8, "bos_token_id": 9}),
}


@functools.cache
def load(family: str):
    auto_class, name, options = MODELS[family]
    return auto_class.from_pretrained(GOLDENS / name, **options).eval()


def prompt(family: str) -> torch.Tensor:
    config = load(family).config
    control = {
        "chatglm": lambda: [config.gmask_token_id, config.bos_token_id],
        "glm": lambda: [config.mask_token_id, config.sop_token_id],
    }.get(family, lambda: [8, 9])
    return torch.tensor([[5, 6, 7, *control()]])


def test_all_promises_hold_on_this_release():
    assert broken_promises() == []


def test_the_check_leaves_no_trace(recwarn):
    state, verbosity = torch.random.get_rng_state(), _compat.logging.get_verbosity()
    broken_promises()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert _compat.logging.get_verbosity() == verbosity
    assert not recwarn.list


@pytest.fixture
def future(monkeypatch):
    """As if the installed transformers were a release that nobody has tested."""
    for family in MODELS:
        load(family)
    monkeypatch.setattr(_compat, "INSTALLED", FUTURE)
    check_transformers.cache_clear()
    yield
    check_transformers.cache_clear()


def test_a_newer_release_that_keeps_its_promises_is_warned_of_once(future):
    with pytest.warns(UserWarning, match=rf"{FUTURE} is newer than {_compat.NEWEST_TESTED}") as warned:
        type(load("qwen"))(load("qwen").config)
        type(load("glm"))(load("glm").config)
    assert len([warning for warning in warned if "hf_cnllm" in str(warning.message)]) == 1


def rename_the_cache_of_generate(monkeypatch):
    """What 5.24 did: `generate` hands the cache over under another name."""
    original = GenerationMixin.prepare_inputs_for_generation

    def renamed(self, *args, **kwargs):
        inputs = original(self, *args, **kwargs)
        return {"kv" if name == CACHE else name: value for name, value in inputs.items()}

    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", renamed)


def rename_the_cache_of_the_masks(monkeypatch):
    original = GenerationMixin.prepare_inputs_for_generation
    source = inspect.unwrap(original)
    code = source.__code__.replace(
        co_consts=tuple(
            tuple("kv" if name == CACHE else name for name in constant)
            if isinstance(constant, tuple) and "inputs_embeds" in constant and CACHE in constant
            else constant
            for constant in source.__code__.co_consts
        )
    )
    monkeypatch.setattr(source, "__code__", code)


def drop_a_hook(monkeypatch):
    monkeypatch.delattr(GenerationMixin, "_expand_inputs_for_generation")


def drop_a_call(monkeypatch):
    """`generate` makes its cache without asking the hook."""
    original = GenerationMixin.generate

    def generate(self, *args, **kwargs):
        hook = type(self)._prepare_cache_for_generation
        type(self)._prepare_cache_for_generation = GenerationMixin._prepare_cache_for_generation
        try:
            return original(self, *args, **kwargs)
        finally:
            type(self)._prepare_cache_for_generation = hook

    monkeypatch.setattr(GenerationMixin, "generate", generate)


def change_a_signature(monkeypatch):
    def _prefill(self, generation_config, input_ids, model_kwargs):
        raise NotImplementedError

    monkeypatch.setattr(GenerationMixin, "_prefill", _prefill)


def change_the_masks(monkeypatch):
    monkeypatch.setattr(modeling, "create_causal_mask", lambda config, inputs, mask, cache, **kwargs: mask)


def forget_the_configuration(monkeypatch):
    """`AutoTokenizer` decides without the configuration beside the tokenizer, which is where ours looks at the files."""
    original = AutoTokenizer.from_pretrained.__func__

    def from_pretrained(cls, name, *args, config=None, **kwargs):
        return original(cls, name, *args, config=None if config is None else PreTrainedConfig(), **kwargs)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", classmethod(from_pretrained))


CHANGES = {
    rename_the_cache_of_generate: "as `kv`",
    rename_the_cache_of_the_masks: "kv|cache|past_key_values",
    drop_a_hook: "_expand_inputs_for_generation is gone",
    drop_a_call: "no longer calls _prepare_cache_for_generation",
    change_a_signature: "_prefill takes",
    change_the_masks: "mask",
    forget_the_configuration: "no longer asks the configuration for its model_name",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("family", MODELS)
def test_a_release_that_breaks_a_promise_is_refused_by_name(change, family, future, monkeypatch):
    config, model_class = load(family).config, type(load(family))
    change(monkeypatch)
    with pytest.raises(UnsupportedTransformersError, match=CHANGES[change]) as caught:
        model_class(config)
    for told in (str(FUTURE), str(_compat.OLDEST), str(_compat.NEWEST_TESTED), "pip install"):
        assert told in str(caught.value)


@pytest.mark.parametrize("family", MODELS)
def test_a_cache_under_another_name_is_refused_whatever_the_version(family, monkeypatch):
    model, ids = load(family), prompt(family)
    with pytest.raises(TypeError, match=r"got a DynamicCache as `kv`.*pip install"):
        model(ids, kv=DynamicCache())
    with pytest.raises(TypeError, match="as `kv`"):
        model.base_model(ids, kv=DynamicCache())
    rename_the_cache_of_generate(monkeypatch)
    with pytest.raises(TypeError, match="as `kv`"):
        model.generate(ids, max_new_tokens=2)


@pytest.mark.parametrize("family", MODELS)
@torch.no_grad()
def test_both_names_of_the_cache_are_one_on_every_release(family, recwarn):
    model, ids = load(family), prompt(family)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for name in _compat.CACHE_NAMES:
        given = DynamicCache(config=model.config)
        output = model(ids, use_cache=True, **{name: given})
        assert output.cache is given
        assert given.get_seq_length() == ids.shape[1]
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        assert (
            model.generate(ids, **{name: DynamicCache(config=model.config)}, **options).tolist() == expected.tolist()
        )
    # As on transformers' own models: the name that the release has left behind is said to be.
    told = {str(warning.message) for warning in recwarn.list if "cache" in str(warning.message)}
    assert told == (
        set() if _compat.CACHE == _compat.OLD_CACHE_NAME else {"`past_key_values` is deprecated: use `cache` instead."}
    )
    with pytest.raises(TypeError, match="not both"):
        model(ids, cache=DynamicCache(), past_key_values=DynamicCache())
    with pytest.raises(TypeError, match="not both"):
        model.generate(ids, cache=DynamicCache(), past_key_values=DynamicCache())
    nothing = dict.fromkeys(_compat.CACHE_NAMES)
    assert model.generate(ids, **nothing, **options).tolist() == expected.tolist()
    for name, other in zip(_compat.CACHE_NAMES, reversed(_compat.CACHE_NAMES), strict=True):
        given = DynamicCache(config=model.config)
        model.generate(ids, **{name: given, other: None}, **options)
        assert given.get_seq_length() > 0


PUBLIC_NAMES = set(dir(transformers))  # which transformers works out anew at every call


def transformers_imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.ImportFrom)
            and node.level == 0
            and (node.module or "").split(".")[0] == "transformers"
        ):
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.startswith("transformers."))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_only_compat_touches_the_insides(path):
    if path.parent.name == "_compat":
        return
    private = [
        (module, name)
        for module, name in transformers_imports(path)
        if module != "transformers" or name.startswith("_") or name not in PUBLIC_NAMES
    ]
    assert not private


def test_the_old_name_of_the_cache_stands_in_three_files_at_most():
    assert len([path for path in SOURCES if "past_key_values" in path.read_text(encoding="utf-8")]) <= 3


def test_a_transformers_that_is_too_old_is_refused_at_import(tmp_path):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("__version__ = '5.15.0'")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-c", "import hf_cnllm"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path})
    assert run.returncode == 1
    told = run.stderr.strip().splitlines()[-1]
    assert re.match(
        r"ImportError: hf_cnllm needs transformers 5\.16\.1 or newer, but 5\.15\.0 is installed: pip inst", told
    )
