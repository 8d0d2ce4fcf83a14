"""Writes a checkpoint's weights one tensor at a time, and goes on where a run before was interrupted."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from ...hub.saving import write_json

DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int8: "I8"}
ROOM = 2**25  # for all that is no weight
INDEX = "model.safetensors.index.json"


class Planned(NamedTuple):
    """A tensor that is going to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def split_into_files(tensors: Mapping[str, Planned], max_bytes: int) -> dict[str, dict[str, Planned]]:
    """File name -> its tensors, in order, as many as fit in `max_bytes` but at least one."""
    groups: list[dict[str, Planned]] = []
    size = 0
    for name, planned in tensors.items():
        if not groups or size + planned.nbytes > max_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = planned
        size += planned.nbytes
    count = len(groups)
    return {f"model-{number:05}-of-{count:05}.safetensors": group for number, group in enumerate(groups, 1)}


def check_space(output: Path, needed: int) -> None:
    """Refuses to begin what does not fit on the disk.

    Raises:
        OSError: naming both sizes.
    """
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if needed + ROOM > free:
        raise OSError(
            f"{output} needs {needed / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB free: make room there"
        )


def write_weights(
    folder: Path, files: Mapping[str, Mapping[str, Planned]], progress: Callable[[str, int], object]
) -> None:
    """Writes the files that are not there yet, each at once under its name, and the index.

    Args:
        progress: is told the name of every tensor and its bytes.
    """
    for file, tensors in files.items():
        if not (folder / file).exists():
            unfinished = folder / f"{file}.unfinished"
            with open(unfinished, "wb") as output:
                output.write(header(tensors))
                for name, planned in tensors.items():
                    _write(output, name, planned)
                    progress(name, planned.nbytes)
                output.flush()
                os.fsync(output.fileno())
            unfinished.replace(folder / file)
        else:
            progress(file, sum(planned.nbytes for planned in tensors.values()))
    total = sum(planned.nbytes for tensors in files.values() for planned in tensors.values())
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)


def header(tensors: Mapping[str, Planned]) -> bytes:
    """What a safetensors file begins with: the length of the rest, and where each tensor is."""
    places, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, planned in tensors.items():
        places[name] = {  # type: ignore[assignment]
            "dtype": DTYPES[planned.dtype],
            "shape": list(planned.shape),
            "data_offsets": [offset, offset + planned.nbytes],
        }
        offset += planned.nbytes
    text = json.dumps(places, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(output, name: str, planned: Planned) -> None:
    tensor = planned.make()
    if tuple(tensor.shape) != planned.shape or tensor.dtype != planned.dtype:
        raise RuntimeError(f"{name} came out as {tuple(tensor.shape)}, {tensor.dtype}, not as planned")
    for piece in _pieces(tensor.contiguous()):
        output.write(piece.view(torch.uint8).numpy().data)


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from tensor.flatten().split(2**24) if tensor.numel() else ()
