"""SentencePiece models (BPE and Unigram) as Rust `tokenizers.Tokenizer` objects with the original's exact ids.

    model = SentencePieceModel.from_file("tokenizer.model")
    backend = build_tokenizer(model)      # no special tokens yet: the transformers class adds its own

How each part of SentencePiece (https://github.com/google/sentencepiece) is expressed:

| SentencePiece                                    | here                                                       |
|--------------------------------------------------|------------------------------------------------------------|
| normalizer (compiled rules, spaces, `▁` prefix)  | `build_normalizer`, rules in `charsmap`                    |
| BPE: merge the neighbors whose union has the    | merges = every split of each normal piece, best score      |
| best score, whatever they were made of           | first                                                      |
| BPE: user-defined symbols leave before any merge | a `Split` isolates them, `ignore_merges` looks them up     |
| Unigram: a symbol always wins                    | its score is `length * best - 0.1`, as in the original     |
| control and byte pieces never match text         | BPE: no merges lead there; Unigram: scores too low to win  |
| byte fallback                                    | the models' own `byte_fallback`                            |

Texts are cut beforehand where no piece can stand, so that no queue of merges and no lattice is as long as a whole text:
`_cut_between_words` says why no id depends on it.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from .charsmap import CharsMap, read_charsmap
from .regex import any_of

SPACE = "▁"  # SentencePiece's visible space, U+2581
WORDS = Regex(f"{SPACE}+"), "merged_with_next"  # arguments of a split
_MARK = "\U000e0ffe"  # in front of pieces that await their text; not assigned in Unicode


# The fields `type` of a piece and `model_type` of the trainer in `sentencepiece_model.proto`.
PieceType = IntEnum("PieceType", "NORMAL UNKNOWN CONTROL USER_DEFINED UNUSED BYTE")
ModelType = IntEnum("ModelType", "UNIGRAM BPE WORD CHAR")


@dataclass(frozen=True)
class SentencePieceModel:
    """What a `.model` file says: piece `i` is `texts[i]` with `scores[i]` and `types[i]`; identity has no `charsmap`.
    `data` is the `ModelProto` that says it to the library."""

    texts: list[str]
    scores: list[float]
    types: list[int]
    model_type: ModelType
    byte_fallback: bool
    charsmap: CharsMap | None
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    data: bytes = dataclasses.field(repr=False)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "SentencePieceModel":
        """Reads `path`. Raises FileNotFoundError, or ValueError naming what is wrong with the file."""
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: there is no such SentencePiece vocabulary file.")
        return cls.from_bytes(Path(path).read_bytes(), path)

    @classmethod
    def from_bytes(cls, data: bytes, path: str | os.PathLike) -> "SentencePieceModel":
        """Reads the content of the file `path`. Raises ValueError naming what is wrong with it."""
        from google.protobuf.message import DecodeError
        from sentencepiece.sentencepiece_model_pb2 import ModelProto

        if data.startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a git-lfs pointer, not the vocabulary itself. Run `git lfs pull` there.")
        try:
            proto = ModelProto.FromString(data)
            is_other_model = proto.trainer_spec.model_type not in (ModelType.BPE, ModelType.UNIGRAM)
            features = {
                "model_type other than BPE and Unigram": is_other_model,
                "treat_whitespace_as_suffix": proto.trainer_spec.treat_whitespace_as_suffix,
                "escape_whitespaces = false": not proto.normalizer_spec.escape_whitespaces,
                "a denormalizer": proto.denormalizer_spec.precompiled_charsmap,
                "unused pieces": any(piece.type == PieceType.UNUSED for piece in proto.pieces),
            }
            if not any(features.values()):
                return cls.from_proto(proto)
        except (DecodeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a SentencePiece model, or is damaged ({error}). Download the file again."
            ) from error
        unsupported = next(feature for feature, is_used in features.items() if is_used)
        raise ValueError(f"{path}: SentencePiece models with {unsupported} are not supported.")

    @classmethod
    def from_proto(cls, proto: Any) -> "SentencePieceModel":
        """Reads a `ModelProto`. Raises ValueError naming what is missing or damaged."""
        # A file cut between two fields still parses, so look for the fields that every writer puts at its end.
        for field in ("trainer_spec", "normalizer_spec"):
            if not proto.HasField(field):
                raise ValueError(f"{proto.ByteSize()} bytes without `{field}`")
        rules = proto.normalizer_spec.precompiled_charsmap
        model = cls(
            texts=[piece.piece for piece in proto.pieces],
            scores=[piece.score for piece in proto.pieces],
            types=[piece.type for piece in proto.pieces],
            model_type=ModelType(proto.trainer_spec.model_type),
            byte_fallback=proto.trainer_spec.byte_fallback,
            charsmap=read_charsmap(rules) if rules else None,
            add_dummy_prefix=proto.normalizer_spec.add_dummy_prefix,
            remove_extra_whitespaces=proto.normalizer_spec.remove_extra_whitespaces,
            data=proto.SerializeToString(),
        )
        if not all(isinstance(text, str) for text in model.texts):  # what is not UTF-8 comes as bytes
            raise ValueError("a piece that is not UTF-8")
        if not all(map(math.isfinite, model.scores)):
            raise ValueError("a score that is no number")
        if model.types.count(PieceType.UNKNOWN) != 1 or not model.normal:
            raise ValueError("no unknown piece or no normal pieces")
        if len(model.ids) != len(model.texts):
            raise ValueError("a piece occurs twice")
        if model.byte_fallback and model.types.count(PieceType.BYTE) != 256:
            raise ValueError("byte fallback without 256 byte pieces")
        return model

    def with_pieces(self, pieces: Sequence[str], kind: PieceType, in_front: bool = False) -> "SentencePieceModel":
        """The model with more pieces, of score 0: behind the others or in front of them."""
        from sentencepiece.sentencepiece_model_pb2 import ModelProto

        entries = [ModelProto.SentencePiece(piece=piece, score=0.0, type=kind) for piece in pieces]
        # Protocol buffers that stand one behind the other are one, with the entries of both.
        new = (
            [*pieces],
            [0.0] * len(pieces),
            [kind] * len(pieces),
            ModelProto(pieces=entries).SerializePartialToString(),
        )
        old = self.texts, self.scores, self.types, self.data
        columns: Any = zip(new, old, strict=True) if in_front else zip(old, new, strict=True)
        texts, scores, types, data = (first + second for first, second in columns)
        return replace(self, texts=texts, scores=scores, types=types, data=data)

    @cached_property
    def ids(self) -> dict[str, int]:
        """Piece text -> id."""
        return {text: index for index, text in enumerate(self.texts)}

    def of_type(self, wanted: PieceType) -> dict[str, float]:
        """Text -> score of the pieces of one type, in the order of their ids."""
        pieces = zip(self.texts, self.scores, self.types, strict=True)
        return {text: score for text, score, kind in pieces if kind == wanted}

    @cached_property
    def normal(self) -> dict[str, float]:
        return self.of_type(PieceType.NORMAL)

    @cached_property
    def symbols(self) -> list[str]:
        """The user-defined symbols."""
        return list(self.of_type(PieceType.USER_DEFINED))

    @cached_property
    def joined(self) -> list[str]:
        """The longer pieces that the model itself makes of characters. BPE does not make symbols, they leave beforehand."""
        texts = self.normal if self.model_type is ModelType.BPE else self.texts
        return [text for text in texts if len(text) > 1]

    @cached_property
    def lone_characters(self) -> set[str]:
        """Characters with a piece of their own, or byte pieces, and no place in one of `joined`."""
        known = {"\n", *self.texts} if self.byte_fallback else {*self.texts}
        return {text for text in known if len(text) == 1}.difference(*self.joined)

    @cached_property
    def unknown(self) -> str:
        return self.texts[self.types.index(PieceType.UNKNOWN)]


def build_tokenizer(model: SentencePieceModel) -> Tokenizer:
    """A `tokenizers.Tokenizer` whose ids equal `SentencePieceProcessor.encode(text)`; it has no added tokens."""
    engine, cuts = _bpe(model) if model.model_type is ModelType.BPE else _unigram(model)
    tokenizer = Tokenizer(engine)
    tokenizer.normalizer = build_normalizer(model)
    steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts]
    steps[1:1] = _cut_between_words(model)
    if steps:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = build_decoder(model)
    return tokenizer


# ---- normalizer and decoder ----


def build_normalizer(model: SentencePieceModel) -> normalizers.Normalizer:
    """Compiled rules (user-defined symbols are exempt), white space, the `▁` in front, and spaces shown as `▁`."""
    rules = model.charsmap.normalizers(model.symbols) if model.charsmap else []
    prefix = [normalizers.Prepend(SPACE)] if model.add_dummy_prefix else []
    if model.remove_extra_whitespaces:
        # The original trims what ends up as `▁` at the end, so a literal ▁ there goes as well.
        ends = Regex(rf"\A +|[ {SPACE}]+\z")
        steps = [*rules, normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(ends, ""), *prefix]
    else:
        # The prefix comes first: a text whose characters are all deleted by the rules still leaves its ▁.
        steps = [*prefix, *rules]
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def build_decoder(
    model: SentencePieceModel, silent: str | None = None, texts: Mapping[str, str] | None = None
) -> decoders.Decoder:
    """Pieces to text; the white space that the normalizer puts in front goes.

    Args:
        silent: pattern of the pieces that have no text.
        texts: pieces that have another text than their own. White space there is text: it stays in front.
    """
    own_texts = {**(texts or {}), **({"<0x20>": " "} if model.byte_fallback else {})}
    longest = len(max(model.ids, key=len)) if model.remove_extra_whitespaces else int(model.add_dummy_prefix)
    steps = [
        decoders.Replace(Regex(rf"\A(?:{silent})\z"), "") if silent else None,
        decoders.Replace(Regex(rf"\A(?={any_of(own_texts)}\z)"), _MARK) if own_texts else None,
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback() if model.byte_fallback else None,
        decoders.Fuse(),
        decoders.Strip(" ", longest, 0) if longest else None,
        *(decoders.Replace(_MARK + piece, text) for piece, text in own_texts.items()),
    ]
    return decoders.Sequence([step for step in steps if step is not None])


# Of bytes but for the space, which stands by itself: the decoder keeps it in front.
BYTE_PIECES = {f"<0x{byte:02X}>": byte for byte in range(256) if byte != 0x20}


def mend_bytes(tokens: Iterable[str]) -> list[str]:
    """The tokens, with every run of byte pieces that is not UTF-8 replaced by the text SentencePiece makes of it.

    It loses only the bytes at fault, each to one U+FFFD, where the Rust decoder gives up the whole run.
    """
    mended: list[str] = []
    for is_byte, run in groupby(tokens, key=BYTE_PIECES.__contains__):
        pieces = list(run)
        if is_byte:
            data = bytes(map(BYTE_PIECES.__getitem__, pieces))
            text = decode_bytes(data)
            pieces = pieces if text.encode() == data else [text]
        mended += pieces
    return mended


def decode_bytes(data: bytes) -> str:
    """UTF-8 with one U+FFFD for every byte that has no place in a character."""
    return re.sub("[\udc80-\udcff]", "\ufffd", data.decode(errors="surrogateescape"))


# ---- cutting text beforehand ----


def cuts_before_words(model: SentencePieceModel) -> bool:
    """Whether no piece reaches into a run of `▁` from before it."""
    return SPACE in model.normal and not any(SPACE in text.lstrip(SPACE) for text in model.joined)


def places_to_cut(model: SentencePieceModel) -> list[str]:
    """Patterns of what no piece reaches into from before it."""
    places = [rf"(?<!{SPACE}){SPACE}"] if cuts_before_words(model) else []
    return [*places, r"\n"] if "\n" in model.lone_characters else places


def _cut_between_words(model: SentencePieceModel) -> list[pre_tokenizers.PreTokenizer]:
    """Cuts text where no piece can stand: in front of a run of `▁`, if no piece reaches into one from before it, and in front
    of line breaks, if they are part of no longer piece.

    No id depends on what is beyond such a cut. BPE: a merge across it would make a piece that reaches across, so the merges
    on the two sides are those of each side alone, in the same order. Unigram: no edge of the lattice crosses it, so the best
    path is the best one of each side. Unknown characters are one token with unknown neighbors, if there are no byte pieces,
    but the characters to cut at are known.

    Unigram is slow enough for its cache of words to pay. Merging is not: it is cut some thousand characters apart, for the
    queue of merges not to grow with the text.
    """
    if model.model_type is ModelType.UNIGRAM:
        return [pre_tokenizers.Split(*WORDS)] if cuts_before_words(model) else []
    places = places_to_cut(model)
    # Ten dots a step: Oniguruma counts steps, which takes longer than to match them.
    pattern = rf"\G(?m:(?:..........){{100}}.*?)(?={'|'.join(places)})"
    return [pre_tokenizers.Split(Regex(pattern), "isolated")] if places else []


# ---- BPE ----


def _bpe(model: SentencePieceModel) -> tuple[models.BPE, list[str]]:
    """The model, and the patterns that its text is to be cut by beforehand."""
    scores = model.normal
    # Of two ways to build one piece the original takes the leftmost, so the longer left part goes first.
    merges = [
        (left, right)
        for piece in sorted(scores, key=scores.__getitem__, reverse=True)
        for cut in range(len(piece) - 1, 0, -1)
        if (left := piece[:cut]) in scores and (right := piece[cut:]) in scores
    ]
    bpe = models.BPE(
        vocab=model.ids, merges=merges, unk_token=model.unknown, byte_fallback=model.byte_fallback, fuse_unk=True
    )
    # Merging leaves symbols alone that are no part of another piece.
    symbols = [symbol for symbol in model.symbols if symbol not in model.lone_characters]
    if not symbols:
        return bpe, []
    places, guarded = _never_from_text(model, bpe, symbols)
    cuts = ["|".join([any_of(symbols), *places])]
    if guarded:
        halves = "|".join(f"{re.escape(left)}(?={re.escape(right)}\\z)" for left, right in guarded)
        cuts.append(rf"\A(?:{halves})")
    bpe.ignore_merges = True
    return bpe, cuts


def _never_from_text(
    model: SentencePieceModel, bpe: models.BPE, symbols: list[str]
) -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces that merging never produces although they are in the vocabulary: control, byte and unknown pieces, and
    normal ones whose parts the merges spend otherwise. They are cut in two at a boundary of their real segmentation,
    so that `ignore_merges`, which takes a whole pre-token from the vocabulary, does not see them.

    Returns patterns of (empty) places to cut wherever they are, and the pieces, cut in two, to look for in whole pre-tokens.
    The former cost nothing; they are for boundaries that no merge crosses, and where no symbol begins.
    """
    symbol = re.compile(any_of(symbols))
    begins = {symbol[0] for symbol in symbols}
    joined = {text[at : at + 2] for text in model.joined for at in range(len(text) - 1)}
    texts = [text for text in model.texts if len(text) > 1 and not symbol.search(text)]
    places: dict[str, list[str]] = {}
    guarded = []
    for text, encoding in zip(texts, Tokenizer(bpe).encode_batch(texts), strict=True):
        if len(encoding) == 1:
            continue
        starts = sorted({start for start, _ in encoding.offsets} - {0})
        # Neither half may be looked up as a whole either, unless it is one token anyway.
        good = [
            cut
            for cut in starts
            if (cut == starts[0] or text[:cut] not in model.ids) and (cut == starts[-1] or text[cut:] not in model.ids)
        ]
        if starts and not good:
            raise ValueError(f"the SentencePiece model's piece {text!r} cannot be kept out of texts.")
        apart = [cut for cut in good if text[cut - 1 : cut + 1] not in joined and begins.isdisjoint(text[1:])]
        if apart:
            places.setdefault(text[: apart[0]], []).append(text[apart[0] :])
        elif good:
            guarded.append((text[: good[0]], text[good[0] :]))
    return [rf"{re.escape(left)}\K(?={any_of(rights)})" for left, rights in places.items()], guarded


# ---- Unigram ----


def _unigram(model: SentencePieceModel) -> tuple[models.Unigram, list[str]]:
    """The model, and the patterns that its text is to be cut by beforehand."""
    best, worst = max(model.normal.values()), min(model.normal.values())
    # unigram_model.cc: a user-defined symbol scores above anything that could be put in its place.
    scores = model.normal | {symbol: len(symbol.encode()) * best - 0.1 for symbol in model.symbols}
    # Control, byte and unknown pieces must not match text: no way to split it scores as low as they do. Only a character
    # that is no piece costs more, but it is a boundary anyway: cut there.
    never = [text for text in model.texts if text not in scores]
    lowest = (worst - 10) * max(map(len, never))
    known = {text for text in scores if len(text) == 1}
    cuts = [
        f"(?<={re.escape(text[:at])}){re.escape(text[at])}(?={re.escape(text[at + 1 :])})"
        for text in never
        if (at := next((at for at, char in enumerate(text) if char not in known), None)) is not None
    ]
    vocab = [(text, scores.get(text, lowest)) for text in model.texts]
    engine = models.Unigram(vocab, unk_id=model.ids[model.unknown], byte_fallback=model.byte_fallback)
    return engine, ["|".join(cuts)] if cuts else []
