"""Tokenizers of the English GLM checkpoints, on the vocabularies of GPT-2, BERT and RoBERTa."""

import json
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, normalizers
from transformers import BertTokenizer, GPT2Tokenizer, RobertaTokenizer

from ..._compat import check_transformers
from ...tokenization.backends import with_changes
from ...tokenization.base import AnyIdMixin, TextsMixin
from ...tokenization.folder import (
    Folder,
    check_added_tokens,
    check_model_config,
    check_named_tokens,
    check_settings,
    list_added_tokens,
)
from .tokenization_glm import GLMTokenizerMixin, SurroundedTextMixin


class EnglishVocabularyMixin(AnyIdMixin, TextsMixin):
    """Keeps the vocabulary files of GPT-2's, BERT's and RoBERTa's tokenizers, and checks what is read from them."""

    OWN_TOKENS: tuple[str, ...]  # that its vocabulary has
    FOREIGN_TOKENS: tuple[str, ...] = ()  # that it has not, and that of another class has

    def __init__(self, *args: Any, checked_file: str | None = None, **kwargs: Any):
        check_transformers()
        super().__init__(*args, **kwargs)
        if checked_file is not None:  # not what the caller made by hand
            check_added_tokens(self._tokenizer, kwargs.get("added_tokens_decoder") or {}, checked_file)
            config = Folder(checked_file).model_config("glm")
            check_model_config(self._tokenizer, config, self.MODEL_TOKENS, {}, checked_file)

    @classmethod
    def convert_to_native_format(cls, **kwargs: Any) -> dict[str, Any]:
        """The vocabulary that the files hold.

        Raises:
            ValueError: a file is missing, cut or of another tokenizer, or a setting means nothing; it is named.
        """
        check_settings(cls.__name__, kwargs)
        source = kwargs.get("tokenizer_file")
        if source is not None and os.path.isfile(source):
            vocab, merges = _read_tokenizer_json(source)
        elif kwargs.get("vocab") is not None or kwargs.get("tokenizer_object") is not None:
            return super().convert_to_native_format(**kwargs)
        else:
            names = {key: name for key, name in cls.vocab_files_names.items() if key != "tokenizer_file"}
            for key, name in names.items():
                if not os.path.isfile(kwargs.get(key) or ""):
                    raise ValueError(
                        f"{cls.__name__}: neither tokenizer.json nor {name} was found in {kwargs.get('name_or_path')}. Download "
                        "it again, or load the folder with the class that it is of."
                    )
            source = kwargs["vocab_file"]
            vocab = _read_vocab_json(source) if source.endswith(".json") else _read_vocab_txt(source)
            merges = _read_merges(kwargs["merges_file"]) if "merges_file" in names else None
        added = kwargs.get("added_tokens_decoder") or {}
        if fault := cls._fault_of(vocab, merges, [*map(str, added.values())]):
            raise ValueError(
                f"{source} is not a whole vocabulary of {cls.__name__}: it {fault}. Download it and merges.txt again, if there is "
                "one, or load the folder with the class that it is of."
            )
        check_named_tokens(Folder(source), vocab.get, kwargs, added)
        return super().convert_to_native_format(**kwargs) | {"checked_file": source}

    @classmethod
    def _fault_of(
        cls, vocab: dict[str, int], merges: list[tuple[str, str]] | None, added: Collection[str]
    ) -> str | None:
        """What is wrong with a vocabulary, if anything."""
        for token in cls.OWN_TOKENS:
            if token not in vocab:
                return f"has no {token}"
        for token in cls.FOREIGN_TOKENS:
            if token in vocab:
                return f"has {token}, which that of another tokenizer has"
        if (merges is None) == issubclass(cls, (GPT2Tokenizer, RobertaTokenizer)):
            return "is of another kind"
        if sorted(vocab.values()) != list(range(len(vocab))):
            return "has no token for some of its ids, or two for one"
        if merges is None:
            return None
        made = {left + right for left, right in merges}
        if lost := sorted(made.union(*merges) - vocab.keys()):
            return f"has no {lost[0]!r}, which a merge makes or takes"
        others = {token for token in vocab if len(token) > 1 and not NO_MERGE.fullmatch(token)}.difference(added)
        return f"has {min(others - made)!r}, which no merge makes" if others - made else None

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes the original vocabulary files into the folder `save_directory`."""
        return tuple(self._tokenizer.model.save(str(save_directory), filename_prefix))

    def _save_pretrained(
        self, save_directory, file_names: tuple[str, ...], legacy_format: bool | None = None, filename_prefix=None
    ) -> tuple[str, ...]:
        list_added_tokens(file_names[0], self.added_tokens_decoder)
        file_names = super()._save_pretrained(save_directory, file_names, legacy_format, filename_prefix)
        if legacy_format is not False:
            file_names += self.save_vocabulary(save_directory, filename_prefix)
        return file_names


# Unicode's 66 noncharacters.
NO_CHARACTER = (
    "[\ufdd0-\ufdef" + "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF)) + "]"
)
# Tokens that no merge makes: special ones, and what RoBERTa's vocabulary was filled up with.
NO_MERGE = re.compile(r"<.+>|\[.+\]|madeupword\d{4}")


def _read_tokenizer_json(path: str) -> tuple[dict[str, int], list[tuple[str, str]] | None]:
    try:
        model = json.loads(Path(path).read_text(encoding="utf-8"))["model"]
        if "merges" not in model:
            return dict(model["vocab"]), None
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        return dict(model["vocab"]), [(left, right) for left, right in pairs]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Delete it or save it again.") from error


def _read_vocab_json(path: str) -> dict[str, int]:
    vocab = Folder(path).read(Path(path).name)
    if not vocab or not all(type(index) is int for index in vocab.values()):
        raise ValueError(f"{path} is damaged: it is not an object of tokens and their ids. Download it again.")
    return vocab


def _read_vocab_txt(path: str) -> dict[str, int]:
    tokens = _read_lines(path)
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise ValueError(f"{path} is damaged: the token {twice!r} stands in two lines. Download it again.")
    return vocab


def _read_merges(path: str) -> list[tuple[str, str]]:
    lines = _read_lines(path)
    merges = [tuple(line.split(" ")) for line in lines if not line.startswith("#version")]
    if damaged := next((merge for merge in merges if len(merge) != 2 or "" in merge), None):
        raise ValueError(f"{path} is damaged: {' '.join(damaged)!r} is not two tokens. Download it again.")
    return merges  # type: ignore[return-value]


def _read_lines(path: str) -> list[str]:
    """The lines of a vocabulary file, all of which end: the last of one that was cut does not."""
    try:
        text = Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}). Download it again.") from error
    if not text.endswith("\n"):
        raise ValueError(f"{path} is cut: its last line does not end. Download it again, or end the line.")
    return text.removesuffix("\n").replace("\r\n", "\n").split("\n")


class GLMGPT2Tokenizer(SurroundedTextMixin, EnglishVocabularyMixin, GLMTokenizerMixin, GPT2Tokenizer):
    """GPT-2's vocabulary (glm-2b, glm-10b): `[CLS]` text `<|endoftext|>`.

    The checkpoint gives the special tokens (`tokenizer_config.json`, `added_tokens.json`). As in the original, those
    that GLM adds take the white space around them with them, and GPT-2's own do not.
    """

    OWN_TOKENS = ("<|endoftext|>",)
    FOREIGN_TOKENS = ("<s>", "[PAD]")

    def __init__(self, *args: Any, cls_token="[CLS]", mask_token="[MASK]", **kwargs: Any):
        super().__init__(*args, cls_token=cls_token, mask_token=mask_token, **kwargs)

    def _add_tokens(self, new_tokens: Sequence[str | AddedToken], special_tokens: bool = False) -> int:
        gpt2 = {str(token) for token in (self.bos_token, self.eos_token, self.unk_token, self.pad_token)}
        ours = {*self.all_special_tokens, "[UNK]"} - gpt2  # which no configuration names
        changes = {"lstrip": True, "rstrip": True, "normalized": False}
        new_tokens = [with_changes(token, **changes) if str(token) in ours else token for token in new_tokens]
        return super()._add_tokens(new_tokens, special_tokens)


def _unsupported(kind: str) -> property:
    def refuse(tokenizer: Any) -> int:
        raise NotImplementedError(f"{type(tokenizer).__name__}: the model doesn't support {kind}")

    return property(refuse)


class _OneKindOfBlank:
    """The smaller English models know `[MASK]` alone."""

    gmask_token_id, smask_token_id = _unsupported("gMASK"), _unsupported("sMASK")
    mask_token_ids = property(lambda tokenizer: [tokenizer.mask_token_id])


class GLMBertTokenizer(_OneKindOfBlank, EnglishVocabularyMixin, GLMTokenizerMixin, BertTokenizer):
    """BERT's vocabulary (glm-large, glm-515m): `[CLS]` text `[SEP]`."""

    OWN_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # The original drops what is no character, which the backend keeps.
        drop = normalizers.Replace(Regex(NO_CHARACTER), "")
        self._tokenizer.normalizer = normalizers.Sequence([drop, self._tokenizer.normalizer])


class GLMRobertaTokenizer(_OneKindOfBlank, EnglishVocabularyMixin, GLMTokenizerMixin, RobertaTokenizer):
    """RoBERTa's vocabulary (glm-roberta-large): `<s>` text `</s>`. `<mask>` takes the space in front of it with it."""

    OWN_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

    def __init__(self, *args: Any, mask_token: str | AddedToken = "<mask>", **kwargs: Any):
        if isinstance(mask_token, str):  # as the checkpoint's configuration gives it
            mask_token = AddedToken(mask_token, lstrip=True, normalized=False, special=True)
        super().__init__(*args, mask_token=mask_token, **kwargs)  # type: ignore[arg-type]
