"""What scripts know as `tokenizer.tokenizer` (ChatGLM2 and 3) and `tokenizer.sp_tokenizer` (ChatGLM-6B): the vocabulary file
alone, whose text yields no control tokens."""

import re
from collections.abc import Sequence
from typing import Any

from ..old_names import InnerTokenizer
from .vocabulary_chatglm import MAX_BLANK_LENGTH, ROLES


class _PlainTokenizer:
    def __init__(self, tokenizer: Any):
        self._whole = tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of a text, in which names of control tokens are text."""
        return self._whole.encode_message(text)

    def tokenize(self, text: str) -> list[str]:
        return self._whole.convert_ids_to_tokens(_PlainTokenizer.encode(self, text))

    def decode(self, ids: Sequence[int]) -> str:
        return self._whole.decode(ids)

    def decode_tokens(self, tokens: Sequence[str]) -> str:
        return self._whole.convert_tokens_to_string(tokens)

    def convert_token_to_id(self, token: str) -> int:
        index = self._whole.convert_tokens_to_ids(token)
        return self._whole.unk_token_id if index is None else index

    def convert_id_to_token(self, index: int) -> str:
        return self._whole.convert_ids_to_tokens(index) or ""


class SPTokenizer(InnerTokenizer, _PlainTokenizer):
    """ChatGLM2's and ChatGLM3's `tokenizer.tokenizer`."""

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer)
        self.n_words: int = tokenizer.vocab_size
        self.bos_id, self.eos_id, self.pad_id = map(tokenizer.get_command, ("<bos>", "<eos>", "<pad>"))
        self.special_tokens: dict[str, int] = tokenizer.control_tokens
        self.index_special_tokens = {index: token for token, index in self.special_tokens.items()}
        self.role_special_token_expression = "|".join(map(re.escape, ROLES))

    @property
    def sp_model(self) -> Any:
        """The vocabulary file as a `sentencepiece.SentencePieceProcessor`."""
        return self._whole.sp_model

    def encode(self, s: str, bos: bool = False, eos: bool = False) -> list[int]:
        return [*[self.bos_id] * bos, *super().encode(s), *[self.eos_id] * eos]

    def tokenize(self, s: str, encode_special_tokens: bool = False) -> list[str]:
        """Tokens of a text; the names of ChatGLM3's roles are tokens where the script says so."""
        parts = re.split(f"({self.role_special_token_expression})", s) if encode_special_tokens else [s]
        tokens = ([part] if part in self.special_tokens else super(SPTokenizer, self).tokenize(part) for part in parts)
        return [token for run in tokens for token in run]


class IceTokenizer(_PlainTokenizer):
    """ChatGLM-6B's `tokenizer.sp_tokenizer`. The switches of its methods have one value each, the original's default."""

    max_blank_length, byte_fallback = MAX_BLANK_LENGTH, True
    SWITCHES = {"linebreak": True, "whitespaces": True, "special_tokens": False, "add_dummy_prefix": True}

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer)
        self.vocab_file: str = tokenizer.vocab_file
        self.num_image_tokens: int = tokenizer.num_image_tokens
        self.num_tokens: int = tokenizer.vocab_size
        self.num_text_tokens = self.num_tokens - self.num_image_tokens
        self.special_tokens = [*tokenizer.control_tokens]

    def encode(self, text: str, **switches: bool) -> list[int]:
        self._check(switches)
        return super().encode(text)

    def tokenize(self, text: str, **switches: bool) -> list[str]:
        self._check(switches)
        return super().tokenize(text)

    def decode(self, text_ids: Sequence[int], **switches: bool) -> str:
        self._check(switches)
        return super().decode(text_ids)

    def _check(self, switches: dict[str, bool]) -> None:
        for name, value in switches.items():
            if self.SWITCHES.get(name) is not value:
                raise ValueError(f"{name}={value} is not available here, where {self.SWITCHES} holds.")

    @property
    def text_tokenizer(self) -> Any:
        raise AttributeError(
            "text_tokenizer is no more: use sp_tokenizer itself, or tokenizer.sp_model for the SentencePiece model."
        )

    @staticmethod
    def get_blank_token(length: int) -> str:
        return f"<|blank_{length}|>"

    @staticmethod
    def get_tab_token() -> str:
        return "<|tab|>"

    def __getitem__(self, key: int | str) -> str | int:
        return self.convert_token_to_id(key) if isinstance(key, str) else self.convert_id_to_token(key)
