"""A checkpoint in another architecture, and back."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from ..families import family_of
from ..hub.json_files import read_object
from ..hub.saving import staged_folder, write_json
from ..hub.weight_files import INDEXES, size_of
from ..vllm.served import stop_ids
from .roads import ROADS, Road, road_of
from .vocabulary import write_for_llama_cpp, write_vocabulary
from .weights import (
    Moved,
    Progress,
    Source,
    normalized,
    read_source,
    stored_if_whole,
    the_one,
    to_original,
    to_target,
    write_shards,
    write_tensors,
)

ORIGINAL = "original"  # folder in an export with what is needed to go back; engines leave one of this name alone
LEFT_OVER = "left_over.safetensors"  # there: tensors that the export lacks, or has in another form
SETTINGS = ("generation_config.json", "tokenizer_config.json")
KEPT = {".json", ".jinja", ".md", ".model", ".py", ".tiktoken", ".txt", ""}  # suffixes of files that are no weights


def export_checkpoint(folder: Path, output: Path, target: str, progress: Progress = lambda size: None) -> str | None:
    """Writes the checkpoint in `folder` as one of another architecture, and says what that one does otherwise, or None.

    Dtypes stay. `output` holds what the target's class and tokenizer read, and in `original/` what the way back needs.

    Args:
        target: one of `TARGETS`.
        progress: is told the bytes written.

    Raises:
        ValueError: the target computes something else, or the checkpoint is not whole.
        OSError: a file is missing or damaged, `output` holds something, or the disk is full.
    """
    config = AutoConfig.from_pretrained(folder)
    road = road_of(config, target)
    for file in filter(Path.is_file, (folder / name for name in SETTINGS)):
        read_object(file)  # which names a damaged one
    source = read_source(folder, empty_model(config))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    planned, kept = to_target(road, config, source)
    with staged_folder(output) as staged:
        write_shards(staged, planned, source, progress)
        original = staged / ORIGINAL
        original.mkdir()
        _copy_other_files(folder, original)
        if kept:
            write_tensors(original / LEFT_OVER, source.read(kept))
        if road.tokenizer_class is None:
            _copy_other_files(folder, staged)
            _drop_unset_lengths(staged / "config.json")
        else:
            write_vocabulary(tokenizer, road.tokenizer_class, staged)
            _write_config(road, config, staged / "config.json")
            _write_generation_config(folder, config, stop_ids(tokenizer), staged / "generation_config.json")
        if road.target in ("llama", "baichuan"):
            write_for_llama_cpp(folder, staged)
    return road.loses(config)


def restore_checkpoint(folder: Path, output: Path, progress: Progress = lambda size: None) -> str | None:
    """The way back from what [`export_checkpoint`] wrote, or what was trained from it, and says what is not as it was, or None.

    Raises:
        ValueError: the weights are not those of an export of this original.
        OSError: as there; or `original/` is missing.
    """
    kept = folder / ORIGINAL
    if not (kept / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no {ORIGINAL}/config.json, which exports have: copy that folder there if this was trained from one"
        )
    config = AutoConfig.from_pretrained(kept)
    model_type = read_object(folder / "config.json").get("model_type")
    roads = (road for road in ROADS if road.target == model_type and isinstance(config, road.source))
    if (road := next(roads, None)) is None:
        raise ValueError(f"{folder} is of the model_type {model_type!r}, and not an export of what is in {ORIGINAL}")
    source = read_source(folder, empty_model(road.config(config)))
    planned = to_original(road, config, source)
    left_over = kept / LEFT_OVER
    changed = _take_left_over(road, config, source, planned, left_over) if left_over.is_file() else []
    with staged_folder(output) as staged:
        _copy_other_files(kept, staged)
        write_shards(staged, planned, source, progress)
        if changed:
            file = staged / "config.json"
            write_json(file, read_object(file) | {"norm_head": False})
    if changed:
        return (
            f"{', '.join(changed)} was trained after the export, so that its rows are not normalized any more: config.json says "
            "`norm_head` false, which this package reads, and the original's code does not."
        )
    return None


def _take_left_over(road: Road, config: Any, source: Source, planned: dict[str, Moved], file: Path) -> list[str]:
    """Puts what was left over back into the plan. Returns the names of the normalized ones that have been trained since."""
    changed, left_over = [], stored_if_whole(file)
    for name, tensor in left_over.items():
        if name.rpartition(".")[0] in road.normed(config):
            (exported,) = planned[name].sources
            now = _digest(source.read([exported])[exported])
            if now != _digest(normalized([Source(left_over, {name: file}).read([name])[name]])):
                changed.append(name)
                continue
        elif name in planned:
            raise ValueError(
                f"{file} holds {name}, which the export has itself: take {ORIGINAL} from the export again"
            )
        source.tensors[name], source.files[name] = tensor, file
        planned[name] = Moved((name,), size_of(tensor), the_one)
    return changed


def _digest(tensor: torch.Tensor) -> bytes:
    """Stands for a tensor that there is no room for beside another."""
    return hashlib.sha256(tensor.view(torch.uint8).numpy().data).digest()


def empty_model(config: Any) -> Any:
    """The generating model of a configuration, without memory."""
    family = family_of(config)
    auto_class = family.generates_with if family else "AutoModelForCausalLM"
    with torch.device("meta"):
        return getattr(transformers, auto_class).from_config(config)


def _copy_other_files(folder: Path, output: Path) -> None:
    indexes = set(folder.glob(INDEXES))
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in KEPT and file not in indexes and not file.name.startswith("."):
            shutil.copyfile(file, output / file.name)


def _write_config(road: Road, config: Any, file: Path) -> None:
    exported = road.config(config)
    exported.to_json_file(file, use_diff=False)
    values = read_object(file)
    rope = values.get("rope_parameters") or {}
    # What readers older than transformers 5 look for.
    values |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = {"type": rope["rope_type"], **rope}
    write_json(file, values)


def _drop_unset_lengths(file: Path) -> None:
    """llama.cpp's converter takes null, which this package writes where ALiBi has no limit, for a number."""
    values = read_object(file)
    if values.get("max_position_embeddings", 0) is None:
        del values["max_position_embeddings"]
        write_json(file, values)


def _write_generation_config(folder: Path, config: Any, stops: list[int], file: Path) -> None:
    """As it was, but for answers ending where the family's chats end them: engines know nothing of the chats."""
    found = folder / file.name
    values = read_object(found) if found.is_file() else {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if (index := getattr(config, name)) is not None:
            values.setdefault(name, index)
    given = values.get("eos_token_id")
    ends = [] if given is None else given if isinstance(given, list) else [given]
    if not all(isinstance(end, int) for end in ends):
        raise ValueError(f"{found}: `eos_token_id` is {given!r}, and must be a token's number or a list of them")
    if ends := list(dict.fromkeys([*ends, *stops])):
        values["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    write_json(file, values)
