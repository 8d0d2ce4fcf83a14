"""Fast tokenizers that are built from a checkpoint's original vocabulary file and keep it when they are saved."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer
from transformers import BatchEncoding, PreTrainedTokenizerBase, TokenizersBackend

from .._compat import check_transformers
from ..hub.publishing import TokenizerPublishingMixin
from .backends import read_state, with_changes
from .folder import (
    Folder,
    check_added_tokens,
    check_model_config,
    check_named_tokens,
    check_settings,
    list_added_tokens,
)
from .ids_alone import IdsAloneMixin, padded_length, unbatched

CHECKSUMS = "belong_together"  # in tokenizer_config.json: those of the original vocabulary and of the tokenizer.json made of it


def checksums(*paths: str | os.PathLike) -> list[str]:
    return [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths]


class AnyIdMixin:
    """Put in front of a tokenizer: ids without a token, as the spare rows of a model have, are no text, as in transformers'
    own tokenizers. Their tokens are None."""

    def convert_ids_to_tokens(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> Any:
        """As in transformers. Raises OverflowError for what is no id, see [`check_ids`]."""
        check_ids(ids)
        return super().convert_ids_to_tokens(ids, skip_special_tokens)  # type: ignore[misc]

    def convert_tokens_to_string(self, tokens: Iterable[str | None]) -> str:
        return super().convert_tokens_to_string(known(tokens))  # type: ignore[misc]

    def _decode(self, token_ids: int | list[int], *args: Any, **kwargs: Any) -> str:
        check_ids(token_ids)
        return super()._decode(token_ids, *args, **kwargs)  # type: ignore[misc]


class TextsMixin:
    """Put in front of a tokenizer: an empty second text is one, which transformers takes for none but in batches, and half a
    surrogate pair is refused by name."""

    def _encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> BatchEncoding:
        is_lone = text_pair == "" and isinstance(text, str)
        given = ([text], [text_pair]) if is_lone else (text, text_pair)
        try:
            batch = super()._encode_plus(*given, *args, **kwargs)  # type: ignore[misc]
        except TypeError:
            check_texts(given)
            raise
        if not is_lone or kwargs.get("return_tensors") is not None or kwargs.get("return_overflowing_tokens"):
            return batch
        return BatchEncoding(unbatched(batch.data), batch.encodings)


class OriginalVocabularyTokenizer(TokenizerPublishingMixin, AnyIdMixin, TextsMixin, IdsAloneMixin, TokenizersBackend):
    """Reads `tokenizer.json` where there is one, else the original vocabulary file; writes both.

    A family gives `vocab_files_names = {"vocab_file": <its file>, "tokenizer_file": "tokenizer.json"}` and
    `build_backend`. Saving with `legacy_format=True` writes the original layout alone (vocabulary file and, for tokens
    added later, `added_tokens.json`), `legacy_format=False` writes `tokenizer.json` alone.

    `finds_added_tokens_in_raw_text` says that tokens which are added later are looked for in the text as it is, not in what
    the normalizer makes of it: needed where that depends on the place in the text (a `▁` in front, for one).

    Raises:
        ValueError: there is neither file, one is damaged, or they do not agree with each other or with what stands beside
            them (config.json, tokenizer_config.json); `build_backend` reports its own file.
    """

    finds_added_tokens_in_raw_text: bool = False
    can_be_trained_anew: bool = True
    model_type: str  # of the models that it is for
    MODEL_TOKENS: Mapping[str, tuple[str, ...]] = {}
    """Key of an id in config.json -> the tokens that it can be the id of, where these come behind the vocabulary."""
    PUBLISHED_SIZES: Mapping[int, int] = {}
    """Embeddings of a published model -> ids of its tokenizer."""
    _tokenizer: Tokenizer  # type: ignore[assignment]

    def build_backend(self, vocab_file: str) -> Tokenizer:
        """The Rust tokenizer for the original `vocab_file`."""
        raise NotImplementedError

    def use_original(self, vocab_file: str, backend: Tokenizer, model: Any = None) -> None:
        """Has the library that the original ran on beside the `backend`, which is what `build_backend` makes of `vocab_file`;
        `model` is what is in that, if it is known."""

    def is_settled(self, token: str) -> bool:
        """Whether `build_backend` has decided how this token is matched, so that adding it again changes nothing."""
        return False

    def __init__(
        self,
        vocab_file: str | os.PathLike | None = None,
        tokenizer_file: str | os.PathLike | None = None,
        tokenizer_object: Tokenizer | None = None,
        **kwargs: Any,
    ):
        check_transformers()
        check_settings(self.__class__.__name__, kwargs)
        # The code files that a checkpoint's auto_map points to are never used, and are not there after saving.
        kwargs.pop("auto_map", None)
        recorded = kwargs.pop(CHECKSUMS, None)
        vocab_file = None if vocab_file is None else os.fspath(vocab_file)
        tokenizer_file = os.fspath(tokenizer_file) if os.path.isfile(tokenizer_file or "") else None
        if tokenizer_object is not None:
            super().__init__(vocab_file=vocab_file, tokenizer_object=tokenizer_object, **kwargs)
            return
        self._tokenizer = self._load_backend(vocab_file, tokenizer_file)
        if recorded and vocab_file and tokenizer_file and recorded == checksums(vocab_file, tokenizer_file):
            self.use_original(vocab_file, self._tokenizer)
        source = tokenizer_file or vocab_file
        folder, added = Folder(source), dict(kwargs.get("added_tokens_decoder") or {})
        check_named_tokens(folder, self._tokenizer.token_to_id, kwargs, added)
        config: Mapping[str, Any] = {}
        if "name_or_path" in kwargs:  # from a checkpoint, not by hand
            config = folder.model_config(self.model_type)
            self.check_backend(config, source)
        super().__init__(vocab_file=vocab_file, **kwargs)
        check_added_tokens(self._tokenizer, self.listed_tokens(added), source)
        check_model_config(self._tokenizer, config, self.MODEL_TOKENS, self.PUBLISHED_SIZES, source)

    def listed_tokens(self, added: Mapping[Any, Any]) -> Mapping[Any, Any]:
        """Those of the added tokens, id -> token, that the checkpoint's settings list for this very vocabulary."""
        return added

    def check_backend(self, config: Mapping[str, Any], source: str | None) -> None:
        """Refuses a vocabulary, which came from `source`, that is not of this family or not of the model's `config`."""

    def _load_backend(self, vocab_file: str | None, tokenizer_file: str | None) -> Tokenizer:
        read: Callable[[str], Tokenizer] = Tokenizer.from_file
        source, advice = tokenizer_file, "Delete it or save it again"
        if source is None:
            read, source, advice = self.build_backend, vocab_file, "Download it again"
        if source is None:
            names = " nor ".join(self.vocab_files_names.values())
            raise ValueError(f"{self.__class__.__name__}: neither {names} was found in the checkpoint.")
        try:
            return read(source)
        except (FileNotFoundError, KeyboardInterrupt):
            raise
        except BaseException as error:  # the Rust side raises bare Exceptions, and panics, which are not even those
            if isinstance(error, ValueError) and source in str(error):
                raise
            raise ValueError(f"{source} is damaged ({error}). {advice}.") from error

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """The files as they are: `__init__` reads them."""
        return kwargs

    def train_new_from_iterator(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. Raises NotImplementedError where control tokens belong to the vocabulary file, at places of their
        own: what training makes would not load again."""
        if not self.can_be_trained_anew:
            raise NotImplementedError(
                "The rules of this tokenizer come from a SentencePiece model, its control tokens too. Train a new one "
                f"with sentencepiece.SentencePieceTrainer, and load it as {self.vocab_files_names['vocab_file']}."
            )
        return super().train_new_from_iterator(*args, **kwargs)

    def save_pretrained(self, save_directory, legacy_format: bool | None = None, *args, **kwargs) -> tuple[str, ...]:
        """As [`~PreTrainedTokenizerBase.save_pretrained`]; nothing is written if `legacy_format=True` cannot be."""
        if legacy_format and not self.can_save_slow_tokenizer:
            raise ValueError(
                "legacy_format=True needs the original vocabulary file "
                f"{self.vocab_files_names['vocab_file']}, which this tokenizer was not loaded with."
            )
        return super().save_pretrained(save_directory, legacy_format, *args, **kwargs)

    def _save_pretrained(
        self, save_directory, file_names: tuple[str, ...], legacy_format: bool | None = None, filename_prefix=None
    ) -> tuple[str, ...]:
        config_file, settings = file_names[0], self.settings_to_save()
        save = PreTrainedTokenizerBase._save_pretrained if legacy_format else TokenizersBackend._save_pretrained
        file_names = save(self, save_directory, file_names, legacy_format, filename_prefix)
        if legacy_format is None and self.can_save_slow_tokenizer:
            file_names += self.save_vocabulary(save_directory, filename_prefix)
            if self.has_own_rules():
                settings[CHECKSUMS] = checksums(file_names[-1], file_names[-2])
        list_added_tokens(config_file, self.added_tokens_decoder, **settings)
        return file_names

    def settings_to_save(self) -> dict[str, Any]:
        """What `tokenizer_config.json` says besides: the flags, for readers of the old layout."""
        return {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token}

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes the original vocabulary file into the folder `save_directory`."""
        if not os.path.isdir(save_directory):
            raise ValueError(f"{save_directory} is not a folder.")
        if not self.can_save_slow_tokenizer:
            raise ValueError(f"{self.__class__.__name__} was loaded without its original vocabulary file.")
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        target = os.path.join(save_directory, prefix + self.vocab_files_names["vocab_file"])
        self.write_vocabulary(target)
        return (target,)

    def write_vocabulary(self, path: str) -> None:
        """Writes the original vocabulary file: a copy of the one it was loaded from."""
        if not (os.path.exists(path) and os.path.samefile(path, self.vocab_file)):  # by a link, perhaps
            shutil.copyfile(self.vocab_file, path)

    def __getstate__(self) -> dict[str, Any]:
        # What was worked out on the way stays out of pickles: datasets fingerprints a tokenizer by its pickle.
        return {
            name: value
            for name, value in vars(self).items()
            if not isinstance(getattr(type(self), name, None), cached_property)
        }

    def _add_tokens(self, new_tokens, special_tokens: bool = False) -> int:
        new_tokens = [token for token in new_tokens if not self.is_settled(str(token))]
        if self.finds_added_tokens_in_raw_text:
            new_tokens = [with_changes(token, normalized=False) for token in new_tokens]
        return super()._add_tokens(new_tokens, special_tokens) if new_tokens else 0

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """The ids of one text or two with the special tokens that `tokenizer(…)` puts around them."""
        template = read_state(self._tokenizer.post_processor.__getstate__())
        ids: list[int] = []
        for piece in template["single" if token_ids_1 is None else "pair"]:
            if "Sequence" in piece:
                ids += token_ids_0 if piece["Sequence"]["id"] == "A" else token_ids_1 or []
            else:
                ids += template["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
        return ids

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs) -> list[str]:
        # The backend's own names for special tokens include the white space around them.
        ids = self.encode(text, pair, add_special_tokens=add_special_tokens, **kwargs)
        return list(self.convert_ids_to_tokens(ids))

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs,
    ) -> str:
        tokens = self.convert_ids_to_tokens(as_list(token_ids), skip_special_tokens=skip_special_tokens)
        text = self.convert_tokens_to_string(tokens)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def pad_encodings(
        self,
        encodings: list[Encoding],
        padding_strategy: str,
        max_length: int | None,
        pad_to_multiple_of: int | None,
        padding_side: str | None,
    ) -> None:
        """Pads encodings, in place, as `tokenizer(…)` would."""
        length = padded_length(map(len, encodings), padding_strategy, max_length, pad_to_multiple_of)
        for encoding in encodings if length else ():  # who does not pad need not have a token for it
            encoding.pad(
                length,
                direction=padding_side or self.padding_side,
                pad_id=self.pad_token_id,
                pad_type_id=self.pad_token_type_id,
                pad_token=self.pad_token,
            )

    def batch_of(
        self,
        encodings: list[Encoding],
        is_batched: bool,
        return_tensors: str | None,
        columns: Mapping[str, list[list]] | None = None,
        **flags: Any,
    ) -> BatchEncoding:
        """The batch that `tokenizer(…)` would make of encodings; `flags` are its `return_*` arguments.

        Args:
            columns: more values for every token, a list for each encoding.

        Raises:
            ValueError: `return_overflowing_tokens`, whose pieces would lack what was put around the whole.
        """
        if flags.get("return_overflowing_tokens"):
            raise ValueError("return_overflowing_tokens is not available for chats and for filled blanks.")
        data: dict[str, list] = {}
        for encoding in encodings:
            for name, values in self._convert_encoding(encoding, **flags)[0].items():
                data.setdefault(name, []).extend(values)
        data |= columns or {}
        if not is_batched and return_tensors is None:
            data = unbatched(data)
        return BatchEncoding(data, encodings, tensor_type=return_tensors)


def id_of(token: str) -> property:
    """A tokenizer's property: the id of `token`."""
    return property(lambda tokenizer: tokenizer.convert_tokens_to_ids(token))


def known(tokens: Iterable[Any]) -> list[Any]:
    """Those of the tokens that there are: ids without a token have None."""
    return [token for token in tokens if token is not None]


def check_texts(given: Any) -> None:
    """Refuses half a surrogate pair in a text, or in one of the texts in lists; all else is for the backend to refuse.

    Raises:
        TypeError: as from the backend, but saying where it stands, and how to get rid of it.
    """
    if isinstance(given, (list, tuple)):
        for text in given:
            check_texts(text)
    elif isinstance(given, str):
        try:
            given.encode()
        except UnicodeEncodeError as error:
            raise TypeError(
                f"a text holds half a surrogate pair, {given[error.start]!r} at character {error.start}, which is no character: "
                "cut it out, or replace it with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
            ) from None


def check_ids(token_ids: int | Iterable[int]) -> None:
    """Refuses numbers that no id can be.

    Raises:
        OverflowError: as from transformers' own tokenizers, but naming the number.
    """
    for index in as_list(token_ids):
        if not 0 <= index < 2**32:
            advice = "Replace the padding of labels before decoding them." if index < 0 else "Is it a token id at all?"
            raise OverflowError(f"{index} is not a token id. {advice}")


def as_list(token_ids: int | Iterable[int]) -> list[int]:
    return [token_ids] if isinstance(token_ids, int) else [int(index) for index in token_ids]
