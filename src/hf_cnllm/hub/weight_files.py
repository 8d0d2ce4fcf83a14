"""What the files of a checkpoint say of each other, without reading a weight: an index that leads elsewhere, shards of
different saves, numbers of another kind than the model's."""

import json
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

INDEXES = "*.index*.json"  # model.safetensors.index.json, with a variant model.safetensors.index.fp16.json
SHARD = re.compile(r"(?P<series>.+)-\d{5}-(?P<count>of-\d{5})(?P<format>\..+)")
MIXED = "The folder mixes shards of different saves: download or save the checkpoint again, into an empty folder."
FLOATS, INTEGERS, BOOLEANS, COMPLEX = "floats", "integers", "booleans", "complex numbers"
KINDS = {"F": FLOATS, "I": INTEGERS, "U": INTEGERS, "C": COMPLEX}  # by the first letter of safetensors' dtypes


def check_indexes(folder: Path) -> None:
    """Refuses a folder whose index names weight files outside of it.

    Raises:
        ValueError: naming the index and the file.
    """
    for index, weight_map in _indexes(folder):
        for file in weight_map.values():
            windows = PureWindowsPath(file)  # knows both kinds of separators
            if PurePosixPath(file).is_absolute() or windows.anchor or ".." in windows.parts:
                raise ValueError(
                    f"{index} takes weights from {file!r}, outside of the checkpoint's folder. Copy the file into the "
                    "folder, and name it there."
                )


def check_files_are_there(files: Sequence[str]) -> None:
    """Raises FileNotFoundError, naming the first that is missing."""
    if missing := [file for file in files if not Path(file).exists()]:
        raise FileNotFoundError(
            f"{len(missing)} of the checkpoint's {len(files)} weight files are missing, such as {missing[0]}. Download or save "
            "it again."
        )


def check_weight_files(files: Sequence[str], expected: Mapping[str, torch.dtype], prefix: str) -> None:
    """Refuses files that cannot be one save's.

    Args:
        files: the weight files, all that will be read. Files in other formats than safetensors and torch's zip are not
            looked at, and damaged ones are left to those who read them.
        expected: name -> dtype of the model's own tensors; others are not looked at.
        prefix: of the names, `transformer.` for example, which some files leave out.

    Raises:
        ValueError: naming the file and the tensor: it holds numbers of another kind than the model's, is in two shards, or
            not in the one that the index says; or a shard of the same series lies beside them that the index leaves out.
        FileNotFoundError: one is missing.
        SafetensorError: a safetensors file is damaged.
    """
    check_files_are_there(files)
    kinds = {name.removeprefix(prefix): _kind(dtype) for name, dtype in expected.items()}
    found: dict[str, Path] = {}
    for file in map(Path, files):
        stored = _stored_if_readable(file)
        for name, (_, kind, _) in stored.items():
            key = name.removeprefix(prefix)
            if kinds.get(key, kind) != kind:
                advice = "The file is damaged, or of another checkpoint: download or save it again."
                if f"{name}_scale" in stored:
                    advice = "It holds quantized weights of ChatGLM, and config.json does not say so: set `quantization_bit`."
                raise ValueError(f"`{name}` holds {kind} in {file}, where this model has {kinds[key]}. {advice}")
            if key in kinds and key in found:
                raise ValueError(f"`{name}` is both in {found[key]} and in {file.name}. {MIXED}")
            found[key] = file
    names = {Path(file).name for file in files}
    for index, weight_map in _indexes(Path(files[0]).parent):
        if set(weight_map.values()) == names:
            claimed = {name: file for name, file in weight_map.items() if name.removeprefix(prefix) in kinds}
            _check_series(index, names)
            for name, shard in claimed.items():
                if found.get(name.removeprefix(prefix), index).name != shard:
                    raise ValueError(f"{index} says that `{name}` is in {shard}, but it is not. {MIXED}")


def _check_series(index: Path, files: Collection[str]) -> None:
    """Refuses a shard beside the index's that is numbered like them and not named."""
    series = {match.groups() for file in files if (match := SHARD.fullmatch(file))}
    for other in sorted(path.name for path in index.parent.iterdir()):
        if (match := SHARD.fullmatch(other)) and match.groups() in series and other not in files:
            raise ValueError(f"{index} leaves out {other}, which is numbered like the files that it names. {MIXED}")


def _indexes(folder: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Every index in a folder with its table; what is no table of names is left to transformers."""
    for path in sorted(folder.glob(INDEXES)):
        try:
            weight_map: Any = json.loads(path.read_bytes())["weight_map"]
            if all(isinstance(file, str) for file in weight_map.values()):
                yield path, weight_map
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue


def _stored_if_readable(file: Path) -> dict[str, "Stored"]:
    """Of other formats and damaged pickles nothing: whoever reads them says what is wrong."""
    if file.suffix != ".safetensors" and not zipfile.is_zipfile(file):
        return {}
    try:
        return stored_tensors(file)
    except SafetensorError:
        raise
    except Exception:
        return {}


class Stored(NamedTuple):
    """A tensor in a file, as far as it is known without reading it."""

    shape: tuple[int, ...]
    kind: str  # FLOATS, INTEGERS, BOOLEANS or COMPLEX
    dtype: str  # by the file's own name for it


def stored_tensors(file: Path) -> dict[str, Stored]:
    """Name -> shape and kind of every tensor in a weight file.

    Raises:
        SafetensorError: a safetensors file is damaged.
        Exception: whatever `torch.load` makes of other damaged files.
    """
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as weights:
            slices = {name: weights.get_slice(name) for name in weights.keys()}  # noqa: SIM118
            dtypes = {name: tensor.get_dtype() for name, tensor in slices.items()}
            return {
                name: Stored(tuple(slices[name].get_shape()), _kind_by_name(dtype), dtype)
                for name, dtype in dtypes.items()
            }
    tensors = dict(torch.load(file, map_location="meta", weights_only=True))
    return {
        name: Stored(tuple(tensor.shape), _kind(tensor.dtype), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in tensors.items()
        if isinstance(tensor, torch.Tensor)
    }


BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "C64": 8, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


def size_of(tensor: Stored) -> int:
    """Bytes that a stored tensor takes."""
    numbers = torch.Size(tensor.shape).numel()
    return numbers * (BYTES.get(tensor.dtype, 1) if tensor.dtype.isupper() else getattr(torch, tensor.dtype).itemsize)


def read_tensors(file: Path, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Those of a file's tensors, each read when it is asked for. Their memory is the file's own, mapped for this alone: who
    writes to it changes no file."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as weights:
            for name in names:
                yield name, weights.get_tensor(name)
    else:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        yield from ((name, tensors[name]) for name in names)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights: those that `from_pretrained` reads.

    Raises:
        FileNotFoundError: there are none, or one that the index names is missing.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            named = dict(_indexes(folder)).get(folder / f"{name}.index.json", {})
            files = [folder / file for file in sorted(set(named.values()))]
            if missing := [file.name for file in files if not file.is_file()]:
                raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: download the checkpoint again")
            return files
    raise FileNotFoundError(f"{folder} holds no weights (model.safetensors, pytorch_model.bin or an index of either)")


def _kind_by_name(dtype: str) -> str:
    return BOOLEANS if dtype == "BOOL" else FLOATS if dtype == "BF16" else KINDS[dtype[0]]


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return BOOLEANS
    return FLOATS if dtype.is_floating_point else COMPLEX if dtype.is_complex else INTEGERS
