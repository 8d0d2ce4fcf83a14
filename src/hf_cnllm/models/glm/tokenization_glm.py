"""Tokenizers of the original GLM: texts with blanks (`[MASK]`, `[sMASK]`, `[gMASK]`) and inputs for filling them.

GLM (arXiv 2103.10360) reads a text with blanks in both directions and writes what belongs into one behind it, from
`<|startofpiece|>` to `<|endofpiece|>`. Positions have two rows: the place in the text, for a piece that of its blank;
and the place inside the piece, counted from 1, in the text 0.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import BatchEncoding

from ...hub.publishing import TokenizerPublishingMixin
from ...tokenization.backends import surround_texts, taking_spaces
from ...tokenization.base import OriginalVocabularyTokenizer, id_of, known
from ...tokenization.folder import DOWNLOAD_AGAIN
from ...tokenization.regex import any_of
from ...tokenization.sentencepiece import ModelType, PieceType, SentencePieceModel, build_decoder
from ...tokenization.sentencepiece_mixin import SentencePieceMixin
from ..old_names import NO_CHATS

IGNORED = -100  # label of tokens without a loss


class GLMBatchEncoding(BatchEncoding):
    """A batch whose values may be nested lists of tensors."""

    def to(self, device: str | torch.device | int, *, non_blocking: bool = False) -> "GLMBatchEncoding":
        def moved(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.to(device, non_blocking=non_blocking)
            return [moved(item) for item in value] if isinstance(value, (list, tuple)) else value

        self.data = {name: moved(value) for name, value in self.data.items()}
        return self


class GLMTokenizerMixin(TokenizerPublishingMixin):
    """What every GLM tokenizer adds to the tokenizer whose vocabulary it uses."""

    model_input_names = ["input_ids", "attention_mask"]
    truncation_side = "left"
    model_type = "glm"
    tokenize = OriginalVocabularyTokenizer.tokenize

    MODEL_TOKENS = {
        "eos_token_id": ("<|endofpiece|>", "<|endoftext|>", "[SEP]", "</s>"),
        "sop_token_id": ("<|startofpiece|>",),
        "eop_token_id": ("<|endofpiece|>",),
        "mask_token_id": ("[MASK]", "<mask>"),
        "smask_token_id": ("[sMASK]",),
        "gmask_token_id": ("[gMASK]",),
    }
    sop_token, eop_token = "<|startofpiece|>", "<|endofpiece|>"
    sop_token_id, eop_token_id = id_of(sop_token), id_of(eop_token)
    gmask_token_id, smask_token_id = id_of("[gMASK]"), id_of("[sMASK]")

    @property
    def mask_token_ids(self) -> list[int]:
        """The tokens that stand for a blank."""
        return [self.mask_token_id, self.smask_token_id, self.gmask_token_id]

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        if chat_template is None and not self.chat_template:
            raise ValueError(NO_CHATS)
        return super().get_chat_template(chat_template, tools)

    def build_inputs_for_generation(
        self,
        model_input: Mapping[str, Any],
        max_gen_length: int = 512,
        targets: str | Sequence[str] | None = None,
        padding: bool = False,
    ) -> BatchEncoding:
        """The model's input for filling the first blank of each text.

        Without `targets`: `input_ids` `[batch, length + 1]` (`<|startofpiece|>` behind), `position_ids`
        `[batch, 2, length + max_gen_length]` and `generation_attention_mask` `[batch, 1, total, total]` for everything
        that is going to be generated.

        With `targets`, the texts of the blanks, for training: `input_ids`, `position_ids`, `attention_mask` and
        `labels` (not shifted; -100 in the context) of `total = length + max_gen_length` tokens; a target ends in
        `<|endofpiece|>` or is cut at `max_gen_length` tokens.

        Args:
            model_input: `tokenizer(texts, return_tensors="pt", padding=True)`.
            padding: with targets, whether `total` is `length + max_gen_length` even if all of them are shorter.

        Raises:
            ValueError: a text without a blank, or not as many targets as texts.
        """
        input_ids, attention_mask = _tensor(model_input, "input_ids"), _tensor(model_input, "attention_mask")
        batch, length = input_ids.shape
        pieces: list[list[int]] = []
        if targets is not None:
            pieces = self._pieces(targets, batch, max_gen_length)
            if not padding:
                max_gen_length = max(map(len, pieces))
        blanks = self._first_blank(input_ids, self.mask_token_ids)
        position_ids, mask = _inputs_of_pieces(attention_mask, blanks, [max_gen_length])
        if targets is None:
            starts = input_ids.new_full((batch, 1), self.sop_token_id)
            inputs = {"input_ids": torch.cat([input_ids, starts], dim=1), "position_ids": position_ids}
            return BatchEncoding(inputs | {"generation_attention_mask": mask})
        written = input_ids.new_full((batch, max_gen_length + 1), self.pad_token_id)
        labels = input_ids.new_full((batch, length + max_gen_length), IGNORED)
        for row, piece in enumerate(pieces):
            written[row, : len(piece) + 1] = input_ids.new_tensor([self.sop_token_id, *piece])
            labels[row, length : length + len(piece)] = written[row, 1 : len(piece) + 1]
        input_ids = torch.cat([input_ids, written[:, :-1]], dim=1)
        return BatchEncoding(
            {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": mask, "labels": labels}
        )

    def build_inputs_for_multiple_choice(
        self, model_input: Mapping[str, Any], choices: Sequence[Sequence[str]], max_length: int | None = None
    ) -> GLMBatchEncoding:
        """The model's input for weighing what could stand in the first `[MASK]` of each text.

        The choices of a text are written behind it one after the other; each sees the text and itself. Returns
        `input_ids` `[batch, total]`, `position_ids` `[batch, 2, total]`, `attention_mask` `[batch, 1, total, total]`,
        and, for every choice of every text, its tokens (`choice_ids`) and where they are predicted (`choice_indices`).

        Args:
            model_input: `tokenizer(texts, return_tensors="pt", padding=True)`.
            choices: a list of texts for each text.
            max_length: not used, as in the original.

        Raises:
            ValueError: a text without `[MASK]`, an empty choice, or not as many lists of choices as texts.
        """
        input_ids, attention_mask = _tensor(model_input, "input_ids"), _tensor(model_input, "attention_mask")
        if len(choices) != len(input_ids):
            raise ValueError(f"there are {len(choices)} lists of choices for {len(input_ids)} texts.")
        blanks = self._first_blank(input_ids, [self.mask_token_id])
        rows: list[dict[str, Any]] = []
        for ids, mask, blank, texts in zip(input_ids, attention_mask, blanks, choices, strict=True):
            pieces = self._plain_ids(texts)
            if [] in pieces:
                raise ValueError(f"the choice {texts[pieces.index([])]!r} has no tokens.")
            lengths = [len(piece) for piece in pieces]
            position_ids, seen = _inputs_of_pieces(mask[None], blank[None], lengths)
            written = [index for piece in pieces for index in (self.sop_token_id, *piece[:-1])]
            places = torch.arange(len(ids), len(ids) + len(written), device=ids.device)
            rows.append(
                {
                    "input_ids": torch.cat([ids, ids.new_tensor(written)]),
                    "position_ids": position_ids[0],
                    "attention_mask": seen[0],
                    "choice_ids": [ids.new_tensor(piece) for piece in pieces],
                    "choice_indices": list(places.split(lengths)),
                }
            )
        total = max(len(row["input_ids"]) for row in rows)
        for row in rows:
            missing = total - len(row["input_ids"])
            last = row["position_ids"][:, -1:].expand(-1, missing)
            row["input_ids"] = torch.nn.functional.pad(row["input_ids"], (0, missing))
            row["position_ids"] = torch.cat([row["position_ids"], last], dim=1)
            row["attention_mask"] = torch.nn.functional.pad(row["attention_mask"], (0, missing, 0, missing))
        columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
        tensors = ("input_ids", "position_ids", "attention_mask")
        return GLMBatchEncoding(columns | {name: torch.stack(columns[name]) for name in tensors})

    def _pieces(self, targets: str | Sequence[str], count: int, max_length: int) -> list[list[int]]:
        """The ids of the texts of as many blanks, each up to its end or `max_length`."""
        texts = [targets] if isinstance(targets, str) else list(targets)
        if len(texts) != count:
            raise ValueError(f"there are {len(texts)} targets for {count} texts.")
        return [[*ids, self.eop_token_id][:max_length] for ids in self._plain_ids(texts)]

    def _plain_ids(self, texts: Sequence[str]) -> list[list[int]]:
        tokenizer: Any = self
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def _first_blank(self, input_ids: torch.Tensor, mask_token_ids: list[int]) -> torch.Tensor:
        """`[batch]`: where the first of the tokens stands."""
        found = torch.isin(input_ids, input_ids.new_tensor(mask_token_ids))
        if not found.any(dim=1).all():
            names = ", ".join(self.convert_ids_to_tokens(mask_token_ids))
            row = int((~found.any(dim=1)).nonzero()[0])
            raise ValueError(
                f"Cannot find mask token in the input: text {row} has none of {names}. Was it truncated away?"
            )
        return found.int().argmax(dim=1)


def _tensor(model_input: Mapping[str, Any], name: str) -> torch.Tensor:
    value = model_input[name]
    try:
        value = torch.as_tensor(value)
    except ValueError as error:
        raise ValueError(f"{name} has rows of different lengths: tokenize with padding=True.") from error
    if value.dim() != 2:
        raise ValueError(f"{name} must be of shape [batch, length]: tokenize with return_tensors='pt'.")
    return value


def _inputs_of_pieces(
    attention_mask: torch.Tensor, blanks: torch.Tensor, lengths: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions `[batch, 2, total]` and mask `[batch, 1, total, total]` of texts, `[batch, length]`, and the pieces of these
    lengths behind each: all fill the blank at `blanks`, `[batch]`, and see the text and themselves, not each other."""
    batch, length = attention_mask.shape
    inside = torch.cat([torch.arange(1, size + 1, device=blanks.device) for size in lengths])
    position_ids = blanks.new_zeros(batch, 2, length + len(inside))
    position_ids[:, 0, :length] = torch.arange(length, device=blanks.device)
    position_ids[:, 0, length:] = blanks[:, None]
    position_ids[:, 1, length:] = inside
    causal = [attention_mask.new_ones(size, size).tril() for size in lengths]
    mask = torch.block_diag(attention_mask.new_zeros(length, length), *causal).repeat(batch, 1, 1, 1)
    mask[..., :length] = attention_mask[:, None, None]
    return position_ids, mask


class SurroundedTextMixin:
    """`[CLS]` text `<|endoftext|>`, and no form for two texts."""

    NO_PAIRS = "GLM has no form for two texts: join them, or pass add_special_tokens=False."

    def update_post_processor(self) -> None:
        self._add_bos_token = self._add_eos_token = False
        before, after = str(self.cls_token), str(self.eos_token)
        surround_texts(self._tokenizer, [before, "$A", after], [before, "$A", "$B", after])

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        if token_ids_1 is not None:
            raise ValueError(self.NO_PAIRS)
        return [self.cls_token_id, *token_ids_0, self.eos_token_id]

    def _encode_plus(self, text, text_pair=None, add_special_tokens: bool = True, **kwargs: Any) -> BatchEncoding:
        if text_pair is not None and add_special_tokens:
            raise ValueError(self.NO_PAIRS)
        return super()._encode_plus(text, text_pair, add_special_tokens=add_special_tokens, **kwargs)


class GLMChineseTokenizer(SurroundedTextMixin, GLMTokenizerMixin, SentencePieceMixin, OriginalVocabularyTokenizer):
    """SentencePiece BPE after NFKC, with white space collapsed: `[CLS]` text `<|endoftext|>`.

    Decoding puts a space between special tokens and the texts around them, as the original does.

    Args:
        vocab_file: the original `cog-pretrain.model`.

    Raises:
        ValueError: the file is missing, damaged or of another family; or two texts at once, for which GLM has no form.
    """

    vocab_files_names = {"vocab_file": "cog-pretrain.model", "tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    padding_side = "right"

    OTHER_FAMILY = (
        "{} is not the vocabulary of GLM's Chinese models: it has other pieces or rules. " + DOWNLOAD_AGAIN + "."
    )
    PUBLISHED_SIZES = {50_048: 50_010}

    # Behind the pieces of the file, in this order.
    ADDED_TOKENS = (
        *("<|endoftext|>", "[SEP]", "[CLS]", "[MASK]", "[UNUSED1]", "[UNUSED2]"),
        *("<|startofpiece|>", "<|endofpiece|>", "[sMASK]", "[gMASK]"),
    )

    NAMED_TOKENS = {
        **{"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "unk_token": "[UNK]"},
        **{"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    }

    def __init__(self, vocab_file=None, **kwargs: Any):
        if "additional_special_tokens" not in kwargs and "extra_special_tokens" not in kwargs:
            kwargs["extra_special_tokens"] = list(self.ADDED_TOKENS[4:])
        kwargs = {**self.NAMED_TOKENS, "clean_up_tokenization_spaces": True, **kwargs}
        super().__init__(vocab_file=vocab_file, **kwargs)

    def read_model(self, vocab_file: str) -> SentencePieceModel:
        model = super().read_model(vocab_file)
        if model.model_type is not ModelType.BPE or model.symbols != ["<n>"] or model.byte_fallback:
            raise ValueError(self.OTHER_FAMILY.format(vocab_file))
        # The original knows the unknown piece as [UNK]; "<unk>" is text like any other.
        return replace(model, texts=["[UNK]" if text == model.unknown else text for text in model.texts])

    def backend_of(self, model: SentencePieceModel) -> Tokenizer:
        backend = super().backend_of(model)
        backend.decoder = build_decoder(model, any_of(model.of_type(PieceType.CONTROL)), {model.unknown: " ⁇ "})
        backend.add_special_tokens([taking_spaces(token) for token in (model.unknown, *self.ADDED_TOKENS)])
        return backend

    def check_backend(self, config: Mapping[str, Any], source: str | None) -> None:
        engine, ids = self._tokenizer.model, map(self._tokenizer.token_to_id, ("[UNK]", *self.ADDED_TOKENS))
        start = self._tokenizer.get_vocab_size(with_added_tokens=False)
        is_ours = isinstance(engine, BPE) and not engine.byte_fallback
        if not is_ours or list(ids) != [0, *range(start, start + len(self.ADDED_TOKENS))]:
            raise ValueError(self.OTHER_FAMILY.format(source))

    def is_settled(self, token: str) -> bool:
        return token in self.added_tokens_encoder

    def convert_tokens_to_string(self, tokens: Iterable[str | None]) -> str:
        """The texts of the tokens, and added tokens as they are, with spaces between."""
        added = self.added_tokens_encoder.keys() - {self.unk_token}
        parts: list[str] = []
        for is_added, run in groupby(known(tokens), key=added.__contains__):
            pieces = list(run)
            parts += pieces if is_added else [self._tokenizer.decoder.decode(pieces)]
        return " ".join(parts)
