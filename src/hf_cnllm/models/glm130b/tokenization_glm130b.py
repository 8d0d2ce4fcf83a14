"""Tokenizer of GLM-130B: icetk's text vocabulary, behind 20,000 image tokens that the model never saw.

The file is that of ChatGLM-6B of March 2023 (`ice_text.model`); the rules for text are not. White space of any kind is one
space, and nothing in a text becomes a control token: a text with blanks goes through `encode_blanks`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from transformers import BatchEncoding

from ...tokenization.backends import surround_texts
from ...tokenization.base import OriginalVocabularyTokenizer, check_texts, id_of, known
from ...tokenization.folder import DOWNLOAD_AGAIN
from ...tokenization.regex import any_of
from ...tokenization.sentencepiece import ModelType, PieceType, SentencePieceModel, build_decoder
from ...tokenization.sentencepiece_mixin import SentencePieceMixin
from ..chatglm.vocabulary_chatglm import ICE_TEXT, IMAGE_TOKENS, with_images, without_control_names
from ..glm.tokenization_glm import IGNORED, GLMBatchEncoding, GLMTokenizerMixin

# Behind the pieces of the file, in this order, and </s> among them; the original's names.
CONTROL_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "<eod>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
COMMANDS = {token.strip("<>"): token for token in CONTROL_TOKENS} | {"eos": "</s>"}
SHOWN = {token: f"[{name}]" for name, token in COMMANDS.items()} | {"</s>": "[</s>]"}  # in decoded text
BLANKS = re.compile(r"(\[[gs]?MASK\])")


def with_control_tokens(model: SentencePieceModel, num_image_tokens: int) -> SentencePieceModel:
    return with_images(model.with_pieces(CONTROL_TOKENS, PieceType.CONTROL), num_image_tokens)


class GLM130BTokenizer(GLMTokenizerMixin, SentencePieceMixin, OriginalVocabularyTokenizer):
    """SentencePiece Unigram after NFKC, with white space collapsed: text `[gMASK]` `<sop>`, a prompt to go on with.

    Names of control tokens in a text are text. [`encode_blanks`] reads `[MASK]`, `[sMASK]` and `[gMASK]`, and
    `hf_cnllm.infill`, which fills them. Decoding shows control tokens in brackets, as the original does.

    Args:
        vocab_file: the original `ice_text.model`.
        num_image_tokens: ids in front of the text vocabulary.

    Raises:
        ValueError: the file is missing, damaged or of another family.
    """

    vocab_files_names = {"vocab_file": ICE_TEXT, "tokenizer_file": "tokenizer.json"}
    padding_side = "left"
    model_type = "glm130b"
    PUBLISHED_SIZES = {150_528: 150_008}
    MODEL_TOKENS = {
        **{"bos_token_id": ("<sop>",), "eos_token_id": ("<eop>", "</s>"), "text_end_token_id": ("</s>",)},
        **{"mask_token_id": ("[MASK]",), "gmask_token_id": ("[gMASK]",), "smask_token_id": ("[sMASK]",)},
    }
    NAMED_TOKENS = {
        **{"bos_token": "<sop>", "eos_token": "<eop>", "mask_token": "[MASK]"},
        **{"unk_token": "<unk>", "pad_token": "<pad>"},
    }
    NOT_THIS = "{} is not the vocabulary of GLM-130B: it has other pieces or rules. " + DOWNLOAD_AGAIN + "."
    sop_token, eop_token, end_token, gmask_token = "<sop>", "<eop>", "</s>", "[gMASK]"
    sop_token_id, eop_token_id, end_token_id = id_of(sop_token), id_of(eop_token), id_of(end_token)

    def __init__(self, vocab_file=None, *, num_image_tokens: int = IMAGE_TOKENS, **kwargs: Any):
        self.num_image_tokens = num_image_tokens
        kwargs = without_control_names(kwargs)  # ChatGLM-6B's settings, beside the same file, have them
        if wrong := [name for name in ("do_lower_case", "remove_space") if kwargs.pop(name, False)]:
            raise ValueError(f"{wrong[0]} in tokenizer_config.json is ChatGLM-6B's: GLM-130B has no such setting.")
        if "additional_special_tokens" not in kwargs and "extra_special_tokens" not in kwargs:
            named = self.NAMED_TOKENS.values()
            kwargs["extra_special_tokens"] = [token for token in (*CONTROL_TOKENS, "</s>") if token not in named]
        kwargs = {**self.NAMED_TOKENS, "num_image_tokens": num_image_tokens, **kwargs}
        super().__init__(vocab_file=vocab_file, **kwargs)

    def read_model(self, vocab_file: str) -> SentencePieceModel:
        model = super().read_model(vocab_file)
        is_early = model.model_type is ModelType.UNIGRAM and model.symbols == ["<n>"] and "[gMASK]" not in model.ids
        if not is_early or model.byte_fallback:
            raise ValueError(self.NOT_THIS.format(vocab_file))
        return with_control_tokens(model, self.num_image_tokens)

    def backend_of(self, model: SentencePieceModel) -> Tokenizer:
        backend = super().backend_of(model)
        silent = any_of([token for token in model.of_type(PieceType.CONTROL) if not token.startswith("<image_")])
        backend.decoder = build_decoder(model, rf"{silent}|<image_\d+>", {model.unknown: " ⁇ ", "<n>": "\n"})
        return backend

    def use_original(self, vocab_file: str, backend: Tokenizer, model: SentencePieceModel | None = None) -> None:
        extend = partial(with_control_tokens, num_image_tokens=self.num_image_tokens)
        super().use_original(vocab_file, backend, model, extend=extend)

    def check_backend(self, config: Mapping[str, Any], source: str | None) -> None:
        ids = self._tokenizer.get_vocab(with_added_tokens=False)
        start = len(ids) - len(CONTROL_TOKENS)
        is_ours = isinstance(self._tokenizer.model, Unigram) and ids.get("<unk>") == self.num_image_tokens
        if not is_ours or [ids.get(token) for token in CONTROL_TOKENS] != list(range(start, len(ids))):
            raise ValueError(self.NOT_THIS.format(source))

    def update_post_processor(self) -> None:
        self._add_bos_token = self._add_eos_token = False
        ending = ["[gMASK]", "<sop>"]
        surround_texts(self._tokenizer, ["$A", *ending], ["$A", "$B", *ending])

    def is_settled(self, token: str) -> bool:
        return self._tokenizer.model.token_to_id(token) is not None  # also that no text contains it

    def get_command(self, token: str) -> int:
        """The original's: the id of `[MASK]`, `[gMASK]`, `[sMASK]`, `eod`, `sop`, `eop`, `ENC`, `dBLOCK` or `eos`."""
        if token not in COMMANDS:
            raise ValueError(f"{token!r} is none of GLM-130B's commands, which are {', '.join(COMMANDS)}.")
        return int(self._tokenizer.token_to_id(COMMANDS[token]))

    def tokenize(self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs) -> list[str]:
        """As the original's: tokens that the vocabulary lacks are the text that they stand for."""
        check_texts([text, pair])
        return self.text_backend().encode(text, pair, add_special_tokens=add_special_tokens).tokens

    def convert_tokens_to_string(self, tokens: Iterable[str | None]) -> str:
        """The texts between control tokens, each for itself, and control tokens in brackets."""
        text = ""
        for is_control, run in groupby(known(tokens), key=SHOWN.__contains__):
            tokens = [*run]
            text += "".join(map(SHOWN.__getitem__, tokens)) if is_control else self._tokenizer.decoder.decode(tokens)
        return text

    # ---- texts with blanks ----

    def encode_blanks(
        self,
        text: str | Sequence[str],
        appended: str = "[gMASK]",
        is_whole: bool = True,
        max_length: int | None = None,
        padding: bool = False,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Contexts of texts with `[MASK]`, `[sMASK]` and `[gMASK]` in them, as the original makes them, without `<sop>`.

        Args:
            appended: the blank behind a text that has none.
            is_whole: whether `</s>` follows a text that does not end in a blank.
            max_length: longer contexts are cut in front.

        Returns:
            `input_ids` and `attention_mask`, of one text or of each.
        """
        if not isinstance(text, str):
            rows = [self.encode_blanks(single, appended, is_whole, max_length)["input_ids"] for single in text]
            return self.pad({"input_ids": rows}, padding=padding, return_tensors=return_tensors)
        if not BLANKS.search(text):
            text += appended
        pieces = BLANKS.split(text)
        ids: list[int] = []
        for at, piece in enumerate(pieces):
            ids += [self.get_command(piece)] if at % 2 else self.encode(piece, add_special_tokens=False)
        if is_whole and pieces[-1]:
            ids.append(self.end_token_id)
        ids = ids if max_length is None else ids[-max_length:]
        return BatchEncoding(
            {"input_ids": ids, "attention_mask": [1] * len(ids)},
            tensor_type=return_tensors,
            prepend_batch_axis=return_tensors is not None,
        )

    def build_inputs_for_generation(
        self,
        model_input: Mapping[str, Any],
        max_gen_length: int = 512,
        targets: str | Sequence[str] | None = None,
        padding: bool = False,
    ) -> BatchEncoding:
        """The model's input for filling the first blank of each text: `input_ids` and `attention_mask`, with `<sop>` behind
        each context. The model finds positions and context itself.

        With `targets`, the texts of the blanks, for training: `labels` besides (not shifted; -100 in the context); a target
        ends in `<eop>` or is cut at `max_gen_length` tokens.

        Args:
            model_input: `tokenizer.encode_blanks(texts)`, or `tokenizer(texts)`, which has a `[gMASK]` behind each text.
            padding: with targets, whether all rows have room for `max_gen_length` tokens of them.

        Raises:
            ValueError: a text without a blank, or not as many targets as texts.
        """
        contexts = self._contexts(model_input)
        if targets is None:
            return self.pad({"input_ids": [[*ids, self.sop_token_id] for ids in contexts]}, return_tensors="pt")
        pieces = self._pieces(targets, len(contexts), max_gen_length)
        rows = [[*ids, self.sop_token_id, *piece[:-1]] for ids, piece in zip(contexts, pieces, strict=True)]
        labels = [[IGNORED] * len(ids) + piece for ids, piece in zip(contexts, pieces, strict=True)]
        length = max(map(len, contexts)) + max_gen_length if padding else None
        batch = self.pad(
            {"input_ids": rows},
            padding="max_length" if padding else True,
            max_length=length,
            padding_side="right",
            return_tensors="pt",
        )
        total = batch["input_ids"].shape[1]
        batch["labels"] = torch.tensor([row + [IGNORED] * (total - len(row)) for row in labels])
        return batch

    def build_inputs_for_multiple_choice(
        self, model_input: Mapping[str, Any], choices: Sequence[Sequence[str]], max_length: int | None = None
    ) -> GLMBatchEncoding:
        """As GLM's, for [`GLM130BForMultipleChoice`]: `position_ids` are `[batch, total]`.

        Args:
            model_input: `tokenizer.encode_blanks(texts, "[MASK]", is_whole=False)`, as the original's evaluation does.
        """
        contexts = self._contexts(model_input)
        padded = self.pad({"input_ids": contexts}, padding_side="right", return_tensors="pt")
        inputs = super().build_inputs_for_multiple_choice(padded, choices, max_length)
        inputs["position_ids"] = inputs["position_ids"][:, 0]
        return inputs

    def _contexts(self, model_input: Mapping[str, Any]) -> list[list[int]]:
        """The rows of a batch, or the one of a single text, without padding."""
        ids, masks = ([*map(as_list, model_input[name])] for name in ("input_ids", "attention_mask"))
        if not isinstance(ids[0], list):
            ids, masks = [ids], [masks]
        rows = [[index for index, kept in zip(*row, strict=True) if kept] for row in zip(ids, masks, strict=True)]
        rows = [row[:-1] if row[-1:] == [self.sop_token_id] else row for row in rows]  # a prompt's
        for number, row in enumerate(rows):
            if not set(row) & set(self.mask_token_ids):
                names = ", ".join(map(self.convert_ids_to_tokens, self.mask_token_ids))
                raise ValueError(f"text {number} has none of {names}: tokenize with `tokenizer.encode_blanks`.")
        return rows


def as_list(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


__all__ = ["GLM130BTokenizer"]
