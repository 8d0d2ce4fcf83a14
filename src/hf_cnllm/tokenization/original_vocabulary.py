"""Fast tokenizers that are built from a checkpoint's original vocabulary file and keep it when they are saved."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import BatchEncoding, PreTrainedTokenizerBase, TokenizersBackend


class OriginalVocabularyTokenizer(TokenizersBackend):
    """Reads `tokenizer.json` where there is one, else the original vocabulary file; writes both.

    A family gives `vocab_files_names = {"vocab_file": <its file>, "tokenizer_file": "tokenizer.json"}` and
    `build_backend`. Saving with `legacy_format=True` writes the original layout alone (vocabulary file and, for tokens
    added later, `added_tokens.json`), `legacy_format=False` writes `tokenizer.json` alone.

    `finds_added_tokens_in_raw_text` says that tokens which are added later are looked for in the text as it is, not in what
    the normaliser makes of it: needed where that depends on the place in the text (a `▁` in front, for one).

    Raises:
        ValueError: there is neither file, or `tokenizer.json` is damaged; `build_backend` reports its own file.
    """

    finds_added_tokens_in_raw_text: bool = False
    _tokenizer: Tokenizer  # type: ignore[assignment]

    def build_backend(self, vocab_file: str) -> Tokenizer:
        """The Rust tokenizer for the original `vocab_file`, without special tokens."""
        raise NotImplementedError

    def __init__(
        self,
        vocab_file: str | os.PathLike | None = None,
        tokenizer_file: str | os.PathLike | None = None,
        tokenizer_object: Tokenizer | None = None,
        **kwargs: Any,
    ):
        # The code files that a checkpoint's auto_map points to are never used, and are not there after saving.
        kwargs.pop("auto_map", None)
        if tokenizer_object is None:
            self._tokenizer = self._load_backend(vocab_file, tokenizer_file)
        super().__init__(
            vocab_file=None if vocab_file is None else os.fspath(vocab_file),
            tokenizer_object=tokenizer_object,
            **kwargs,
        )

    def _load_backend(self, vocab_file, tokenizer_file) -> Tokenizer:
        if tokenizer_file is not None and os.path.isfile(tokenizer_file):
            try:
                return Tokenizer.from_file(os.fspath(tokenizer_file))
            except Exception as error:  # the Rust side raises bare Exceptions
                raise ValueError(f"{tokenizer_file} is damaged ({error}). Delete it or save it again.") from error
        if vocab_file is None:
            names = " nor ".join(self.vocab_files_names.values())
            raise ValueError(f"{self.__class__.__name__}: neither {names} was found in the checkpoint.")
        return self.build_backend(os.fspath(vocab_file))

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """The files as they are: `__init__` reads them."""
        return kwargs

    # ----------------------------------------------------------------------------------------------------------------
    # saving

    def save_pretrained(self, save_directory, legacy_format: bool | None = None, *args, **kwargs) -> tuple[str, ...]:
        """As [`~PreTrainedTokenizerBase.save_pretrained`]; nothing is written if `legacy_format=True` cannot be."""
        if legacy_format and not self._has_vocab_file():
            raise ValueError(
                "legacy_format=True needs the original vocabulary file "
                f"{self.vocab_files_names['vocab_file']}, which this tokenizer was not loaded with."
            )
        return super().save_pretrained(save_directory, legacy_format, *args, **kwargs)

    def _has_vocab_file(self) -> bool:
        return bool(getattr(self, "vocab_file", None)) and os.path.isfile(self.vocab_file)

    def _save_pretrained(
        self,
        save_directory,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        self._complete_config(file_names[0])
        if legacy_format:
            return PreTrainedTokenizerBase._save_pretrained(
                self, save_directory, file_names, legacy_format, filename_prefix
            )
        file_names = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        if legacy_format is None and self._has_vocab_file():
            file_names += self.save_vocabulary(save_directory, filename_prefix)
        return file_names

    def _complete_config(self, config_file: str) -> None:
        """What transformers leaves to `tokenizer.json` alone.

        Readers of the old layout need the flags. Without the added tokens, loading would parse the whole of
        `tokenizer.json` in Python to find them, and then once more in Rust.
        """
        with open(config_file, encoding="utf-8") as file:
            config = json.load(file)
        config |= {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token}
        config["added_tokens_decoder"] = {i: token.__getstate__() for i, token in self.added_tokens_decoder.items()}
        with open(config_file, "w", encoding="utf-8") as file:
            file.write(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copies the original vocabulary file into the folder `save_directory`."""
        if not os.path.isdir(save_directory):
            raise ValueError(f"{save_directory} is not a folder.")
        if not self._has_vocab_file():
            raise ValueError(f"{self.__class__.__name__} was loaded without its original vocabulary file.")
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = os.path.join(save_directory, prefix + self.vocab_files_names["vocab_file"])
        if os.path.abspath(target) != os.path.abspath(self.vocab_file):
            with open(self.vocab_file, "rb") as source, open(target, "wb") as copy:
                copy.write(source.read())
        return (target,)

    # ----------------------------------------------------------------------------------------------------------------
    # input

    def _add_tokens(self, new_tokens, special_tokens: bool = False) -> int:
        if not self.finds_added_tokens_in_raw_text:
            return super()._add_tokens(new_tokens, special_tokens)
        tokens = [token if isinstance(token, AddedToken) else AddedToken(str(token)) for token in new_tokens]
        plain: list[str | AddedToken] = [
            AddedToken(
                token.content,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                special=special_tokens or token.special,
                normalized=False,
            )
            for token in tokens
        ]
        return super()._add_tokens(plain, special_tokens)

    def _encode_plus(self, text, text_pair=None, **kwargs) -> BatchEncoding:
        with naming_surrogates(text, text_pair):
            return super()._encode_plus(text, text_pair, **kwargs)


@contextmanager
def naming_surrogates(*texts: Any) -> Iterator[None]:
    """Says what is wrong with `texts`, strings or lists of them, where the Rust side only says that they are no text."""
    try:
        yield
    except (TypeError, UnicodeEncodeError) as error:
        lone = next((char for char in _characters(texts) if "\ud800" <= char <= "\udfff"), None)
        if lone is None:
            raise
        raise ValueError(
            f"the text contains the lone surrogate U+{ord(lone):04X}, which is no character. Decode the text it came "
            "from with errors='replace', or call text.encode('utf-16', 'surrogatepass').decode('utf-16')."
        ) from error


def _characters(texts: Any):
    if isinstance(texts, str):
        yield from texts
    elif isinstance(texts, (list, tuple)):
        for text in texts:
            yield from _characters(text)
