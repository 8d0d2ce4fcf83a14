"""What tokenizers share whose original vocabulary file is SentencePiece's."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from .library import SentencePieceLibrary
from .sentencepiece import SentencePieceModel, build_tokenizer


class SentencePieceMixin:
    """Put in front of an `OriginalVocabularyTokenizer`. A family overrides what it does otherwise."""

    finds_added_tokens_in_raw_text = True
    can_be_trained_anew = False
    sp_model_kwargs: Mapping[str, Any] = {}
    library: SentencePieceLibrary | None

    def build_backend(self, vocab_file: str) -> Tokenizer:
        model = self.read_model(vocab_file)
        backend = self.backend_of(model)
        self.use_original(vocab_file, backend, model)
        return backend

    def read_model(self, vocab_file: str) -> SentencePieceModel:
        """The vocabulary, with what the original's code adds to the file. Raises ValueError for that of another family."""
        return SentencePieceModel.from_file(vocab_file)

    def backend_of(self, model: SentencePieceModel) -> Tokenizer:
        return build_tokenizer(model)

    def use_original(
        self, vocab_file: str, backend: Tokenizer, model: SentencePieceModel | None = None, **options: Any
    ) -> None:
        """`options` are of `SentencePieceLibrary.of_file`."""
        self.library = SentencePieceLibrary.of_file(vocab_file, backend, model=model, **options)

    @cached_property
    def sp_model(self: Any) -> Any:
        """The vocabulary file as a `sentencepiece.SentencePieceProcessor`, for scripts that look into it."""
        from sentencepiece import SentencePieceProcessor

        if not self.can_save_slow_tokenizer:
            name = self.vocab_files_names["vocab_file"]
            raise ValueError(f"sp_model needs {name}, which this tokenizer was loaded without.")
        processor = SentencePieceProcessor(**self.sp_model_kwargs)
        processor.Load(self.vocab_file)
        return processor
