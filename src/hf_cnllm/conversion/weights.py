"""Weights under the names of another architecture, written shard by shard: no more than one shard is in memory."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file

from ..hub.saving import check_saved, write_json
from ..hub.weight_files import (
    Stored,
    check_indexes,
    check_weight_files,
    read_tensors,
    size_of,
    stored_tensors,
    weight_files,
)
from ..loss.norm_head import inverse_row_norms
from .roads import Road, Rows, in_any_layer, moved

SHARD_SIZE = 10**9  # bytes of a written shard; a larger tensor is one by itself
ROWS_AT_ONCE = 4096  # of a head that is normalized
Tensors = Sequence[torch.Tensor]
Progress = Callable[[int], object]  # is told the bytes just written


class Source(NamedTuple):
    """The weights of a checkpoint that has been looked at and is whole."""

    tensors: dict[str, Stored]
    files: dict[str, Path]  # where each is

    def read(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        files = dict.fromkeys(self.files[name] for name in names)
        return {
            name: tensor
            for file in files
            for name, tensor in read_tensors(file, [name for name in names if self.files[name] == file])
        }


class Moved(NamedTuple):
    """A tensor to write: what `make` makes of its sources."""

    sources: tuple[str, ...]
    nbytes: int
    make: Callable[[Tensors], torch.Tensor]


def read_source(folder: Path, model: Any) -> Source:
    """Looks at the weight files of `folder`, reading no weight.

    Args:
        model: what they must be the weights of, on the meta device.

    Raises:
        ValueError: they are not of one save, or not this model's; naming what is missing, unexpected or of another shape.
        OSError: one is missing or damaged.
    """
    check_indexes(folder)
    check_saved(folder)
    files = weight_files(folder)
    expected = model.state_dict()
    tensors: dict[str, Stored] = {}
    where: dict[str, Path] = {}
    for file in files:
        found = stored_if_whole(file)
        tensors |= found
        where |= dict.fromkeys(found, file)
    check_weight_files([str(file) for file in files], {n: t.dtype for n, t in expected.items()}, "")
    may_lack = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    wrong = [f"{name} is missing" for name in expected if name not in tensors and name not in may_lack]
    wrong += [
        f"{name} is unexpected"
        for name in tensors
        if name not in expected and not any(re.search(pattern, name) for pattern in ignored)
    ]
    wrong += [
        f"{name} has the shape {tensors[name].shape} and not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in tensors and tensors[name].shape != tuple(tensor.shape)
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"the weights in {folder} are not those that config.json says: {', '.join(wrong[:3])}{more}")
    return Source(tensors, where)


def stored_if_whole(file: Path) -> dict[str, Stored]:
    """As [`stored_tensors`]; damage is an OSError that names the file."""
    try:
        return stored_tensors(file)
    except Exception as error:  # SafetensorError, or whatever torch makes of a damaged file
        raise OSError(f"{file} is damaged or cut off ({error}). Download it again.") from error


def to_target(road: Road, config: Any, source: Source) -> tuple[dict[str, Moved], list[str]]:
    """The target's tensors, and the names of the original's that are not to be had from these again.

    Args:
        config: of the original.
    """
    normed, unbiased = road.normed(config), road.unbiased(config)
    planned, kept = {}, []
    for name, stored in source.tensors.items():
        module, _, kind = name.rpartition(".")
        targets = moved(road.modules, module)
        if targets is None or module in normed:
            kept.append(name)
        for part, target in enumerate(targets or ()):
            make, share = (normalized if module in normed else the_one), 1.0
            if len(targets or ()) > 1:
                rows = road.rows(config, module)
                make, share = partial(_part, rows, part), rows.sizes[part] / sum(rows.sizes)
            planned[f"{target}.{kind}"] = Moved((name,), int(size_of(stored) * share), make)
            if in_any_layer(target) in unbiased:
                planned[f"{target}.bias"] = Moved((name,), size_of(stored) // stored.shape[1], _no_bias)
    return planned, kept


def to_original(road: Road, config: Any, source: Source) -> dict[str, Moved]:
    """The original's tensors from the target's; the inverse of [`to_target`].

    Raises:
        ValueError: a bias that the original has no place for was trained.
    """
    backwards = {name: (original,) for original, names in road.modules.items() for name in names}
    unbiased, planned = road.unbiased(config), {}
    for name in source.tensors:
        module, _, kind = name.rpartition(".")
        if kind == "bias" and in_any_layer(module) in unbiased:
            if source.read([name])[name].any():
                raise ValueError(f"{name} was trained, and the original has no such bias: leave it out of training")
            continue
        (original,) = moved(backwards, module) or (module,)
        sources = tuple(f"{target}.{kind}" for target in moved(road.modules, original) or (module,))
        size = sum(size_of(source.tensors[each]) for each in sources)
        make = partial(_joined, road.rows(config, original)) if len(sources) > 1 else the_one
        planned[f"{original}.{kind}"] = Moved(sources, size, make)
    return planned


def the_one(tensors: Tensors) -> torch.Tensor:
    return tensors[0]


def _part(rows: Rows, part: int, tensors: Tensors) -> torch.Tensor:
    return rows.split(tensors[0])[part]


def _joined(rows: Rows, tensors: Tensors) -> torch.Tensor:
    return rows.join(tuple(tensors))


def _no_bias(tensors: Tensors) -> torch.Tensor:
    return tensors[0].new_zeros(len(tensors[0]))


def normalized(tensors: Tensors) -> torch.Tensor:
    """A NormHead's matrix as it computes with it, in place: a second one would be a gigabyte."""
    for some in tensors[0].split(ROWS_AT_ONCE):
        some.copy_(some.float() * inverse_row_norms(some)[:, None])
    return tensors[0]


def write_shards(folder: Path, planned: Mapping[str, Moved], source: Source, progress: Progress) -> None:
    """Writes `model.safetensors`, or shards with their index."""
    split = split_state_dict_into_shards_factory(
        dict(planned),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=SHARD_SIZE,
    )
    for file, names in split.filename_to_tensors.items():
        some = {name: planned[name] for name in names}
        _write_shard(folder / file, some, source)
        progress(sum(tensor.nbytes for tensor in some.values()))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _write_shard(file: Path, planned: Mapping[str, Moved], source: Source) -> None:
    """A function of its own, so that nothing of a shard is left when the next is read."""
    read = source.read({name: None for tensor in planned.values() for name in tensor.sources})
    tensors = {name: tensor.make([read[each] for each in tensor.sources]) for name, tensor in planned.items()}
    write_tensors(file, tensors)


def write_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a safetensors file."""
    save_file({name: t.contiguous() for name, t in tensors.items()}, file, metadata={"format": "pt"})
