"""Tokenizer of Qwen v1 (Qwen-1.8B to 72B, and their chat models): tiktoken's ids on the `tokenizers` backend."""

import copy
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Any, Literal

from tokenizers import Tokenizer
from transformers import BatchEncoding

from ...tokenization.backends import like, with_changes
from ...tokenization.base import as_list, known
from ...tokenization.chat_sections import ChatTokenizer
from ...tokenization.folder import check_settings
from ...tokenization.library import PROBE, rules_of
from ...tokenization.regex import any_of
from ...tokenization.templates import read_template
from ..old_names import InnerTokenizer
from .tiktoken_bpe import (
    PRETOKENIZE_REGEX,
    build_backend,
    by_rank,
    gap_name,
    read_tiktoken,
    to_bytes,
    to_name,
    write_tiktoken,
)

ENDOFTEXT, IMSTART, IMEND = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (ENDOFTEXT, IMSTART, IMEND, *(f"<|extra_{i}|>" for i in range(205)))
# Of the first revision, whose special tokens look like text and must therefore not stand in it.
FIRST_SPECIAL_TOKENS = (
    *(ENDOFTEXT, IMSTART, IMEND, "<R>", "<S>", "<X>", "<mask>", "<sep>"),
    *(f"<extra_{i}>" for i in range(200)),
)

NO_TIKTOKEN = "QWenTokenizer has no attribute `tokenizer`, a tiktoken.Encoding, without tiktoken: pip install tiktoken"
LONG_SPACE = re.compile(r"(?<!\s)\s{10000}")  # tiktoken's stack overflows at some hundred thousand
TextOrTexts = str | list[str] | list[list[str]] | None
SpecialText = Literal["all"] | Collection[str]


class QWenTokenizer(ChatTokenizer):
    """Byte-level BPE over the NFC form of the text, from `qwen.tiktoken` or a saved `tokenizer.json`.

    Which special tokens may stand in text, in every call (`tokenizer(…)`, `encode`, `tokenize`):

    - `allowed_special`: `"all"` or a collection of them; they become their ids, other special tokens stay text.
    - `disallowed_special`: `"all"` (that are not allowed) or a collection of them; text that holds one is a `ValueError`.

    By default all are allowed and none disallowed; in the first revision none are allowed and all disallowed. Message
    contents in chats are always text, see `apply_chat_template` and `make_context`.

    Args:
        vocab_file: `qwen.tiktoken`, read when there is no `tokenizer_file` or with an `extra_vocab_file`.
        errors: what decoding does with bytes that are not UTF-8, see `bytes.decode`; also an argument of `decode`.
        extra_vocab_file: a second file of the same kind, whose tokens are added under their own ids, which must come
            after the special tokens'. Only the caller can name it, never a checkpoint's configuration.
        tokenizer_file: `tokenizer.json`, as `save_pretrained` writes it.
        first_revision: whether the rules of the first published revision hold: `<R>`, `<S>`, … as special tokens, and
            no special token in text. By default read off the checkpoint: that one's `tokenizer_config.json` has
            `remove_space`.
    """

    vocab_files_names = {"vocab_file": "qwen.tiktoken", "tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "right"
    prompt_padding_side = "left"
    model_type = "qwen"
    _tiktoken_rules: tuple | None = None  # one that was read from tokenizer.json, or trained, may have any
    MODEL_TOKENS = {"eos_token_id": (ENDOFTEXT, IMEND)}
    PUBLISHED_SIZES = {151_936: 151_851, 152_064: 151_851}

    def __init__(
        self,
        vocab_file: str | os.PathLike | None = None,
        errors: str = "replace",
        extra_vocab_file: str | os.PathLike | None = None,
        first_revision: bool | None = None,
        tokenizer_file: str | os.PathLike | None = None,
        **kwargs,
    ):
        check_settings("QWenTokenizer", {"errors": errors, "first_revision": first_revision})
        self.errors = errors
        self._extra_vocab_file = extra_vocab_file
        self.first_revision = "remove_space" in kwargs if first_revision is None else first_revision
        named = ("eos_token", "pad_token", *(("bos_token", "unk_token") if self.first_revision else ()))
        kwargs = dict.fromkeys(named, ENDOFTEXT) | kwargs
        kwargs["clean_up_tokenization_spaces"] = False  # the original never did, whatever old configurations say
        super().__init__(
            vocab_file,
            None if extra_vocab_file else tokenizer_file,
            errors=errors,
            extra_vocab_file=None,  # its tokens are saved with the others
            first_revision=self.first_revision,
            **kwargs,
        )
        missing = [name for name in self._special_names if name not in self.special_tokens]
        # One that was trained anew may have been given other special tokens.
        if missing and kwargs.get("tokenizer_object") is None:
            raise ValueError(
                f"The vocabulary has no special token {missing[0]}. It is not Qwen v1's, or not of the revision that "
                f"`first_revision={self.first_revision}` says."
            )
        self.eod_id, self.im_start_id, self.im_end_id = map(self.special_tokens.get, (ENDOFTEXT, IMSTART, IMEND))
        if self.chat_template is None:
            self.chat_template = read_template("qwen")

    @property
    def _special_names(self) -> tuple[str, ...]:
        return FIRST_SPECIAL_TOKENS if self.first_revision else SPECIAL_TOKENS

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *init_inputs, extra_vocab_file=None, **kwargs):
        # Passing it on even when None overrides a path in the checkpoint's configuration: see `extra_vocab_file`.
        return super().from_pretrained(
            pretrained_model_name_or_path, *init_inputs, extra_vocab_file=extra_vocab_file, **kwargs
        )

    def build_backend(self, vocab_file: str) -> Tokenizer:
        ranks = read_tiktoken(vocab_file)
        if self._extra_vocab_file is not None:
            extra = {token: i for token, i in read_tiktoken(self._extra_vocab_file).items() if token not in ranks}
            if clash := set(extra.values()).intersection(ranks.values()):
                raise ValueError(
                    f"{self._extra_vocab_file}: the id {min(clash)} belongs to a token of {vocab_file}. Give the extra "
                    "tokens ids after the special tokens'."
                )
            ranks |= extra
        backend = build_backend(ranks, self._special_names)
        self.use_original(vocab_file, backend)
        return backend

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Special token -> id."""
        ids = {name: self._tokenizer.token_to_id(name) for name in self._special_names}
        return {name: index for name, index in ids.items() if index is not None}

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included (as in the original), tokens that were added later not."""
        return max(self._tokenizer.get_vocab_size(with_added_tokens=False), 1 + max(self.special_tokens.values()))

    @cached_property
    def mergeable_ranks(self) -> dict[bytes, int]:
        """The tokens that are not special, token bytes -> id, in the order of the ids."""
        names = self._tokenizer.get_vocab(with_added_tokens=False).items()
        tokens = {to_bytes(name): i for name, i in names if name not in self.special_tokens and name != gap_name(i)}
        return dict(by_rank(tokens))

    encoder = property(lambda tokenizer: tokenizer.mergeable_ranks)
    max_len = property(lambda tokenizer: tokenizer.model_max_length)

    @cached_property
    def tokenizer(self) -> Any:
        """The vocabulary as a `tiktoken.Encoding`, for scripts that look into it. It decodes no id without a token.

        Raises:
            AttributeError: tiktoken is not installed. Nothing else here needs it, and who asks whether a tokenizer has
                another inside (`transformers serve`) hears that it has none.
        """
        if find_spec("tiktoken") is None:
            raise AttributeError(NO_TIKTOKEN)
        from tiktoken import Encoding

        class Vocabulary(InnerTokenizer, Encoding):
            _whole = self

        return Vocabulary(
            "Qwen",
            pat_str=PRETOKENIZE_REGEX,
            mergeable_ranks=self.mergeable_ranks,
            special_tokens=self.special_tokens,
        )

    def __getattr__(self, key: str) -> Any:
        if key == "tokenizer":  # the property's error ends up here, and transformers' would not say what is missing
            raise AttributeError(NO_TIKTOKEN)
        return super().__getattr__(key)

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys([*super().all_special_tokens, *self.special_tokens]))

    def is_settled(self, token: str) -> bool:
        return token in self._special_names  # matched in the normal form of the text

    def convert_tokens_to_ids(self, tokens: str | bytes | Sequence[str | bytes]) -> Any:
        """Id(s) of token(s): the backend's names (`"Ġhello"`), special tokens, or bytes as the original's; else None."""
        if isinstance(tokens, bytes):
            tokens = to_name(tokens)
        if isinstance(tokens, str):
            return self._tokenizer.token_to_id(tokens)
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def _encode_texts(
        self,
        text: TextOrTexts,
        text_pair: TextOrTexts = None,
        *,
        allowed_special: SpecialText | None = None,
        disallowed_special: SpecialText | None = None,
        split_special_tokens: bool | None = None,
        **kwargs,
    ) -> BatchEncoding:
        text, text_pair = self._in_normal_form(text), self._in_normal_form(text_pair)
        if allowed_special is None:
            allowed_special = () if self.first_revision else "all"
        if disallowed_special is None:
            disallowed_special = "all" if self.first_revision else ()
        if split_special_tokens is None:
            split_special_tokens = self.split_special_tokens

        if not split_special_tokens:
            names = self.special_tokens.keys()
            allowed = names if allowed_special == "all" else names & set(allowed_special)
            self._refuse(names - allowed if disallowed_special == "all" else set(disallowed_special), text, text_pair)
            if allowed and allowed != names:
                return self._matching_only(allowed)._encode_texts(text, text_pair, split_special_tokens=True, **kwargs)
            split_special_tokens = not allowed
        return super()._encode_texts(text, text_pair, split_special_tokens=split_special_tokens, **kwargs)

    def _ids_of(self, texts: Sequence[str]) -> list[list[int]]:
        """By tiktoken itself, which takes a third of the backend's time, where it is there and the same: on a vocabulary file
        as it is, with no tokens but its own, and without runs of white space that are longer than its regular expressions bear.
        Building it takes a third of a second, which short texts alone are not worth."""
        is_worth_it = "tokenizer" in vars(self) or any(len(text) >= 1_000 for text in texts)
        if not (is_worth_it and self._has_own_tokens_alone() and self.has_own_rules()):
            return super()._ids_of(texts)
        ids = self._tiktoken_ids(texts)
        left = [text for text, found in zip(texts, ids, strict=True) if found is None]
        others = iter(super()._ids_of(left) if left else [])
        return [next(others) if found is None else found for found in ids]

    def has_own_rules(self) -> bool:
        self._take_whole_texts()
        if self._tiktoken_rules != rules_of(self._tokenizer) or find_spec("tiktoken") is None:
            return False
        expected = self._tokenizer.encode(PROBE, add_special_tokens=False).ids
        return self._tiktoken_ids([PROBE]) == [expected]

    def use_original(self, vocab_file: str, backend: Tokenizer, model: Any = None) -> None:
        self._tiktoken_rules = rules_of(backend)

    def _has_own_tokens_alone(self) -> bool:
        return self._tokenizer.get_added_tokens_decoder().keys() == set(self.special_tokens.values())

    def _tiktoken_ids(self, texts: Sequence[str]) -> list[list[int] | None]:
        """None for those that are for the backend."""
        allowed: Any = set() if self._tokenizer.encode_special_tokens else "all"
        encode = partial(self.tokenizer.encode, allowed_special=allowed, disallowed_special=())
        return [None if LONG_SPACE.search(text) else encode(unicodedata.normalize("NFC", text)) for text in texts]

    def _in_normal_form(self, text: Any) -> Any:
        """The text (or texts in containers) with U+FFFD for half surrogates, as in tiktoken, and made NFC where the
        backend would do it otherwise than Python: its tables are of an older Unicode version."""
        if isinstance(text, Mapping):
            return {key: self._in_normal_form(value) for key, value in text.items()}
        if isinstance(text, list | tuple):
            return type(text)(self._in_normal_form(t) for t in text)
        if not isinstance(text, str) or text.isascii():
            return text
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if unicodedata.is_normalized("NFC", text):
            return text
        normal = unicodedata.normalize("NFC", text)
        return text if self._tokenizer.normalizer.normalize_str(text) == normal else normal

    def read_messages(self, conversation: Any) -> list[dict[str, Any]]:
        return self._in_normal_form(super().read_messages(conversation))

    def _refuse(self, disallowed: Collection[str], *texts: TextOrTexts) -> None:
        if not disallowed:
            return
        for text in texts:
            if isinstance(text, list | tuple):
                self._refuse(disallowed, *text)
            elif text and (found := re.search(any_of(disallowed), unicodedata.normalize("NFC", text))):
                raise ValueError(
                    f"Encountered text corresponding to disallowed special token {found[0]!r}.\nIf you want this text to "
                    f"be encoded as a special token, pass it to `allowed_special`, e.g. `allowed_special={{{found[0]!r}}}`."
                    "\nIf you want this text to be encoded as normal text, pass `disallowed_special=()`."
                )

    def _matching_only(self, allowed: Collection[str]) -> "QWenTokenizer":
        """A copy on the same vocabulary that, with `split_special_tokens`, still matches the `allowed` special tokens."""
        other = copy.copy(self)
        other._tiktoken_rules = None
        added = self.added_tokens_decoder.values()
        changed = [with_changes(t, special=t.special and t.content not in allowed) for t in added]
        other._tokenizer = like(self._tokenizer, changed)
        other._tokenizer.post_processor = self._tokenizer.post_processor
        return other

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        errors: str | None = None,
        **kwargs,
    ) -> str:
        """Text of the ids; `errors` as in `bytes.decode`, by default `self.errors`."""
        tokens = self.convert_ids_to_tokens(as_list(token_ids), skip_special_tokens=skip_special_tokens)
        return self.convert_tokens_to_string(tokens, errors)

    def convert_tokens_to_string(self, tokens: Iterable[str | bytes | None], errors: str | None = None) -> str:
        """Text of the tokens: the backend's names, special tokens, or bytes as the original's."""
        added = self.added_tokens_encoder
        pieces = (t if isinstance(t, bytes) else t.encode() if t in added else to_bytes(t) for t in known(tokens))
        return b"".join(pieces).decode(errors=errors or self.errors)

    def write_vocabulary(self, path: str) -> None:
        """Writes `qwen.tiktoken` anew, extra tokens included (as the original does)."""
        write_tiktoken(self.mergeable_ranks, path)
