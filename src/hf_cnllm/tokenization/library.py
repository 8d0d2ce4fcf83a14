"""SentencePiece itself beside the backend: for ids alone, and wherever its rounding decides.

BPE has one result, which the library finds in two thirds of the backend's time. Unigram adds scores, the library in 32 bits and
the backend in 64: where the best ways to split a text are nearly equal, they choose differently (`nnnn nn`, `nn nnnn`). The
originals ran the library, so there [`SentencePieceLibrary.backend_like`] makes a backend that asks the library for tokens, and
has offsets, added tokens, words, pairs and truncation as ever.
"""

import multiprocessing
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tokenizers import NormalizedString, PreTokenizedString, Token, Tokenizer, normalizers
from tokenizers.models import Unigram
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from .backends import like
from .charsmap import APART, BORDER
from .sentencepiece import SPACE, WORDS, PieceType, SentencePieceModel, cuts_before_words, places_to_cut

PROBE = "Ａ b"  # what others make of it: lower case, no NFKC, no ▁ in front, …
# Of BPE and Unigram. With a dropout or an alpha their ids are drawn anew each time.
MODEL_SETTINGS = ("dropout", "alpha", "nbest_size", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges")
SHORTEST_PART = 500  # characters; BPE's queue of merges is the slower the longer it is
WORTH_THREADS = 20_000  # characters


class SentencePieceLibrary:
    """The library with the vocabulary that `backend` was built from.

    Args:
        read: gives the vocabulary. It goes into pickles, so it must not depend on files.
        prepare: what the original does to a text before the library gets it.
        written: the replacements that this is, in their order.
        lost: characters that the backend's normalizer uses as marks, so that it does not do what the library does.
        model: what `read` gives, if that is known.
    """

    def __init__(
        self,
        read: Callable[[], SentencePieceModel],
        backend: Tokenizer,
        prepare: Callable[[str], str] = str,
        written: Mapping[str, str] | None = None,
        lost: Sequence[str] = (),
        model: SentencePieceModel | None = None,
    ):
        self.read, self.prepare, self.written, self.lost = read, prepare, written or {}, (APART, BORDER, *lost)
        self.decides = isinstance(backend.model, Unigram)  # whether its ids, not the backend's, are the tokenizer's
        self._rules = rules_of(backend)
        if model is not None:
            self.model = model

    @classmethod
    def of_file(
        cls,
        vocab_file: str,
        backend: Tokenizer,
        extend: Callable[[SentencePieceModel], SentencePieceModel] | None = None,
        **options: Any,
    ) -> "SentencePieceLibrary":
        """`extend` adds to the vocabulary of the file what the original's code does."""
        return cls(partial(_read_model, Path(vocab_file).read_bytes(), vocab_file, extend), backend, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in vars(type(self))}

    def __deepcopy__(self, memo: dict) -> "SentencePieceLibrary":
        return self  # nothing in it changes

    # ---- the library's parts ----

    @cached_property
    def model(self) -> SentencePieceModel:
        return self.read()

    @cached_property
    def _engine(self) -> Any:
        """Normal form -> ids."""
        from sentencepiece import SentencePieceProcessor
        from sentencepiece.sentencepiece_model_pb2 import ModelProto

        changes = ModelProto()
        changes.trainer_spec.byte_fallback = self.model.byte_fallback
        changes.normalizer_spec.name, changes.normalizer_spec.precompiled_charsmap = "identity", b""
        for step in ("add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"):
            setattr(changes.normalizer_spec, step, False)
        return SentencePieceProcessor(model_proto=self.model.data + changes.SerializePartialToString())

    @cached_property
    def _normalizer(self) -> Any:
        """Text -> normal form: the vocabulary's rules and what is exempt from them."""
        from sentencepiece import SentencePieceProcessor
        from sentencepiece.sentencepiece_model_pb2 import ModelProto

        proto = ModelProto.FromString(self.model.data)
        del proto.pieces[:]
        some = next(iter(self.model.normal))
        pieces = {self.model.unknown: PieceType.UNKNOWN, some: PieceType.NORMAL}
        pieces |= dict.fromkeys(self.model.symbols, PieceType.USER_DEFINED)
        proto.pieces.extend(
            ModelProto.SentencePiece(piece=piece, score=0.0, type=kind) for piece, kind in pieces.items()
        )
        proto.trainer_spec.byte_fallback = False
        return SentencePieceProcessor(model_proto=proto.SerializeToString())

    @cached_property
    def rules(self) -> dict[str, str]:
        """For single characters that are not in the name of a symbol, and do not vanish (places in the text would)."""
        rules = self.model.charsmap.characters if self.model.charsmap else {}
        exempt = {*self.model.symbols, *map(chr, range(0x20, 0x7F))}
        return {char: to for char, to in rules.items() if to and char not in exempt}

    # ---- ids ----

    def takes(self, text: str) -> bool:
        """Whether the backend's normalizer does what the library's does, and the text is Unicode at all."""
        try:
            text.encode()
        except UnicodeEncodeError:
            return False
        return not any(char in text for char in self.lost)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts without added tokens."""
        normalize, prepare = self._normalizer.normalize, self.prepare
        parts = [self._parts(normalize(prepare(text))) for text in texts]
        found = self._encoded(list(chain.from_iterable(parts)))
        return [joined(list(islice(found, len(part)))) for part in parts]

    def _encoded(self, parts: list[str]) -> Iterator[list[int]]:
        encode, threads = self._engine.encode, _threads()
        if threads == 1 or sum(map(len, parts)) < WORTH_THREADS:
            return map(encode, parts)
        return iter(encode(parts, num_threads=threads))

    def _parts(self, form: str) -> list[str]:
        """BPE's texts cut where no piece can stand, see `_cut_between_words`. Rounding goes through the whole of a text."""
        if self.decides or len(form) < 2 * SHORTEST_PART:
            return [form]
        return self._part.findall(form)

    @cached_property
    def _part(self) -> re.Pattern[str]:
        # Symbols leave before any merge, so they are no part of what the places were found by.
        places = [
            place
            for place in places_to_cut(self.model)
            if not any(re.compile(place).search(symbol, 1) for symbol in self.model.symbols)
        ]
        ends = "|".join([*places, r"\Z"])
        return re.compile(rf"(?s:.{{{SHORTEST_PART}}}.*?)(?={ends})|(?s:.+)")

    def agrees(self, backend: Tokenizer) -> bool:
        """Whether the backend, which does not truncate, still has the vocabulary's rules, as far as a probe tells."""
        return (
            self._rules == rules_of(backend) and backend.encode(PROBE, add_special_tokens=False).ids == self._probe_ids
        )

    @cached_property
    def _probe_ids(self) -> list[int]:
        return self.ids([PROBE])[0]

    # ---- a backend ----

    def backend_like(self, backend: Tokenizer) -> Tokenizer:
        """The backend with the library's tokens, or itself if that is not for the library to say."""
        if not self.decides or rules_of(backend) != self._rules:
            return backend
        other = like(backend, backend.get_added_tokens_decoder().values())
        other.normalizer = self.normalizer_like(backend.normalizer)
        other.pre_tokenizer = PreTokenizer.custom(self)
        other.post_processor = backend.post_processor
        other.encode_special_tokens = backend.encode_special_tokens
        return other

    def normalizer_like(self, rules: Any, are_symbols_text: bool = False) -> Any:
        """`rules`, which are the vocabulary's own, at less cost: most texts have nothing that most of the steps look for.

        Args:
            are_symbols_text: what `rules` do with the user-defined symbols in a text.
        """
        if rules is None or rules.normalize_str(PROBE) != self._normalizer.normalize(PROBE):
            return rules
        return Normalizer.custom(_Shortcut(self, rules, "<" if are_symbols_text else None))

    def pre_tokenize(self, text: PreTokenizedString) -> None:
        """For `tokenizers`: splits the text's sections into words as the backend does, and gives each word its tokens."""
        sections: list[str] = []

        def into_words(_: int, section: NormalizedString) -> list[NormalizedString]:
            sections.append(section.normalized)
            return section.split(*WORDS) if self._has_words else [section]

        text.split(into_words)
        tokens = chain.from_iterable(map(self._tokens, sections))

        def tokens_of(word: str) -> list[Token]:
            start, end, own = 0, len(word.encode()), []
            while start < end:
                index, name, width, step = next(tokens)
                own.append(Token(index, name, (start, start + width)))
                start += step
            return own

        text.tokenize(tokens_of)

    @cached_property
    def _has_words(self) -> bool:
        return cuts_before_words(self.model)

    def _tokens(self, section: str) -> Iterator[tuple[int, str, int, int]]:
        """Of each token the id, the name (its text, if it is unknown), the bytes that it stands for, and those to the next one."""
        ids = self._engine.encode(section)
        if self._unusual.isdisjoint(ids):
            widths = [*map(self._lengths.__getitem__, ids)]
            return zip(ids, map(self.model.texts.__getitem__, ids), widths, widths, strict=True)
        return self._unusual_tokens(ids, self._engine.encode(section, out_type=str))

    def _unusual_tokens(self, ids: list[int], names: list[str]) -> Iterator[tuple[int, str, int, int]]:
        """Unknown characters among them, or bytes, each of which stands for all of its character."""
        width = left = 0
        for index, name in zip(ids, names, strict=True):
            if index not in self._byte_ids:
                width = len(name.encode())
            elif not left:
                width = left = self._lengths[index]
            left = max(left - 1, 0)
            yield index, name, width, 0 if left else width

    @cached_property
    def _unusual(self) -> set[int]:
        return self._byte_ids | {self.model.ids[self.model.unknown]}

    @cached_property
    def _byte_ids(self) -> set[int]:
        return {self.model.ids[text] for text in self.model.of_type(PieceType.BYTE)}

    @cached_property
    def _lengths(self) -> list[int]:
        """Bytes of each piece's text; of a piece for a byte, those of the character that begins with it."""
        lengths = [len(text.encode()) for text in self.model.texts]
        for index in self._byte_ids:
            first = int(self.model.texts[index][3:5], 16)
            lengths[index] = next((size for size, least in ((4, 0xF0), (3, 0xE0), (2, 0xC0)) if first >= least), 1)
        return lengths


def _read_model(
    data: bytes, path: str, extend: Callable[[SentencePieceModel], SentencePieceModel] | None
) -> SentencePieceModel:
    model = SentencePieceModel.from_bytes(data, path)
    return extend(model) if extend else model


class _Shortcut:
    """A normalizer for `tokenizers`."""

    def __init__(self, library: SentencePieceLibrary, rules: Any, foreign: str | None):
        self.library, self.rules, self.foreign = library, rules, foreign

    def normalize(self, section: Any) -> None:
        library, text = self.library, section.normalized
        spaced = library.prepare(text)
        changes = {char: library.rules[char] for char in set(text) & library.rules.keys()}
        form = spaced
        for char, to in changes.items():
            form = form.replace(char, to)
        form = SPACE * library.model.add_dummy_prefix + form.replace(" ", SPACE)
        has_foreign = self.foreign is not None and any(self.foreign in part for part in (text, *changes.values()))
        if has_foreign or not library.takes(text) or library._normalizer.normalize(spaced) != form:
            self.rules.normalize(section)
            return
        if spaced != text:
            for space, name in library.written.items():
                if space in text:
                    section.replace(space, name)
                    text = text.replace(space, "\0")
        for char, to in changes.items():
            section.replace(char, to)
        if library.model.add_dummy_prefix:
            section.prepend(SPACE)
        section.replace(" ", SPACE)


def joined(rows: list[list[int]]) -> list[int]:
    return rows[0] if len(rows) == 1 else list(chain.from_iterable(rows))


def rules_of(backend: Tokenizer) -> tuple[Any, ...]:
    """What can be told of the backend's rules at next to no cost: of a normalizer in steps, which steps they are."""
    normalizer, model = backend.normalizer, backend.model
    is_in_steps = isinstance(normalizer, normalizers.Sequence)
    return (
        [type(step).__name__ for step in normalizer] if is_in_steps else _written(normalizer),
        _written(backend.pre_tokenizer),
        type(model).__name__,
        [getattr(model, name, None) for name in MODEL_SETTINGS],
        backend.get_vocab_size(with_added_tokens=False),
    )


def _written(part: Any) -> bytes:
    try:
        return b"" if part is None else part.__getstate__()
    except Exception:  # the Rust side raises bare ones
        return b"code"  # of somebody's, which cannot be written down


def _threads() -> int:
    """As many as there are cores, where `tokenizers` would use them; one in workers, of which there is one for each core."""
    is_off = os.environ.get("TOKENIZERS_PARALLELISM", "true").lower() in ("off", "false", "f", "no", "n", "0", "")
    return 1 if is_off or multiprocessing.parent_process() is not None else -1
