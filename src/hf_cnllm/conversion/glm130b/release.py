"""GLM-130B as it was released, in the files of its model-parallel ranks, as a checkpoint of this package.

| tensor                                    | what a rank holds                                             |
|-------------------------------------------|---------------------------------------------------------------|
| word_embeddings, query_key_value          | some of the rows                                              |
| dense_h_to_4h (a, gated by b)             | some of the rows of a, and behind them the same rows of b     |
| attention.dense, dense_4h_to_h: weight    | some of the columns; biases are copies                        |
| norms                                     | copies                                                        |
| rotary_emb.inv_freq                       | copies, which tell the size of a head and are not kept        |

INT8 and INT4 weights were quantized after the split: one that is split by columns has a scale for each row and rank.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from ...hub.saving import check_new_folder, write_through
from ...models.chatglm.quantized_linear import dequantize_rows
from ...models.glm130b import GLM130BConfig, GLM130BTokenizer
from .ranks import Rank, find_ranks, find_settings
from .sharded_weights import Planned, check_space, split_into_files, write_weights

ROWS, HALVES, COLUMNS, COPIES = "rows", "halves of rows", "columns", "copies"
SPLITS = {
    r"word_embeddings\.weight": ROWS,
    r"layers\.\d+\.attention\.query_key_value\.(weight|bias|weight_scale)": ROWS,
    r"layers\.\d+\.mlp\.dense_h_to_4h\.(weight|bias|weight_scale)": HALVES,
    r"layers\.\d+\.(attention\.dense|mlp\.dense_4h_to_h)\.(weight|weight_scale)": COLUMNS,
    r"layers\.\d+\.(attention\.dense|mlp\.dense_4h_to_h)\.bias": COPIES,
    r"(layers\.\d+\.(input|post_attention)|final)_layernorm\.(weight|bias)": COPIES,
}
SPLIT = re.compile("|".join(f"(?P<_{index}>{pattern})" for index, pattern in enumerate(SPLITS)))
PREFIX = "transformer."
INV_FREQ = ".attention.rotary_emb.inv_freq"
SCALE = ".weight_scale"
MODULES = (
    *("input_layernorm", "attention.query_key_value", "attention.dense"),
    *("post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
)
ID_FIELDS = {
    **{"mask_token_id": "[MASK]", "gmask_token_id": "[gMASK]", "smask_token_id": "[sMASK]", "bos_token_id": "<sop>"},
    **{"eos_token_id": "<eop>", "text_end_token_id": "</s>", "pad_token_id": "<pad>"},
}


class Sizes(NamedTuple):
    """What the tensors themselves say."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    inner_hidden_size: int
    vocab_size: int
    quantization_bit: int


def read_sizes(ranks: list[Rank]) -> Sizes:
    """Looks at names, shapes and dtypes of all ranks, which must be those of one checkpoint.

    Raises:
        ValueError: naming the file and the tensor that does not fit.
    """
    first, count = ranks[0], len(ranks)
    for rank in ranks[1:]:
        for name in sorted(first.tensors.keys() ^ rank.tensors.keys()):
            holder, other = (first, rank) if name in first.tensors else (rank, first)
            raise ValueError(
                f"{holder.path.name} holds `{name}`, and {other.path.name} does not: they are of two checkpoints"
            )
        for name, tensor in first.tensors.items():
            other_tensor = rank.tensors[name]
            if (tensor.shape, tensor.dtype) != (other_tensor.shape, other_tensor.dtype):
                raise ValueError(
                    f"`{name}` is {_form(tensor)} in {first.path.name} and {_form(other_tensor)} in {rank.path.name}: they are "
                    "of two checkpoints, or one is damaged"
                )
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in first.tensors.items()}
    names = {name for name in tensors if not name.endswith(INV_FREQ)}
    if foreign := sorted(name for name in names if not SPLIT.fullmatch(name)):
        raise ValueError(f"{first.path} holds `{PREFIX}{foreign[0]}`, which GLM-130B does not have")
    layers = 1 + max((int(name.split(".")[1]) for name in names if name.startswith("layers.")), default=-1)
    integers = {name for name in names if tensors[name].dtype == torch.int8}
    expected = set(_names(layers)) | {name.removesuffix(".weight") + SCALE for name in integers}
    if lost := sorted(expected - names):
        raise ValueError(f"{first.path} does not hold `{PREFIX}{lost[0]}`: it is cut, or not GLM-130B's")
    inv_freq = next((tensor for name, tensor in tensors.items() if name.endswith(INV_FREQ)), None)
    if inv_freq is None:
        raise ValueError(f"{first.path} does not hold `layers.0{INV_FREQ}`, which tells the number of heads")

    hidden = tensors["final_layernorm.weight"].shape[0]
    projection = tensors["layers.0.attention.query_key_value.weight"]
    bits = 8 * projection.shape[1] // hidden if integers else 0
    if bits not in (0, 4, 8):
        raise ValueError(f"{first.path} holds weights of {bits} bits, and GLM-130B's are of 8 or 4: it is damaged")
    sizes = Sizes(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=hidden // (2 * inv_freq.numel()),
        inner_hidden_size=tensors["layers.0.mlp.dense_h_to_4h.bias"].shape[0] * count // 2,
        vocab_size=tensors["word_embeddings.weight"].shape[0] * count,
        quantization_bit=bits,
    )
    for name, shape in _shapes(sizes, count, integers):
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"`{PREFIX}{name}` is {_form(tensors[name])} in {first.path.name}, but of {count} ranks each holds {shape}: "
                "are all of the checkpoint's ranks here?"
            )
    return sizes


def _form(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} in {str(tensor.dtype).removeprefix('torch.')}"


def _names(layers: int) -> Iterator[str]:
    yield from ("word_embeddings.weight", "final_layernorm.weight", "final_layernorm.bias")
    for layer in range(layers):
        for module in MODULES:
            yield from (f"layers.{layer}.{module}.weight", f"layers.{layer}.{module}.bias")


def _shapes(sizes: Sizes, count: int, integers: set[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name -> shape of what each of the ranks holds."""
    hidden, inner = sizes.hidden_size, sizes.inner_hidden_size
    whole = {
        "query_key_value": (3 * hidden, hidden),
        "dense": (hidden, hidden),
        "dense_h_to_4h": (2 * inner, hidden),
        "dense_4h_to_h": (hidden, inner),
        "word_embeddings": (sizes.vocab_size, hidden),
    }
    for name in _names(sizes.num_layers):
        module, field = name.split(".")[-2:]
        rows, columns = whole.get(module, (hidden, 0))
        split = split_of(name)
        rows = rows // count if split in (ROWS, HALVES) else rows
        columns = columns // count if split == COLUMNS else columns
        if name in integers:
            yield name.removesuffix(".weight") + SCALE, (rows,)
            columns = columns * sizes.quantization_bit // 8
        yield name, (rows, columns) if field == "weight" and module in whole else (rows,)


def split_of(name: str) -> str:
    """How a tensor is split among the ranks."""
    match = SPLIT.fullmatch(name.removeprefix(PREFIX))
    assert match is not None
    return next(split for index, split in enumerate(SPLITS.values()) if match[f"_{index}"] is not None)


def make_config(sizes: Sizes, settings: Mapping[str, Any], ranks: int, keeps_integers: bool) -> GLM130BConfig:
    """The configuration of what is written.

    Args:
        settings: the keys of `model_config.json`, which must not contradict the tensors.
    """
    found = sizes._asdict()
    bits = found.pop("quantization_bit")
    for key, value in found.items():
        if settings.get(key) not in (None, value):
            raise ValueError(f"`{key}` is {settings[key]} in model_config.json and {value} in the ranks' tensors")
    keys = {key: value for key, value in settings.items() if key in GLM130BConfig.__dataclass_fields__}
    if keeps_integers:
        keys |= {"quantization_bit": bits, "quantization_groups": ranks}
    config = GLM130BConfig.from_dict(keys | found | {"model_parallel_size": 1})
    config.architectures, config.dtype = ["GLM130BForConditionalGeneration"], torch.float16
    return config


def plan(ranks: list[Rank], sizes: Sizes, keeps_integers: bool) -> dict[str, Planned]:
    """Every tensor of the merged checkpoint, in the order of the layers."""
    first, count = ranks[0].tensors, len(ranks)
    floats = next(t.dtype for name, t in first.items() if name.endswith("final_layernorm.weight"))
    planned: dict[str, Planned] = {}
    for name in _names(sizes.num_layers):
        name, bits = PREFIX + name, 0
        tensor = first[name]
        shape, dtype = list(tensor.shape), tensor.dtype
        if is_quantized := dtype == torch.int8:
            bits = sizes.quantization_bit
            if keeps_integers:
                scale = name.removesuffix(".weight") + SCALE
                planned[scale] = _plan_scale(ranks, scale)
            else:
                shape[1], dtype = shape[1] * 8 // bits, floats
        split = split_of(name)
        if split != COPIES:
            shape[1 if split == COLUMNS else 0] *= count
        undo = bits if is_quantized and not keeps_integers else 0
        planned[name] = Planned(tuple(shape), dtype, _merger(ranks, name, split, tuple(shape), dtype, undo))
    return planned


def _plan_scale(ranks: list[Rank], name: str) -> Planned:
    tensor, split = ranks[0].tensors[name], split_of(name)
    rows, count = tensor.shape[0], len(ranks)
    if split == COLUMNS and count > 1:

        def stack() -> torch.Tensor:
            return torch.stack([rank.read(name) for rank in ranks], dim=1)

        return Planned((rows, count), tensor.dtype, stack)
    split = ROWS if split == COLUMNS else split
    shape = (rows * count,)
    return Planned(shape, tensor.dtype, _merger(ranks, name, split, shape, tensor.dtype, 0))


def _merger(
    ranks: list[Rank], name: str, split: str, shape: tuple[int, ...], dtype: torch.dtype, bits: int
) -> Callable[[], torch.Tensor]:
    """What merges a tensor, one rank after the other; `bits`: of integers to be made floats."""

    def merge() -> torch.Tensor:
        merged = torch.empty(shape, dtype=dtype)
        for index, rank in enumerate(ranks):
            part = rank.read(name)
            if split == COPIES:
                if index and not torch.equal(merged, part):
                    raise ValueError(
                        f"`{name}` differs in {ranks[0].path.name} and {rank.path.name}: they are of two checkpoints"
                    )
                merged.copy_(part)
                continue
            places = _places(merged, split, index, len(ranks))
            pieces = part.chunk(len(places))
            if not bits:
                for place, piece in zip(places, pieces, strict=True):
                    place.copy_(piece)
                continue
            scales = rank.read(name.removesuffix(".weight") + SCALE).chunk(len(places))
            for place, piece, scale in zip(places, pieces, scales, strict=True):
                _dequantize_into(place, piece, scale, bits)
        return merged

    return merge


def _places(merged: torch.Tensor, split: str, index: int, count: int) -> list[torch.Tensor]:
    """Where in a merged tensor a rank's parts belong."""
    if split == COLUMNS:
        return [merged.chunk(count, dim=1)[index]]
    halves = merged.chunk(2) if split == HALVES else [merged]
    return [half.chunk(count)[index] for half in halves]


def _dequantize_into(place: torch.Tensor, integers: torch.Tensor, scale: torch.Tensor, bits: int) -> None:
    borders = [*range(0, len(integers), 1024), len(integers)]  # of rows, as INT4 takes eight times its size on the way
    for start, end in pairwise(borders):
        place[start:end] = dequantize_rows(integers[start:end], scale[start:end], bits, place.dtype)


def check_copies(ranks: list[Rank], sizes: Sizes) -> None:
    """Compares a small tensor of which every rank has a copy, before any work.

    Raises:
        ValueError: two ranks are of different checkpoints.
    """
    for name in ("final_layernorm.weight", f"layers.{sizes.num_layers - 1}.attention.dense.bias"):
        _merger(ranks, PREFIX + name, COPIES, (sizes.hidden_size,), ranks[0].tensors[PREFIX + name].dtype, 0)()


def convert(
    shards: Path,
    output: Path,
    tokenizer: Path | None = None,
    keeps_integers: bool = False,
    max_file_bytes: int = 5 * 10**9,
    progress: Callable[[str, int], object] = lambda name, size: None,
) -> GLM130BConfig:
    """Merges the ranks in `shards` into the checkpoint `output`, which appears when it is whole.

    What is interrupted leaves `.output.unfinished` beside it and goes on from there when it is called again; what fails
    leaves nothing. Memory: one merged tensor, and little more.

    Args:
        tokenizer: `ice_text.model` or a folder with it; None: the one in `shards`, if there is one.
        keeps_integers: keep INT8 and INT4 weights instead of making half precision of them.
        max_file_bytes: of each weight file, unless one tensor is larger.
        progress: is told the name of what was written, and its bytes.

    Raises:
        FileExistsError, FileNotFoundError, ValueError, OSError: before anything is written, naming what is wrong.
    """
    check_new_folder(output)
    files = find_ranks(shards)
    ranks = [Rank(file, len(files)) for file in files]
    sizes = read_sizes(ranks)
    check_copies(ranks, sizes)
    if keeps_integers and not sizes.quantization_bit:
        raise ValueError(f"{shards} holds no INT8 or INT4 weights to keep")
    config = make_config(sizes, find_settings(files[0], shards), len(ranks), keeps_integers)
    vocabulary = _find_tokenizer(tokenizer, shards, config)
    weights = split_into_files(plan(ranks, sizes, keeps_integers), max_file_bytes)
    source = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]

    unfinished = output.parent / f".{output.name}.unfinished"
    begun = json.dumps({"source": source, "files": {name: list(tensors) for name, tensors in weights.items()}})
    note = unfinished / "conversion.json"
    if note.is_file() and note.read_text() != begun:
        raise FileExistsError(f"{unfinished} is what is left of another conversion: remove it first")
    done = {name for name in weights if (unfinished / name).is_file()}
    check_space(
        output, sum(t.nbytes for name, tensors in weights.items() if name not in done for t in tensors.values())
    )
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        note.write_text(begun)
        write_weights(unfinished, weights, progress)
        config.save_pretrained(unfinished)
        ends = [config.eos_token_id, config.text_end_token_id]
        if ends := [end for end in ends if end is not None]:
            ids = {"bos_token_id": config.bos_token_id, "pad_token_id": config.pad_token_id}
            GenerationConfig(eos_token_id=ends, **ids).save_pretrained(unfinished)
        if vocabulary is not None:
            vocabulary.save_pretrained(unfinished)
        note.unlink()
        write_through(unfinished)
        check_new_folder(output)
        unfinished.replace(output)
    except Exception:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return config


def _find_tokenizer(path: Path | None, shards: Path, config: GLM130BConfig) -> GLM130BTokenizer | None:
    """The tokenizer, from whose vocabulary come the ids that the configuration does not know."""
    if path is None and not (path := shards / "ice_text.model").is_file():
        return None
    found = GLM130BTokenizer.from_pretrained(path) if path.is_dir() else GLM130BTokenizer(vocab_file=str(path))
    if len(found) > config.vocab_size:
        raise ValueError(
            f"{path} has {len(found)} tokens, and the model has embeddings for {config.vocab_size}: it is another's"
        )
    for field, token in ID_FIELDS.items():
        if getattr(config, field) is None:
            setattr(config, field, found.convert_tokens_to_ids(token))
    return found
