"""`tokenizer(texts)` for those who want ids: nearly all of them.

The backend spends half of its time on where in the text each token stands and what its name is. Here it finds ids alone, and
the rest when somebody asks the batch for it (`batch.tokens()`, `word_ids()`, `char_to_token()`, `encodings`, …).
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from operator import not_
from typing import Any

from tokenizers import Encoding, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BatchEncoding

from .._compat import LateEncodings
from .added_tokens import added_tokens_in_raw_text, sections
from .library import SentencePieceLibrary, joined

# What only the encodings know, or what must be decided before there are ids.
NEED_ENCODINGS = (
    *("return_offsets_mapping", "return_overflowing_tokens", "return_special_tokens_mask"),
    *("is_split_into_words", "stride", "sanitize_control_tokens"),
)


def unbatched(columns: Mapping[str, list]) -> dict[str, list]:
    """The columns of a batch of one text as transformers gives those of a text alone."""
    return {name: rows[0] if isinstance(rows[0], list) else rows for name, rows in columns.items()}


def padded_length(lengths: Iterable[int], strategy: str, max_length: int | None, multiple: int | None) -> int:
    """What rows of these lengths are padded to, as the arguments of `tokenizer(…)` say; 0 if they are not."""
    if strategy == "do_not_pad":
        return 0
    length = max_length if strategy == "max_length" else max(lengths)
    return -(-length // (multiple or 1)) * (multiple or 1)


class IdsAloneMixin:
    """Put in front of a fast tokenizer, which it is equal to but for time."""

    least_characters = 400  # of a batch; what is set up for it takes longer than encoding fewer

    _tokenizer: Tokenizer

    library: SentencePieceLibrary | None = None
    """The original's, set by who builds the backend from a vocabulary file."""

    def text_backend(self) -> Tokenizer:
        """The backend that encodes texts, with the rules of the moment: `_tokenizer`, or one that asks the library."""
        return self.library.backend_like(self._tokenizer) if self.library else self._tokenizer

    def has_own_rules(self) -> bool:
        """Whether the backend still does what the original's library does: nobody has given it other rules."""
        self._take_whole_texts()
        return self.library is not None and self.library.agrees(self._tokenizer)

    def _take_whole_texts(self) -> None:
        """Without the truncation and padding that the call before has left in the backend."""
        backend = self._tokenizer
        if backend.truncation is not None:  # or else nothing changes while another thread encodes
            backend.no_truncation()
        if backend.padding is not None:
            backend.no_padding()

    def _ids_of(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of the texts, with nothing put around them."""
        self._take_whole_texts()
        library, tokens = self.library, None
        if library and self.has_own_rules():
            tokens = added_tokens_in_raw_text(self._tokenizer)
        if library is None or tokens is None:
            return [
                encoding.ids for encoding in self.text_backend().encode_batch_fast(texts, add_special_tokens=False)
            ]
        is_plain = [*map(library.takes, texts)]
        rows = [sections(text, tokens) for text in compress(texts, is_plain)]
        found = iter(library.ids([part for row in rows for part in row if isinstance(part, str)]))
        by_library = iter([[next(found) if isinstance(part, str) else [part] for part in row] for row in rows])
        others = list(compress(texts, map(not_, is_plain)))
        by_backend = iter(self.text_backend().encode_batch_fast(others, add_special_tokens=False) if others else ())
        return [joined(next(by_library)) if plain else next(by_backend).ids for plain in is_plain]

    def _columns_of(self, ids: list[int], attention_mask: list[int]) -> dict[str, list]:
        """More columns of a row, for subclasses."""
        return {}

    def _encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> BatchEncoding:
        is_batched = isinstance(text, (list, tuple))
        texts = text if is_batched else [text]
        post_processor, max_length = self._tokenizer.post_processor, kwargs.get("max_length")
        if (
            args
            or text_pair is not None
            or not texts
            or not all(isinstance(one, str) for one in texts)
            or not self._is_worth_it(texts)
            or any(kwargs.get(name) for name in NEED_ENCODINGS)
            or kwargs.get("truncation_strategy") == "only_second"
            or (max_length is not None and max_length < self._tokenizer.num_special_tokens_to_add(False))
            or not (post_processor is None or isinstance(post_processor, TemplateProcessing))
        ):
            return self._encode_with_offsets(text, text_pair, *args, **kwargs)
        data = self._rows(texts, **kwargs)
        rows = data["input_ids"]

        def encode() -> list[Encoding]:
            encodings = self._encode_with_offsets(list(texts), None, **kwargs | {"return_tensors": None}).encodings
            if [encoding.ids for encoding in encodings] != rows:
                raise RuntimeError("the tokenizer has changed since it encoded this batch: encode the texts again.")
            return encodings

        return_tensors = kwargs.get("return_tensors")
        if not is_batched and return_tensors is None:
            data = unbatched(data)
        return LateEncodings(data, encode, return_tensors)

    def _rows(
        self: Any,
        texts: Sequence[str],
        add_special_tokens: bool = True,
        padding_strategy: Any = "do_not_pad",
        truncation_strategy: Any = "do_not_truncate",
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_token_type_ids: bool | None = None,
        return_attention_mask: bool | None = None,
        return_length: bool = False,
        verbose: bool = True,
        split_special_tokens: bool | None = None,
        **others: Any,
    ) -> dict[str, list]:
        """The columns of the batch, as from the backend's encodings."""
        if split_special_tokens is None:
            split_special_tokens = self.split_special_tokens
        if self._tokenizer.encode_special_tokens != split_special_tokens:
            self._tokenizer.encode_special_tokens = split_special_tokens
        rows = self._ids_of(texts)
        adds_tokens = add_special_tokens and self._tokenizer.num_special_tokens_to_add(False) > 0
        around = self.build_inputs_with_special_tokens([None]) if adds_tokens else [None]
        if truncation_strategy != "do_not_truncate":
            room = max(max_length - len(around) + 1, 0)
            is_left = self.truncation_side == "left"
            rows = [ids[max(len(ids) - room, 0) :] if is_left else ids[:room] for ids in rows]
        if len(around) > 1:
            at = around.index(None)
            rows = [around[:at] + ids + around[at + 1 :] for ids in rows]
        length = padded_length(map(len, rows), padding_strategy, max_length, pad_to_multiple_of)
        is_left = (padding_side or self.padding_side) == "left"

        def padded(row: list, fill: Any) -> list:
            filler = [fill] * (length - len(row))
            return filler + row if is_left else row + filler

        names, pad_token_id = self.model_input_names, self.pad_token_id
        columns: dict[str, list] = {"input_ids": [padded(ids, pad_token_id) for ids in rows]}
        masks = [padded([1] * len(ids), 0) for ids in rows]
        if "token_type_ids" in names if return_token_type_ids is None else return_token_type_ids:
            columns["token_type_ids"] = [padded([0] * len(ids), self.pad_token_type_id) for ids in rows]
        if "attention_mask" in names if return_attention_mask is None else return_attention_mask:
            columns["attention_mask"] = masks
        if return_length:
            columns["length"] = [len(ids) for ids in columns["input_ids"]]
        for ids, mask in zip(columns["input_ids"], masks, strict=True):
            for name, column in self._columns_of(ids, mask).items():
                columns.setdefault(name, []).append(column)
            self._eventual_warn_about_too_long_sequence(ids, max_length, verbose)
        return columns

    def _is_worth_it(self, texts: Sequence[str]) -> bool:
        has_more_to_do = self.library is not None and self.library.decides
        return has_more_to_do or sum(map(len, texts)) >= self.least_characters

    def _encode_with_offsets(self, *args: Any, **kwargs: Any) -> BatchEncoding:
        """What transformers makes of the texts, by the backend that encodes them."""
        backend, tokenizer = self.text_backend(), self
        if backend is not self._tokenizer:
            tokenizer = object.__new__(type(self))
            vars(tokenizer).update(vars(self) | {"_tokenizer": backend})
        inherited: Any = super(IdsAloneMixin, tokenizer)
        return inherited._encode_plus(*args, **kwargs)
