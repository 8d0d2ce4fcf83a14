"""Folders to damage: the golden checkpoints and the small vocabularies of every family, and what can happen to a file."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from goldens import GOLDENS
from robustness.tally import SEED

MODELS: dict[str, Any] = {
    "baichuan_7b": AutoModelForCausalLM,
    "baichuan2_13b": AutoModelForCausalLM,
    "chatglm_6b_3layer": AutoModel,
    "chatglm_6b_3layer_int8": AutoModel,
    "chatglm2_6b": AutoModel,
    "chatglm3_6b_int4": AutoModel,
    "glm": AutoModelForSeq2SeqLM,
    "glm130b": AutoModelForSeq2SeqLM,
    "qwen": AutoModelForCausalLM,
}
MODEL_FILES = ("config.json", "model.safetensors")

Damage = Callable[[Path], None]  # done to a folder in place


def copy_model(golden: str, folder: Path) -> Path:
    """The golden checkpoint without its recordings."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODEL_FILES:
        shutil.copy(GOLDENS / golden / name, folder)
    return folder


def fresh(source: Path, folder: Path) -> Path:
    """`folder` as a copy of `source`, whatever it was before."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder, symlinks=True)
    return folder


# --- bytes ------------------------------------------------------------------------------------------------------------


def cut(name: str, length: int) -> Damage:
    return lambda folder: os.truncate(folder / name, length)


def flip(name: str, bit: int) -> Damage:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(content)

    return damage


def overwrite(name: str, content: bytes) -> Damage:
    return lambda folder: void((folder / name).write_bytes(content))


def remove(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def replace(name: str, other: Path) -> Damage:
    return lambda folder: void(shutil.copy(other, folder / name))


def link(name: str, target: Path) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return damage


def void(_: Any) -> None:
    """For lambdas whose value nobody wants."""


def cuts(path: Path) -> Iterator[tuple[str, Damage]]:
    """Cut to nothing, within the first bytes, at a quarter, half, three quarters, at a line's end, and a byte short."""
    size = path.stat().st_size
    lengths = {0, 1, 7, 8, 9, size // 4, size // 2, size * 3 // 4, size - 1, size - 8}
    lines = [index + 1 for index, byte in enumerate(path.read_bytes()) if byte == 0x0A][:-1]
    if lines and path.suffix not in (".model", ".safetensors"):
        lengths |= {lines[0], lines[len(lines) // 2], lines[-1], lines[-1] - 1}
    for length in sorted(length for length in lengths if 0 <= length < size):
        yield f"{path.name} cut to {length} of {size} bytes", cut(path.name, length)


def flips(path: Path, count: int, start: int = 0, end: int | None = None) -> Iterator[tuple[str, Damage]]:
    generator = random.Random(f"{SEED} {path.name}")
    end = path.stat().st_size if end is None else end
    for bit in sorted(generator.sample(range(start * 8, end * 8), min(count, (end - start) * 8))):
        yield f"{path.name} with bit {bit} flipped", flip(path.name, bit)


# --- JSON -------------------------------------------------------------------------------------------------------------

DROPPED = object()


def set_key(name: str, key: str, value: Any) -> Damage:
    """Sets a key of a JSON file, or drops it."""

    def damage(folder: Path) -> None:
        content = read_json(folder / name)
        content.pop(key, None)
        if value is not DROPPED:
            content[key] = value
        write_json(folder / name, content)

    return damage


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


# --- tensors ----------------------------------------------------------------------------------------------------------


def change_tensors(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Rewrites the checkpoint with `change(tensors)` done to it in place."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")

    return damage
