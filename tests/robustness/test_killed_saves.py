"""A process that is killed while it saves over an older checkpoint: what is left loads as the old, as the new, or not.

The process is a real one and dies by SIGKILL, at points spread over all that it calls while it saves; and by the limit on
the size of a file, in the midst of writing one.
"""

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from goldens import GOLDENS
from robustness.folders import MODELS, fresh
from robustness.tally import sample, sample_or_whole
from robustness.test_tokenizer_folders import answers
from tokenizer_goldens import FIXTURES

PART = "killed saves"
SHARDS = "20KB"
Save = Callable[[Path], None]

# transformers' own `save_pretrained` writes into the folder as it goes; nothing in a shard says which save it is of.
MIXED_SHARDS = "plain save_pretrained over an older checkpoint: the shards do not say of which save they are"
MIXED_TOKENIZER = "plain save_pretrained over another tokenizer: the files do not say of which save they are"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


class Kill:
    """Ends the process at the `at`-th call that it makes."""

    def __init__(self, at: int):
        self.left = at

    def __call__(self, frame: Any, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def in_a_child(action: Callable[[], None]) -> int:
    """Runs the action in a forked process; the signal that it died of, or 0."""
    child = os.fork()
    if child == 0:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def killed_at(at: int, save: Callable[[], None]) -> int:
    def action() -> None:
        sys.setprofile(Kill(at))
        save()

    return in_a_child(action)


def killed_by_size(size: int, save: Callable[[], None]) -> int:
    def action() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        save()

    return in_a_child(action)


def killed_after(seconds: float, save: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            save()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def calls_of(save: Callable[[], None]) -> int:
    """How many calls a save makes."""
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        save()
    finally:
        sys.setprofile(None)
    return calls


def deaths(
    save: Callable[[], None], sizes: list[int], points: int, whole: bool
) -> list[tuple[str, Callable[[], int]]]:
    """Ways to die in a save: at calls all over it, at sizes of files, and after some time."""
    total = calls_of(save)
    ways: list[tuple[str, Callable[[], int]]] = []
    for number in range(points):
        at = 1 + total * number // points
        ways.append((f"at call {at} of {total}", lambda at=at: killed_at(at, save)))
    ways += [(f"at {size} bytes of a file", lambda size=size: killed_by_size(size, save)) for size in sizes]
    ways += [(f"after {ms} ms", lambda ms=ms: killed_after(ms / 1000, save)) for ms in (0, 1, 2, 4, 8, 16)]
    return sample(ways, 6, whole)


# --- models -----------------------------------------------------------------------------------------------------------


@cache
def two_models(golden: str) -> tuple[Any, Any]:
    """The golden model, and one with the same names and shapes and other weights."""

    old, new = (MODELS[golden].from_pretrained(GOLDENS / golden, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        for parameter in new.parameters():
            if parameter.is_floating_point():
                parameter.mul_(1.5).add_(0.01)
    return old, new


def state_of(folder: Path, golden: str) -> str:
    """Whether a folder loads as the old or the new model, or as neither."""
    old, new = two_models(golden)
    found = MODELS[golden].from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, model in (("old", old), ("new", new)):
        expected = model.state_dict()
        if all(torch.equal(found[key], tensor) for key, tensor in expected.items() if tensor.is_floating_point()):
            return name
    return "a mixture"


def save_sharded(model: Any, folder: Path, size: str = SHARDS) -> None:
    model.save_pretrained(folder, max_shard_size=size)


@sample_or_whole
@pytest.mark.parametrize("golden", ["baichuan_7b", "chatglm2_6b", "glm", "qwen", "chatglm_6b_3layer"])
def test_save_pretrained_over_an_older_checkpoint(golden, whole, tally, tmp_path):
    """Plain `save_pretrained` of shards over shards of the same names: transformers' own, see docs/reliability.md."""
    tally.part, tally.name = PART, "save_pretrained over an older sharded checkpoint"
    old, new = two_models(golden)
    save_sharded(old, tmp_path / "old")
    assert len(list((tmp_path / "old").glob("*.safetensors"))) > 2
    folder = tmp_path / "folder"

    def save() -> None:
        save_sharded(new, folder)

    fresh(tmp_path / "old", folder)
    assert tally.undamaged(lambda: state_of(folder, golden)) == "old"
    for way, die in deaths(save, [1, 1000, 10_000, 19_000], 40, whole):
        fresh(tmp_path / "old", folder)
        die()
        tally.judge(f"{golden}, {way}", lambda: state_of(folder, golden), lambda x: x in ("old", "new"), MIXED_SHARDS)
    tally.check()


@sample_or_whole
@pytest.mark.parametrize("golden", ["baichuan_7b", "qwen"])
def test_other_numbers_of_shards(golden, whole, tally, tmp_path):
    """One file over shards, and shards over one file."""
    tally.part, tally.name = PART, "one file over shards and shards over one file"
    old, new = two_models(golden)
    folder = tmp_path / "folder"
    for before, after in (("20KB", "1GB"), ("1GB", "20KB"), ("20KB", "40KB")):
        save_sharded(old, tmp_path / before, before)

        def save(after: str = after) -> None:
            save_sharded(new, folder, after)

        fresh(tmp_path / before, folder)
        tally.undamaged(lambda: state_of(folder, golden))
        for way, die in deaths(save, [1, 10_000], 12, whole)[: None if whole else 6]:
            fresh(tmp_path / before, folder)
            die()
            tally.judge(
                f"{golden}, {after} over {before}, {way}",
                lambda: state_of(folder, golden),
                lambda x: x in ("old", "new"),
                MIXED_SHARDS,
            )
    tally.check()


# --- this package's own saves -----------------------------------------------------------------------------------------


@sample_or_whole
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_over_float(bits, whole, tally, tmp_path):
    """A quantized model saved over the one it was made from: integers and floats never load together."""
    tally.part, tally.name = PART, "a quantized model over the float one"
    golden = "chatglm2_6b"
    old, _ = two_models(golden)
    save_sharded(old, tmp_path / "old")
    quantized = MODELS[golden].from_pretrained(tmp_path / "old", dtype=torch.float32).quantize(bits)
    save_sharded(quantized, tmp_path / "new")
    expected = {name: _weights(tmp_path / name, golden) for name in ("old", "new")}
    folder = tmp_path / "folder"
    fresh(tmp_path / "old", folder)
    for way, die in deaths(lambda: save_sharded(quantized, folder), [1, 10_000], 24, whole)[: None if whole else 8]:
        fresh(tmp_path / "old", folder)
        die()
        tally.judge(
            f"{bits} bits, {way}",
            lambda: _weights(folder, golden),
            lambda found: any(_same(found, weights) for weights in expected.values()),
        )
    tally.check()


def _weights(folder: Path, golden: str) -> dict[str, torch.Tensor]:
    return MODELS[golden].from_pretrained(folder, dtype=torch.float32).state_dict()


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- tokenizers -------------------------------------------------------------------------------------------------------


@sample_or_whole
@pytest.mark.parametrize("names", [("chatglm2_small", "chatglm3_small"), ("baichuan1_small", "baichuan2_small")])
def test_tokenizer_over_another(names, whole, tally, tmp_path):
    tally.part, tally.name = PART, "a tokenizer over another generation's"
    old, new = (AutoTokenizer.from_pretrained(FIXTURES / "vocab" / name) for name in names)
    old.save_pretrained(tmp_path / "old")
    new.save_pretrained(tmp_path / "new")
    expected = [[*answers(tmp_path / name), _chat(tmp_path / name)] for name in ("old", "new")]
    folder = tmp_path / "folder"
    fresh(tmp_path / "old", folder)
    for way, die in deaths(lambda: new.save_pretrained(folder), [1, 100, 10_000], 24, whole)[: None if whole else 10]:
        fresh(tmp_path / "old", folder)
        die()
        tally.judge(
            f"{names[1]} over {names[0]}, {way}",
            lambda: [*answers(folder), _chat(folder)],
            lambda found: found in expected,
            MIXED_TOKENIZER,
        )
    tally.check()


def _chat(folder: Path) -> list[int]:
    messages = [{"role": "user", "content": "hi"}]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
