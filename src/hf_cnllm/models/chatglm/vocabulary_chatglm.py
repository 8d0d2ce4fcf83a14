"""The vocabulary files of ChatGLM: which version one belongs to, and the Rust tokenizer made of it.

| version         | file              | model                     | ids                                             |
|-----------------|-------------------|---------------------------|-------------------------------------------------|
| `chatglm_early` | `ice_text.model`  | Unigram, white space kept | 20,000 images, 130,000 pieces, controls, bytes  |
| `chatglm`       | `ice_text.model`  | the same                  | 130,344 pieces, controls and bytes among them   |
| `chatglm2`      | `tokenizer.model` | BPE                       | 64,789 pieces, `[MASK] [gMASK] [sMASK] sop eop` |
| `chatglm3`      | `tokenizer.model` | the same                  | those of ChatGLM2, four roles                   |

`chatglm_early` is ChatGLM-6B as of March 2023, whose model has 150,528 ids. The files of ChatGLM2 and ChatGLM3 are the
same, byte for byte: what tells them apart stands beside the file (`recognize_version`).
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from ...tokenization.folder import Folder
from ...tokenization.regex import any_of
from ...tokenization.sentencepiece import ModelType, PieceType, SentencePieceModel, build_decoder, build_tokenizer

ICE_TEXT, TOKENIZER_MODEL = "ice_text.model", "tokenizer.model"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
IMAGE_TOKENS = 20_000
MAX_BLANK_LENGTH = 80

# What ChatGLM-6B writes for white space, in the order in which text is searched for it: longer runs of spaces first.
WHITE_SPACE = {"\n": "<n>", "\t": "<|tab|>"} | {" " * n: f"<|blank_{n}|>" for n in range(MAX_BLANK_LENGTH, 1, -1)}
SPACE_SYMBOLS = ("<|tab|>", *(f"<|blank_{n}|>" for n in range(2, MAX_BLANK_LENGTH + 1)))  # in the order of their ids
SPACES = re.compile(rf" {{2,{MAX_BLANK_LENGTH}}}")  # the longest that there is in WHITE_SPACE


class ChatGLMVersion(NamedTuple):
    """What a version's vocabulary and tokenizer are like.

    Attributes:
        vocab_file: name of the vocabulary file in a checkpoint.
        control: control tokens behind the pieces of the file, unless the file has them among its pieces.
        special_tokens: the named special tokens.
        template: name of the chat template.
        single, pair: where the special tokens go, as templates of `tokenizers.processors.TemplateProcessing`.
        input_names: what the model takes.
        shows_control: whether decoding shows the control tokens; else they have no text.
        keeps_unknown: whether decoding shows the unknown token in spite of `skip_special_tokens`.
        cleans_up: default of `clean_up_tokenization_spaces`.
    """

    vocab_file: str
    control: tuple[str, ...]
    special_tokens: dict[str, str]
    template: str
    single: str
    pair: str
    input_names: tuple[str, ...] = ("input_ids", "attention_mask", "position_ids")
    shows_control: bool = False
    keeps_unknown: bool = False
    cleans_up: bool = False

    @property
    def is_ice(self) -> bool:
        """Whether it is ChatGLM-6B, with Unigram over `ice_text.model`; else the vocabulary is BPE."""
        return self.vocab_file == ICE_TEXT

    @property
    def ending(self) -> str:
        """The special tokens behind a text."""
        return self.single.partition("$A")[2].strip()


_CHATGLM = ChatGLMVersion(
    vocab_file=ICE_TEXT,
    control=("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"),
    special_tokens={
        **{"bos_token": "<sop>", "eos_token": "<eop>", "mask_token": "[MASK]"},
        **{"unk_token": "<unk>", "pad_token": "<pad>"},
    },
    template="chatglm",
    single="$A [gMASK] <sop>",
    pair="$A [gMASK] <sop> $B <eop>",
    cleans_up=True,
)
_CHATGLM2 = ChatGLMVersion(
    vocab_file=TOKENIZER_MODEL,
    control=("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
    special_tokens={"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"},
    template="chatglm2",
    single="[gMASK] sop $A",
    pair="[gMASK] sop $A $B </s>",
)
VERSIONS = {
    "chatglm_early": _CHATGLM._replace(
        special_tokens=_CHATGLM.special_tokens | {"eos_token": "</s>"},
        pair="$A $B [gMASK] <sop>",
        input_names=("input_ids", "attention_mask"),  # the original gave no mask, so that padding was read as text
        keeps_unknown=True,
        cleans_up=False,
    ),
    "chatglm": _CHATGLM,
    "chatglm2": _CHATGLM2,
    "chatglm3": _CHATGLM2._replace(control=_CHATGLM2.control + ROLES, template="chatglm3", shows_control=True),
}


def without_control_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer's settings without their names for control tokens, which are no special tokens: making them so would change
    what may stand in text."""
    settings = {**(settings.get("model_specific_special_tokens") or {}), **settings}
    others = ("model_specific_special_tokens", "gmask_token", "end_token", "eop_token")
    return {name: value for name, value in settings.items() if name not in others}


# ---- which version ----


def recognize_version(
    model: SentencePieceModel, vocab_file: str, generation: str | None, settings: Mapping[str, Any]
) -> str:
    """The version that a vocabulary file is of.

    Unigram is ChatGLM-6B; the early revision's file lacks `[gMASK]`. For the BPE file what stands beside it decides:
    ChatGLM3's role tokens (or its `encode_special_tokens`) in `settings` or the configuration files; the same in the
    original's code file, if it is there (it is read, not run), which without them is ChatGLM2's; `chatglm2` or `chatglm3`
    in a name, that of the tokenizer's configuration, the model's, or the one that it is loaded by.

    Args:
        generation: the version that the caller or a saved configuration gives; must agree with the file.
        settings: the tokenizer's other arguments.

    Raises:
        ValueError: the file is of another family or version, or nothing tells ChatGLM2 from ChatGLM3.
    """
    if generation is not None and generation not in VERSIONS:
        raise ValueError(f"generation is {generation!r}, but must be one of {', '.join(VERSIONS)}.")
    found = _versions_of(model)
    if not found:
        raise ValueError(f"{vocab_file} is not a vocabulary of ChatGLM: it has other pieces or rules.")
    owners, right_name, name = " and ".join(found), VERSIONS[found[0]].vocab_file, Path(vocab_file).name
    if generation is not None and generation not in found:
        raise ValueError(f"generation is {generation!r}, but {vocab_file} is the vocabulary of {owners}.")
    if name in (ICE_TEXT, TOKENIZER_MODEL) and name != right_name:
        raise ValueError(f"{vocab_file} holds the vocabulary of {owners}, whose name is {right_name}.")
    if right_name == TOKENIZER_MODEL and "num_image_tokens" in Folder(vocab_file).read("tokenizer_config.json"):
        raise ValueError(
            f"{vocab_file} is the vocabulary of {owners}, but tokenizer_config.json beside it is that of ChatGLM-6B "
            f"(num_image_tokens), whose vocabulary is {ICE_TEXT}."
        )
    if generation is not None or len(found) == 1:
        return generation or found[0]
    if version := version_beside(vocab_file, settings):
        return version
    raise ValueError(
        f"{vocab_file} is the vocabulary of both ChatGLM2 and ChatGLM3, and nothing beside it says which one this is. "
        "Pass generation='chatglm2' or generation='chatglm3', or put it into tokenizer_config.json."
    )


def version_beside(vocab_file: str | os.PathLike | None, settings: Mapping[str, Any]) -> str | None:
    """Whether ChatGLM2's and ChatGLM3's file, which need not be there, is of the one or the other, by what stands beside it and
    by the `name_or_path` among the `settings`; None if nothing says it.

    Raises:
        ValueError: the files beside it say different things.
    """
    folder = Folder(vocab_file)
    names = ("tokenizer_config.json", "config.json", "special_tokens_map.json")
    tokenizer_config, config, _ = recorded = [folder.read(name) for name in names]
    known = json.dumps([recorded, settings], default=str, ensure_ascii=False)
    if "encode_special_tokens" in known or any(role in known for role in ROLES):
        return "chatglm3"
    said: dict[str, str] = {}  # where -> which
    code = folder.path and folder.path / "tokenization_chatglm.py"
    if code and code.is_file():
        text = code.read_text(encoding="utf-8", errors="replace")
        if "[MASK]" in text or ROLES[1] in text:
            said[code.name] = "chatglm3" if ROLES[1] in text else "chatglm2"
    for where, name in (
        ("tokenizer_config.json", tokenizer_config.get("name_or_path")),
        ("config.json", config.get("_name_or_path")),
    ):
        if version := _version_in(name):
            said[where] = version
    if len(set(said.values())) > 1:
        claims = ", ".join(f"{where} {version}" for where, version in said.items())
        raise ValueError(
            f"{vocab_file} is the vocabulary of both ChatGLM2 and ChatGLM3, and the files beside it say different things "
            f"({claims}). Pass generation='chatglm2' or generation='chatglm3', or download the files of one of them again."
        )
    return next(iter(said.values()), _version_in(settings.get("name_or_path")))


def _version_in(name: Any) -> str | None:
    """By the last of such names in a path: folders in front are named after anything."""
    numbers = re.findall(r"(?:chatglm|codegeex)-?([23])", str(name).lower())
    return f"chatglm{numbers[-1]}" if numbers else None


def _versions_of(model: SentencePieceModel) -> tuple[str, ...]:
    if model.model_type is ModelType.UNIGRAM:
        if "<n>" not in model.symbols:
            return ()
        return ("chatglm",) if "[gMASK]" in model.ids else ("chatglm_early",)
    is_plain = not model.charsmap and not model.symbols and model.byte_fallback and model.add_dummy_prefix
    return ("chatglm2", "chatglm3") if is_plain else ()


# ---- ChatGLM2 and ChatGLM3 ----


def build_bpe_backend(model: SentencePieceModel, version: ChatGLMVersion) -> Tokenizer:
    """No merge leads to the control tokens, so no text becomes one."""
    model = model.with_pieces(version.control, PieceType.CONTROL)
    backend = build_tokenizer(model)
    silent = {*model.of_type(PieceType.CONTROL), model.unknown}
    if version.shows_control:
        silent -= set(version.control)
    backend.decoder = build_decoder(model, any_of(sorted(silent)))
    return backend


# ---- ChatGLM-6B ----

# Stand-ins inside the backend: code points that are not assigned, and that no grapheme cluster spans. The symbols for
# white space wear the brackets while the text is normalized, so that nothing in the text can be taken for one.
_OPEN, _CLOSE, _BREAK = STAND_INS = tuple(map(chr, range(0xE0F00, 0xE0F03)))


def with_ice_pieces(model: SentencePieceModel, num_image_tokens: int) -> SentencePieceModel:
    """The file's model with what the original's code adds to it."""
    if "[gMASK]" not in model.ids:  # the early revision's code adds what the later file has
        model = model.with_pieces(VERSIONS["chatglm_early"].control, PieceType.CONTROL)
        model = model.with_pieces(SPACE_SYMBOLS, PieceType.USER_DEFINED)
        model = model.with_pieces([f"<0x{byte:02X}>" for byte in range(256)], PieceType.BYTE)
        model = replace(model, byte_fallback=True)
    return with_images(model, num_image_tokens)


def with_images(model: SentencePieceModel, count: int) -> SentencePieceModel:
    """The model behind ids of images, which no text is encoded to."""
    return model.with_pieces([f"<image_{i}>" for i in range(count)], PieceType.CONTROL, in_front=True)


def write_white_space(text: str) -> str:
    """The text with line breaks, tabs and runs of spaces as the symbols for them."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    return SPACES.sub(lambda run: WHITE_SPACE[run[0]], text) if "  " in text else text


def build_ice_backend(model: SentencePieceModel, do_lower_case: bool = False, remove_space: bool = False) -> Tokenizer:
    """Unigram over text whose white space is written as symbols, as SentencePiece would drop it otherwise."""
    backend = build_tokenizer(model)
    squeezed = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()] if remove_space else []
    lowered = [normalizers.Lowercase()] if do_lower_case else []
    marks = [normalizers.Replace(space, f"{_OPEN}{name[1:-1]}{_CLOSE}") for space, name in WHITE_SPACE.items()]
    brackets = [normalizers.Replace(_OPEN, "<"), normalizers.Replace(_CLOSE, ">")]
    backend.normalizer = normalizers.Sequence([*squeezed, *lowered, *marks, backend.normalizer, *brackets])
    backend.decoder = build_decoder(
        model,
        silent=any_of(model.of_type(PieceType.CONTROL)) + r"|<image_\d+>",
        texts={model.unknown: " ⁇ "} | {symbol: space for space, symbol in WHITE_SPACE.items()},
    )
    return backend


def symbols_as_text(backend: Tokenizer, rules: Any) -> normalizers.Normalizer:
    """Makes ChatGLM-6B's `backend` take the names of the white-space symbols, `<n>` say, for text, together with the normalizer that
    it returns in place of `rules`."""
    steps = list(rules)
    # Where text still tells its own brackets from those of the symbols: break every name, and cut there afterwards.
    names = any_of([symbol[1:] for symbol in WHITE_SPACE.values()])
    steps[-2:-2] = [normalizers.Replace(Regex(f"(?<=<)(?={names})"), _BREAK)]
    others = [] if backend.pre_tokenizer is None else [backend.pre_tokenizer]
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(_BREAK, "removed"), *others])
    return normalizers.Sequence(steps)
