"""Whether the files of a checkpoint are whole, of one save, and what its configuration says. Reads only, one tensor at a time."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig

from .._compat import logging
from ..families import family_of
from .weight_files import FLOATS, INDEXES, MIXED, SHARD, Stored, read_tensors, size_of, stored_tensors

WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "adapter_model.safetensors", "adapter_model.bin")
SHA256 = re.compile(r"[0-9a-f]{64}")
BLOCK = 2**22  # bytes hashed at once
PAUSE, TIMES_LONGER = 60, 10  # seconds between two saves, and how much longer that is than within one


class Finding(NamedTuple):
    """What one check found."""

    what: str
    problems: list[str]  # each is a reason not to use the checkpoint
    notes: list[str] = []  # never changed
    hints: list[str] = []  # odd, and perhaps meant


Progress = Callable[[int], object]  # is told the bytes just read


def verify(
    folder: Path,
    config: PreTrainedConfig | None,
    sums: Mapping[str, str] | None = None,
    progress: Progress = lambda size: None,
) -> Iterator[Finding]:
    """Checks a checkpoint's folder, a finding for each check.

    Args:
        config: of the checkpoint; None for an adapter's folder, whose tensors nothing here says anything about.
        sums: SHA-256 in hexadecimal for names of files; left out, what the Hub's client noted when it downloaded.
        progress: is told what is read.
    """
    files = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
    summed = check_sums(folder, files, hub_sums(folder) if sums is None else sums, progress)
    yield summed
    is_proven = not summed.problems and not summed.hints and bool(summed.notes)
    yield from check_weights(folder, files, config, is_proven, progress)
    if config is not None:
        yield check_tokenizer(folder, config)
        yield check_generation_config(folder, config)


# --- checksums --------------------------------------------------------------------------------------------------------


def read_sums(file: Path) -> dict[str, str]:
    """File name -> SHA-256, from a file in the format of `sha256sum`.

    Raises:
        ValueError: a line is of another form, or names a file outside of the folder.
    """
    sums = {}
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text, as `sha256sum` writes it") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        digest, separator, name = line.partition(" ")
        name = name.removeprefix(" ").removeprefix("*").removeprefix("./")
        if not (SHA256.fullmatch(digest.lower()) and separator and name):
            raise ValueError(
                f"{file}, line {number}: expected a SHA-256 and a file's name, as `sha256sum` writes them"
            )
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{file}, line {number}: {name} is outside of the folder")
        sums[name] = digest.lower()
    if not sums:
        raise ValueError(f"{file} holds no checksum")
    return sums


def hub_sums(folder: Path) -> dict[str, str]:
    """What the Hub's client knows of the files that it downloaded: the name of the cache's blob, or the note beside a folder
    given by `local_dir`. SHA-256 of large files, git's SHA-1 of small ones."""
    sums = {}
    for file in folder.iterdir():
        note = folder / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
        if file.is_symlink() and file.resolve().parent.name == "blobs":
            sums[file.name] = file.resolve().name
        elif note.is_file():
            sums[file.name] = (note.read_text(encoding="utf-8").splitlines() or ["", ""])[1:2][0].strip('"')
    return {name: digest for name, digest in sums.items() if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest)}


def check_sums(folder: Path, files: list[Path], sums: Mapping[str, str], progress: Progress) -> Finding:
    """Compares files with their checksums."""
    problems, missing = [], [name for name in sums if not (folder / name).is_file()]
    problems += [f"{name} is listed and not there" for name in missing]
    for name, digest in sums.items():
        if name not in missing and _digest(folder / name, len(digest) == 40, progress) != digest:
            problems.append(f"{name} is not what its checksum says: download it again")
    if not sums:
        return Finding("checksums", problems, [], ["none known: a flipped bit of a weight would not be seen"])
    hints = [f"none for {file.name}" for file in files if file.name not in sums]
    return Finding("checksums", problems, [f"{len(sums)} files compared"], hints)


def _digest(file: Path, as_git: bool, progress: Progress) -> str:
    digest = hashlib.sha1(b"blob %d\0" % file.stat().st_size) if as_git else hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(BLOCK):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


# --- weights ----------------------------------------------------------------------------------------------------------


def check_weights(
    folder: Path, files: list[Path], config: PreTrainedConfig | None, is_proven: bool, progress: Progress
) -> Iterator[Finding]:
    """Checks the weight files: whole, of one save, of this model, and finite.

    Args:
        is_proven: their checksums were right, so that their times say nothing.
    """
    headers: dict[Path, dict[str, Stored]] = {}
    problems = [] if files else ["there are no weight files"]
    for file in files:
        try:
            headers[file] = stored_tensors(file)
        except Exception as error:  # pickles are damaged in many ways
            problems.append(f"{file.name} is damaged or truncated ({' '.join(str(error).split())[:200]})")
    count = sum(map(len, headers.values()))
    yield Finding("weight files", problems, [f"{len(files)} files, {count} tensors"])
    yield Finding("one save", check_shards(folder, headers, is_proven))
    if config is not None and headers and not problems:
        yield check_tensors(folder, config, headers)
    yield check_values(headers, progress)


def check_shards(folder: Path, headers: Mapping[Path, Mapping[str, Stored]], is_proven: bool = False) -> list[str]:
    """What shows that shards are of different saves, or that one is missing."""
    problems = []
    series: dict[tuple[str, ...], list[Path]] = {}
    for file in headers:
        if match := SHARD.fullmatch(file.name):
            series.setdefault(match.groups(), []).append(file)
    for (_, count, _), shards in series.items():
        if len(shards) != int(count.removeprefix("of-")):
            problems.append(f"{len(shards)} shards are there {count}: {', '.join(file.name for file in shards)}")
    for path in sorted(folder.glob(INDEXES)):
        try:
            index = json.loads(path.read_bytes())
            named = set(index["weight_map"].values())
            sizes = index.get("metadata", {}).get("total_size")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            problems.append(f"{path.name} is damaged ({error})")
            continue
        if lost := sorted(name for name in named if not (folder / name).is_file()):
            problems.append(f"{path.name} names {', '.join(lost)}, which is not there")
            continue
        shards = [file for file in headers if file.name in named]
        size = sum(size_of(tensor) for file in shards for tensor in headers[file].values())
        if isinstance(sizes, int) and len(shards) == len(named) and size != sizes:
            problems.append(f"{path.name} speaks of {sizes:,} bytes, and the shards hold {size:,}. {MIXED}")
        if not is_proven and (newer := _written_over(path, shards)):
            problems.append(
                f"{', '.join(newer)} was written long after {path.name}, other shards before it: an interrupted save leaves "
                "such a mixture, an interrupted download too. Checksums (--checksums) can tell."
            )
    formats = {frozenset((_metadata(file) or {}).items()) for file in headers if file.suffix == ".safetensors"}
    if len(formats) > 1:
        problems.append(f"the headers of the shards differ. {MIXED}")
    return problems


def _written_over(index: Path, shards: list[Path]) -> list[str]:
    """The shards that a later save wrote: an index comes last in a save, and the times within one lie close together."""
    written = index.stat().st_mtime
    before = sorted(time for file in shards if (time := file.stat().st_mtime) <= written)
    after = sorted((file.stat().st_mtime, file.name) for file in shards if file.stat().st_mtime > written)
    if not before or not after:
        return []
    within = max(written - before[0], after[-1][0] - after[0][0])
    pause = after[0][0] - written
    return [name for _, name in after] if pause > PAUSE and pause > TIMES_LONGER * within else []


def _metadata(file: Path) -> dict[str, str] | None:
    with safe_open(file, framework="pt") as weights:
        return weights.metadata()


def check_tensors(folder: Path, config: PreTrainedConfig, headers: Mapping[Path, Mapping[str, Stored]]) -> Finding:
    """Loads the model without memory, with all of `from_pretrained`'s own checks."""
    method = getattr(quantization := getattr(config, "quantization_config", None), "quant_method", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else method
    if method not in (None, "chatglm"):
        return Finding("tensors", [], [f"not compared: {method} alone knows what belongs there"])
    family = family_of(config)
    named = {model_class.__name__: model_class for model_class in family.models.values()}
    model_class = next((named[name] for name in config.architectures or () if name in named), None)
    model_class = model_class or family.models[family.generates_with]
    if model_class is family.models["AutoModel"]:  # the originals name their backbone, and hold the head too
        model_class = family.models[family.generates_with]
    verbosity = logging.get_verbosity()
    shows_progress = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        _, found = model_class.from_pretrained(
            folder, device_map="meta", dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        return Finding("tensors", [" ".join(str(error).split())])
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()
    problems = [f"missing: {name}" for name in sorted(found["missing_keys"])]
    problems += [f"unexpected: {name}" for name in sorted(found["unexpected_keys"])]
    problems += [
        f"{name} has the shape {tuple(stored)} and config.json asks for {tuple(wanted)}"
        for name, stored, wanted in sorted(found["mismatched_keys"])
    ]
    floats = Counter(t.dtype for stored in headers.values() for t in stored.values() if t.kind == FLOATS)
    said = getattr(config, "dtype", None)
    hints = []
    if said is not None and not any(_same_dtype(name, said) for name in floats):
        hints.append(f"stored in {', '.join(floats)}, and config.json says {str(said).removeprefix('torch.')}")
    return Finding("tensors", problems, [f"{model_class.__name__}, {', '.join(floats)}"], hints)


def _same_dtype(stored: str, dtype: torch.dtype) -> bool:
    name = str(dtype).removeprefix("torch.")
    return stored in (name, name.replace("bfloat", "BF").replace("float", "F"))


def check_values(headers: Mapping[Path, Mapping[str, Stored]], progress: Progress) -> Finding:
    """Looks for NaN and infinite values, and for matrices of zeros, which unfinished downloads leave."""
    problems, hints = [], []
    for file, stored in headers.items():
        for name, tensor in read_tensors(file, stored):
            progress(tensor.nbytes)
            if not tensor.numel() or not tensor.is_floating_point():
                continue
            low, high = (tensor if tensor.element_size() > 1 else tensor.float()).aminmax()
            if not (low.isfinite() and high.isfinite()):
                problems.append(f"{name} holds NaN or infinite values ({file.name})")
            elif tensor.ndim > 1 and low == high == 0 and "lora_" not in name:
                hints.append(f"{name} holds nothing but zeros ({file.name})")
    return Finding("values", problems, ["finite"] if not problems else [], hints)


# --- tokenizer and generation -----------------------------------------------------------------------------------------


def check_tokenizer(folder: Path, config: PreTrainedConfig) -> Finding:
    """Loads the tokenizer, with its own checks of the files against each other, and compares its two vocabularies."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, ImportError) as error:
        return Finding("tokenizer", [" ".join(str(error).split())])
    problems = []
    vocabulary = folder / getattr(tokenizer, "vocab_files_names", {}).get("vocab_file", "")
    if (folder / "tokenizer.json").is_file() and vocabulary.is_file():
        names = ("generation", "num_image_tokens")
        settings = {name: value for name in names if (value := getattr(tokenizer, name, None)) is not None}
        original = type(tokenizer)(vocab_file=str(vocabulary), **settings)
        vocabularies = (t.backend_tokenizer.get_vocab(with_added_tokens=False) for t in (original, tokenizer))
        if next(vocabularies) != next(vocabularies):
            problems.append(f"tokenizer.json and {vocabulary.name} are different vocabularies")
    if len(tokenizer) > config.vocab_size:
        problems.append(f"{len(tokenizer)} tokens, and the model has embeddings for {config.vocab_size}")
    return Finding("tokenizer", problems, [f"{type(tokenizer).__name__}, {len(tokenizer)} tokens"])


def check_generation_config(folder: Path, config: PreTrainedConfig) -> Finding:
    """Whether generation_config.json, which may be missing, can be read and names tokens that there are."""
    if not (folder / "generation_config.json").is_file():
        return Finding("generation config", [], ["none"])
    try:
        values: dict[str, Any] = GenerationConfig.from_pretrained(folder).to_dict()
    except (ValueError, OSError, TypeError) as error:
        return Finding("generation config", [" ".join(str(error).split())])
    ids = {name: value for name, value in values.items() if name.endswith("_token_id") and value is not None}
    foreign = {
        name: value
        for name, value in ids.items()
        if not all(0 <= index < config.vocab_size for index in (value if isinstance(value, list) else [value]))
    }
    return Finding(
        "generation config", [f"{name} is {value}, and there is no such token" for name, value in foreign.items()]
    )
