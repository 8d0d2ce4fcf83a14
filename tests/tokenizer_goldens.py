"""Runs a tokenizer on the recorded texts (tests/fixtures/tokenizers/goldens) and lists where it differs.

    golden = TokenizerGolden("baichuan2_small")
    tokenizer = golden.load(BaichuanTokenizer)
    assert differences(golden, tokenizer, "strings") == {}

Families parametrize over `SECTIONS`. A chat's arguments are worded differently in every family, so each has its own
check of the golden's `chat` entries. Where the original raised an error, any error will do.
"""

import atexit
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

FIXTURES = Path(__file__).parent / "fixtures" / "tokenizers"
ERROR = "an error"


@dataclass(frozen=True)
class TokenizerGolden:
    """A vocabulary in the Hub's layout and what the original tokenizer made of it. `*_small` ones are fixtures; real
    ones are looked for in the folder that the environment variable HF_CNLLM_VOCABULARIES names, then in `WHEELS`."""

    name: str

    @property
    def vocabulary(self) -> Path:
        if self.name.endswith("_small"):
            return FIXTURES / "vocab" / self.name
        folder = os.environ.get("HF_CNLLM_VOCABULARIES")
        if folder:
            return Path(folder) / self.name
        found = vocabulary_from_wheel(self.name)
        if found is None:
            wheel = f" or the package {WHEELS[self.name].package}" if self.name in WHEELS else ""
            pytest.skip(f"the real vocabulary {self.name} needs HF_CNLLM_VOCABULARIES{wheel}")
        return found

    def load(self, tokenizer_class, **kwargs: Any):
        """`tokenizer_class` (or AutoTokenizer) from the vocabulary; one object for equal arguments."""
        tokenizer = _load(tokenizer_class, str(self.vocabulary), tuple(sorted(kwargs.items())))
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:  # it still truncates and pads as the last call asked, maybe another test's
            backend.no_truncation()
            backend.no_padding()
        return tokenizer

    def __getitem__(self, section: str) -> Any:
        return _golden(self.name)[section]


@dataclass(frozen=True)
class Wheel:
    """A package on PyPI that ships a real vocabulary file, and the `tokenizer_config.json` that goes with it on the Hub."""

    package: str
    path: str
    config: dict[str, Any]


_DASHSCOPE = ("dashscope", "resources/qwen.tiktoken")
WHEELS = {
    "qwen": Wheel(*_DASHSCOPE, {"tokenizer_class": "QWenTokenizer", "model_max_length": 32768}),
    "qwen_v0": Wheel(*_DASHSCOPE, {"tokenizer_class": "QWenTokenizer", "remove_space": False, "do_lower_case": False}),
}


@cache
def vocabulary_from_wheel(name: str) -> Path | None:
    """A folder as on the Hub, with the file from an installed package of `WHEELS`, which is not imported."""
    wheel = WHEELS.get(name)
    package = wheel and importlib.util.find_spec(wheel.package)
    if not package:
        return None
    source = Path(package.submodule_search_locations[0]) / wheel.path
    recorded = _golden(name)["meta"]["vocab_sha256"][source.name]
    if not source.is_file() or hashlib.sha256(source.read_bytes()).hexdigest() != recorded:
        return None
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    shutil.copy(source, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(wheel.config), encoding="utf-8")
    return folder


@cache
def _golden(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / "goldens" / f"{name}.json").read_text(encoding="utf-8"))


@cache
def _load(tokenizer_class, folder: str, kwargs: tuple[tuple[str, Any], ...]):
    return tokenizer_class.from_pretrained(folder, **dict(kwargs))


# One comparison: its name, what the original gave, and how to get ours.
Comparison = tuple[str, Any, Callable[[], Any]]


def meta(golden: TokenizerGolden, tokenizer) -> Iterator[Comparison]:
    recorded = golden["meta"]
    for name in ("vocab_size", "padding_side", "truncation_side", "model_max_length", "special_tokens_map"):
        yield name, recorded[name], lambda name=name: getattr(tokenizer, name)
    yield "len", recorded["len"], lambda: len(tokenizer)
    for name in ("bos", "eos", "pad", "unk"):
        ours = (f"{name}_token", f"{name}_token_id")
        yield name, recorded[name], lambda ours=ours: [getattr(tokenizer, attribute) for attribute in ours]


def strings(golden: TokenizerGolden, tokenizer) -> Iterator[Comparison]:
    ours: dict[str, Callable[[dict], Any]] = {
        "ids": lambda case: tokenizer.encode(case["text"], add_special_tokens=False),
        "ids_special": lambda case: tokenizer.encode(case["text"]),
        "tokens": lambda case: tokenizer.tokenize(case["text"]),
        "decode": lambda case: tokenizer.decode(case["ids"]),
        "decode_special": lambda case: tokenizer.decode(case["ids_special"]),
        "decode_skip": lambda case: tokenizer.decode(case["ids_special"], skip_special_tokens=True),
    }
    for case in golden["strings"]:
        for field, run in ours.items():
            if field in case:
                yield f"{field} of {case['text']!r}", case[field], lambda run=run, case=case: run(case)


def huge(golden: TokenizerGolden, tokenizer) -> Iterator[Comparison]:
    for case in golden["huge"]:

        def digest(case=case) -> tuple[int, str]:
            ids = tokenizer.encode(case["unit"] * case["times"], add_special_tokens=False)
            return len(ids), hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()

        yield case["name"], (case["n_ids"], case["sha256"]), digest


def pairs(golden: TokenizerGolden, tokenizer) -> Iterator[Comparison]:
    for case in golden["pairs"]:
        pair = (case["a"], case["b"])
        yield repr(pair), case["out"], lambda pair=pair: tokenizer(*pair)["input_ids"]
        if "out_nospecial" in case:
            yield (
                f"{pair!r} without special tokens",
                case["out_nospecial"],
                lambda pair=pair: tokenizer(*pair, add_special_tokens=False)["input_ids"],
            )


def batch(golden: TokenizerGolden, tokenizer) -> Iterator[Comparison]:
    for case in golden["batch"]:
        # What the original returned besides its model had no use for.
        names = [name for name in case["out"] if name in tokenizer.model_input_names]
        expected = {name: case["out"][name] for name in names} or case["out"]

        def run(case=case, names=names) -> dict[str, list]:
            changes = {"padding_side": "left"} if case["tok"].endswith("left") else {}
            if case["tok"].startswith("pad_eod"):
                changes |= {"padding_side": case["tok"].rpartition("_")[2], "pad_token": "<|endoftext|>"}
            with settings(tokenizer, **changes):
                out = tokenizer(case["texts"], **case["kw"])
                return {name: _as_list(out[name]) for name in names}

        yield f"{case['texts']} {case['kw']} {case['tok']}", expected, run


def trunc_left(golden: TokenizerGolden, tokenizer) -> Iterator[Comparison]:
    for case in golden["trunc_left"]:

        def run(case=case) -> list[int]:
            with settings(tokenizer, truncation_side=case["truncation_side"]):
                return tokenizer(case["text"], truncation=True, max_length=case["max_length"])["input_ids"]

        yield f"{case['text']!r} {case['max_length']} {case['truncation_side']}", case["out"], run


def decode_cases(golden: TokenizerGolden, tokenizer) -> Iterator[Comparison]:
    for case in golden["decode_cases"]:
        ids = case["ids"]
        for name, field, skips in (("decode", "decode", False), ("decode, skip", "skip", True)):
            expected = case[field]
            if isinstance(expected, dict) and min(ids) >= 0:  # the originals knew no text for an id without a token
                known = [index for index in ids if index < golden["meta"]["len"]]
                expected = tokenizer.decode(known, skip_special_tokens=skips)
            yield (
                f"{name} {ids}",
                expected,
                lambda ids=ids, skips=skips: tokenizer.decode(ids, skip_special_tokens=skips),
            )


SECTIONS: dict[str, Callable[[TokenizerGolden, Any], Iterator[Comparison]]] = {
    section.__name__: section for section in (meta, strings, huge, pairs, batch, trunc_left, decode_cases)
}


def differences(golden: TokenizerGolden, tokenizer, section: str) -> dict[str, tuple[Any, Any]]:
    """Name of the case -> (the original's result, ours), for the cases of a section that differ."""
    return compare(SECTIONS[section](golden, tokenizer))


def compare(comparisons: Iterator[Comparison]) -> dict[str, tuple[Any, Any]]:
    found = {}
    for name, expected, run in comparisons:
        if isinstance(expected, dict) and "error" in expected:
            expected = ERROR
        try:
            actual = run()
        except (ValueError, TypeError, IndexError, KeyError, OverflowError, NotImplementedError) as error:
            actual = ERROR if expected == ERROR else error
        if actual != expected:
            found[name] = (expected, actual)
    return found


@contextmanager
def settings(tokenizer, **changes: Any) -> Iterator[None]:
    """The tokenizer with some attributes changed for a while."""
    before = {name: getattr(tokenizer, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(tokenizer, name, value)


def _as_list(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
