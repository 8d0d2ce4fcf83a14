"""Damaged tokenizer folders: they give the right ids, say what is wrong, or do not load."""

import shutil
from collections.abc import Callable, Iterable
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from goldens import GOLDENS
from hf_cnllm import FAMILIES
from robustness.folders import (
    DROPPED,
    Damage,
    cuts,
    flips,
    fresh,
    link,
    overwrite,
    read_json,
    remove,
    replace,
    set_key,
    write_json,
)
from robustness.tally import sample, sample_or_whole
from tokenizer_goldens import FIXTURES

Case = tuple[str, Damage, str | None]  # what was done, how, and why a wrong answer could not be known

PART = "tokenizer folders"
VOCABULARIES = {
    "baichuan1_small": "tokenizer.model",
    "baichuan2_small": "tokenizer.model",
    "chatglm1_small": "ice_text.model",
    "chatglm2_small": "tokenizer.model",
    "chatglm3_small": "tokenizer.model",
    "glm_chinese_small": "cog-pretrain.model",
    "glm_gpt2_small": "vocab.json",
    "glm_bert_small": "vocab.txt",
    "glm_roberta_small": "vocab.json",
    "qwen_small": "qwen.tiktoken",
}
every_vocabulary = pytest.mark.parametrize("name", VOCABULARIES)
# The configuration that lies beside the tokenizer in a checkpoint; `vocab_size` is set to that of the tokenizer.
MODEL_OF = {
    "baichuan1_small": "baichuan_13b",
    "baichuan2_small": "baichuan2_13b",
    "chatglm1_small": "chatglm_6b_3layer",
    "chatglm2_small": "chatglm2_6b",
    "chatglm3_small": "chatglm3_6b",
    "glm_chinese_small": "glm",
    "glm_gpt2_small": "glm",
    "glm_bert_small": "glm",
    "glm_roberta_small": "glm",
    "qwen_small": "qwen",
}
TEXTS = (
    "Hello world! The quick brown fox, 1234567890 times.",
    "你好，世界。温故而知新，可以为师矣！",
    "  two  spaces\tand a tab\nand a line\n\n",
    "naïve café — “quotes” … 😀 한국어 русский",
    "def f(x):\n    return x ** 2  # 注释",
    "the of and to in is that it was for on with as his be at by",
)

# What no reader can know.
OTHER_PIECES = "a vocabulary of the right kind with other pieces or scores: it has no checksum"
OWN_PAIR = "a model of a size of its own may have either of Baichuan's vocabularies"
FEWER_PIECES = "a whole vocabulary with fewer pieces, and no file beside it that gives the id of a token behind them"
NO_FAMILY = "neither tokenizer_config.json nor config.json: nothing in the folder names a family"
OTHER_CLASS = "tokenizer_class names a class of transformers' own: nothing of this package is asked"
LEGAL_VALUE = "another legal value of an option, or its default: nothing in the folder contradicts it"
# Where no control token's id that a file gives stands behind the pieces.
ENDS_UNKNOWN = {
    (name, layout) for name in ("baichuan1_small", "baichuan2_small") for layout in ("hub", "listed", "saved")
}
ENDS_UNKNOWN |= {("chatglm2_small", "hub"), ("chatglm3_small", "hub")}
SWITCHES = {
    *("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces", "split_special_tokens", "add_prefix_space"),
    *("do_lower_case", "strip_accents", "tokenize_chinese_chars", "remove_space", "first_revision", "errors"),
    *("model_max_length", "padding_side", "truncation_side", "extra_special_tokens", "additional_special_tokens"),
}


def answers(folder: Path, **options: Any) -> list[Any]:
    """Ids and decoded texts, and the control ids, of whatever AutoTokenizer makes of a folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    return [
        ids,
        [tokenizer.decode(row) for row in ids],
        len(tokenizer),
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    ]


@cache
def truth(name: str) -> list[Any]:
    return answers(FIXTURES / "vocab" / name)


def hub_layout(name: str, folder: Path) -> Path:
    """The tokenizer's original files and the configuration beside them, which says how many ids there are."""
    shutil.copytree(FIXTURES / "vocab" / name, folder)
    return _with_model_files(name, folder)


def saved_layout(name: str, folder: Path) -> Path:
    """As `save_pretrained` writes it: `tokenizer.json` and the original vocabulary, `added_tokens_decoder` listed."""
    AutoTokenizer.from_pretrained(FIXTURES / "vocab" / name).save_pretrained(folder)
    return _with_model_files(name, folder)


def listed_layout(name: str, folder: Path) -> Path:
    """The original vocabulary alone, and a `tokenizer_config.json` that lists `added_tokens_decoder`."""
    saved_layout(name, folder)
    (folder / "tokenizer.json").unlink()
    return folder


LAYOUTS = {"hub": hub_layout, "saved": saved_layout, "listed": listed_layout}


MASKS = {"mask": "MASK", "gmask": "gMASK"}


def _with_model_files(name: str, folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "vocab" / name)
    config = read_json(GOLDENS / MODEL_OF[name] / "config.json")
    config["padded_vocab_size" if "padded_vocab_size" in config else "vocab_size"] = len(tokenizer)
    names = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    names |= {f"{key}_token_id": tokenizer.convert_tokens_to_ids(f"[{text}]") for key, text in MASKS.items()}
    config |= {key: names[key] for key in names if key in config or key == "eos_token_id"}
    write_json(folder / "config.json", config)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The folder of a vocabulary in a layout, written once."""
    return cache(lambda name, layout: LAYOUTS[layout](name, tmp_path_factory.mktemp(name) / layout))


@pytest.fixture
def sweep(tally, tmp_path, sources):
    def run(name: str, row: str, cases_of: Callable[[Path], Iterable[Case]], count: int, whole: bool) -> None:
        """Judges `count` of the cases of every layout, or all, on copies of its folder."""
        tally.part, tally.name = PART, row
        layouts = [layout for layout in LAYOUTS if (sources(name, layout) / VOCABULARIES[name]).exists()]
        cases = [(layout, *case) for layout in layouts for case in cases_of(sources(name, layout))]
        for layout in layouts:
            assert tally.undamaged(lambda: answers(sources(name, layout))) == truth(name)  # noqa: B023
        for layout, case, damage, unknowable in sample(cases, count, whole):
            folder = fresh(sources(name, layout), tmp_path / "damaged")
            damage(folder)
            tally.judge(
                f"{name} ({layout} layout), {case}",
                lambda: answers(folder),  # noqa: B023
                lambda found: found == truth(name),
                unknowable,
            )
        tally.check()

    return run


# --- vocabularies -----------------------------------------------------------------------------------------------------


@sample_or_whole
@every_vocabulary
def test_cut_files(name, whole, sweep):
    def cases(source):
        return [(case, damage, None) for file in sorted(source.iterdir()) for case, damage in cuts(file)]

    sweep(name, "cut files", cases, 8, whole)


@sample_or_whole
@every_vocabulary
def test_missing_files(name, whole, sweep):
    def cases(source):
        files = names_in(source)
        yield from ((f"{file} missing", remove(file), None) for file in files)
        for one, other in combinations(files, 2):
            nameless = {one, other} == {"config.json", "tokenizer_config.json"}
            yield f"{one} and {other} missing", both(remove(one), remove(other)), NO_FAMILY if nameless else None

    sweep(name, "missing files", cases, 8, whole)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def both(first: Damage, second: Damage) -> Damage:
    def damage(folder: Path) -> None:
        first(folder)
        second(folder)

    return damage


@sample_or_whole
@every_vocabulary
def test_foreign_files(name, whole, sweep, sources):
    """Each file from another family or generation, under the name that this one has."""

    def cases(source):
        for other, vocabulary in VOCABULARIES.items():
            if other == name or {other, name} == {"chatglm2_small", "chatglm3_small"}:  # the same vocabulary
                continue
            folder = sources(other, source.name)
            folder = folder if (folder / vocabulary).exists() else sources(other, "hub")
            yield f"the vocabulary of {other}", replace(VOCABULARIES[name], folder / vocabulary), None
            for file in names_in(source):
                if file not in (VOCABULARIES[name], "config.json") and (folder / file).exists():
                    own = file == "tokenizer.json" and {other, name} == {"baichuan1_small", "baichuan2_small"}
                    yield f"{file} of {other}", replace(file, folder / file), OWN_PAIR if own else None

    sweep(name, "files of another tokenizer", cases, 10, whole)


@sample_or_whole
@every_vocabulary
def test_flipped_bits(name, whole, sweep):
    def cases(source):
        for file in (VOCABULARIES[name], "tokenizer.json", "merges.txt"):
            if (source / file).exists():
                yield from ((case, damage, OTHER_PIECES) for case, damage in flips(source / file, 30))

    sweep(name, "flipped bits of vocabularies", cases, 8, whole)


@sample_or_whole
@every_vocabulary
def test_other_contents(name, whole, sweep):
    contents = (b"", b"{}", b"[]", b"null", b"\n", b"\x00" * 4096, b"\xff" * 4096, b"text\n" * 100, b"[CLS]\n[UNK]\n")

    def cases(source):
        for file, content in product(names_in(source), contents):
            yield f"{file} is {content[:8]!r}… of {len(content)} bytes", overwrite(file, content), None

    sweep(name, "other contents", cases, 8, whole)


@sample_or_whole
@every_vocabulary
def test_shortened_vocabularies(name, whole, sweep):
    """Vocabularies that are whole files with entries missing: the end, the middle, every second, two swapped, one twice."""
    file = VOCABULARIES[name]
    changes = {
        "without its last entry": lambda entries: entries[:-1],
        "without its last ten entries": lambda entries: entries[:-10],
        "its first half": lambda entries: entries[: len(entries) // 2],
        "without its first entry": lambda entries: entries[1:],
        "without one in the middle": lambda entries: entries[: len(entries) // 2] + entries[len(entries) // 2 + 1 :],
        "its last entry twice": lambda entries: [*entries, entries[-1]],
        "every second entry": lambda entries: entries[::2],
        "nothing": lambda entries: [],
    }

    def cases(source):
        for what, change in changes.items():
            fewer = FEWER_PIECES if (name, source.name) in ENDS_UNKNOWN and what != "its last entry twice" else None
            yield f"{file} {what}", _change_entries(file, change), fewer

    sweep(name, "vocabularies with entries missing", cases, 6, whole)


def _change_entries(file: str, change) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / file
        if path.suffix == ".model":
            from sentencepiece import sentencepiece_model_pb2

            model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
            pieces = change(list(model.pieces))
            kept = [sentencepiece_model_pb2.ModelProto.SentencePiece.FromString(p.SerializeToString()) for p in pieces]
            del model.pieces[:]
            model.pieces.extend(kept)
            path.write_bytes(model.SerializeToString())
        elif path.suffix == ".json":
            write_json(path, dict(change(list(read_json(path).items()))))
        else:
            path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))

    return damage


# --- tokenizer_config.json and what stands beside -----------------------------------------------------------------------


@sample_or_whole
@every_vocabulary
def test_keys_of_json_files(name, whole, sweep):
    values = (DROPPED, None, "nonsense", 3, -1, [], {}, True, float("nan"))

    def cases(source):
        for file in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
            keys = read_json(source / file) if (source / file).exists() else ()
            for key, value in product(keys, values):
                shown = "dropped" if value is DROPPED else f"= {value!r}"
                legal = value in (DROPPED, None, True) if key in SWITCHES else value in (DROPPED, None)
                legal = legal and key not in ("tokenizer_class", "generation")
                yield f"{file}: {key} {shown}", set_key(file, key, value), LEGAL_VALUE if legal else None

    sweep(name, "keys of tokenizer_config.json and others", cases, 10, whole)


OUR_CLASSES = tuple(tokenizer.__name__ for family in FAMILIES for tokenizer in family.tokenizers)
TRANSFORMERS_CLASSES = (
    *("PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizer", "BertTokenizer", "GPT2Tokenizer"),
    *("RobertaTokenizer", "Qwen2Tokenizer"),
)


@sample_or_whole
@every_vocabulary
def test_other_tokenizer_classes(name, whole, sweep):
    """A class of another family, transformers' generic ones, or none, with and without the configuration beside."""
    classes = (*OUR_CLASSES, *TRANSFORMERS_CLASSES, "NoSuchTokenizer", DROPPED, None, "")
    cases: list[tuple] = []
    for value in classes:
        damage = set_key("tokenizer_config.json", "tokenizer_class", value)
        shown = "none" if value is DROPPED else repr(value)
        other = OTHER_CLASS if value in TRANSFORMERS_CLASSES else None
        cases.append((f"tokenizer_class {shown}", damage, other))
        nameless = NO_FAMILY if value in (DROPPED, None, "", "NoSuchTokenizer") else other
        cases.append((f"tokenizer_class {shown}, no config.json", both(damage, remove("config.json")), nameless))
        bare = both(damage, set_key("tokenizer_config.json", "auto_map", DROPPED))
        cases.append((f"tokenizer_class {shown}, no auto_map", bare, other))
    cases.append(("no tokenizer_config.json", remove("tokenizer_config.json"), None))
    sweep(name, "tokenizer_class", lambda source: cases, 8, whole)


@sample_or_whole
@every_vocabulary
def test_links(name, whole, sweep):
    other = next(n for n, file in VOCABULARIES.items() if n != name and file != VOCABULARIES[name])

    def cases(source):
        for file in names_in(source):
            yield f"{file} links to the right file elsewhere", link(file, source / file), None
            yield f"{file} links to another's", link(file, FIXTURES / "vocab" / other / VOCABULARIES[other]), None
            yield f"{file} links to nothing", link(file, Path("nothing")), None
            yield f"{file} links to a folder", link(file, source), None

    sweep(name, "links", cases, 6, whole)


@sample_or_whole
@every_vocabulary
def test_paths_in_tokenizer_config(name, whole, sweep, sources):
    """A configuration that names files of other folders is not followed."""
    other = next(n for n, file in VOCABULARIES.items() if n != name)
    elsewhere = str(FIXTURES / "vocab" / other / VOCABULARIES[other])
    saved = sources(other, "saved") / "tokenizer.json"
    keys = ("vocab_file", "merges_file", "tokenizer_file", "extra_vocab_file", "tokenizer_object", "sp_model_kwargs")
    cases = [
        (f"{key} = {value!r}", set_key("tokenizer_config.json", key, value), None)
        for key in keys
        for value in (elsewhere, str(saved), "../../elsewhere", {"model_file": elsewhere})
    ]
    sweep(name, "paths in tokenizer_config.json", lambda source: cases, 6, whole)
