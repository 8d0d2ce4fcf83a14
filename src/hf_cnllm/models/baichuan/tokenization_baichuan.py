"""Tokenizer of Baichuan 1 and 2: one class, told apart by what is in `tokenizer.model`."""

import os
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from tokenizers import AddedToken
from tokenizers.models import BPE

from ...tokenization.backends import with_changes
from ...tokenization.base import known
from ...tokenization.chat_sections import ChatTokenizer
from ...tokenization.folder import DOWNLOAD_AGAIN, check_settings
from ...tokenization.sentencepiece import mend_bytes
from ...tokenization.sentencepiece_mixin import SentencePieceMixin
from ...tokenization.templates import read_template
from .chat import TURN_TOKEN_IDS
from .configuration_baichuan import NORM_HEAD_BY_VOCAB_SIZE, has_norm_head

RESERVED = "<reserved_"
PROBE = "Ａ  b "
GENERATIONS = {"▁A▁▁b▁": "Baichuan 1", PROBE.replace(" ", "▁"): "Baichuan 2"}  # what their normalizers make of it


class BaichuanTokenizer(SentencePieceMixin, ChatTokenizer):
    """SentencePiece BPE with byte fallback: v1 after NFKC with a `▁` in front, v2 on the text as it is.

    Args:
        vocab_file: the original `tokenizer.model`. Built from a file by hand, the tokenizer takes any SentencePiece
            vocabulary; `from_pretrained` refuses another family's, and that of the other generation than config.json's.
        add_bos_token, add_eos_token: put `<s>` in front and `</s>` behind. The checkpoints say no to both; the
            default without a checkpoint is the original's (`<s>` in front).
        sp_model_kwargs: passed to `sentencepiece.SentencePieceProcessor` when `sp_model` is asked for.

    Ids, tokens, padding and decoding are the original's, quirks included: text beside a special token is decoded
    apart, with a space put in front of it (`[你, 好, </s>]` -> `" 你好</s>"`).
    """

    vocab_files_names = {"vocab_file": "tokenizer.model", "tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "right"
    can_be_trained_anew = True
    model_type = "baichuan"
    PUBLISHED_SIZES = {size: size for size in NORM_HEAD_BY_VOCAB_SIZE}
    NAMED_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": None}

    def __init__(
        self,
        vocab_file=None,
        *,
        tokenizer_file=None,
        tokenizer_object=None,
        sp_model_kwargs: dict[str, Any] | None = None,
        add_bos_token: bool | None = None,
        add_eos_token: bool | None = None,
        **kwargs,
    ):
        given = {"add_bos_token": add_bos_token, "add_eos_token": add_eos_token, "sp_model_kwargs": sp_model_kwargs}
        check_settings("BaichuanTokenizer", given)
        self.sp_model_kwargs = sp_model_kwargs or {}
        kwargs = {**self.NAMED_TOKENS, "clean_up_tokenization_spaces": False, **kwargs}
        for name, token in kwargs.items():
            if name.endswith("_token") and isinstance(token, AddedToken):
                # The checkpoints set `single_word` and `normalized`, which the original ignored.
                kwargs[name] = with_changes(token, single_word=False, normalized=False, special=True)
        super().__init__(vocab_file, tokenizer_file, tokenizer_object, sp_model_kwargs=self.sp_model_kwargs, **kwargs)
        # tokenizer.json says what it adds to a text; for tokenizer.model these are the original's defaults.
        is_saved = tokenizer_object is not None or os.path.isfile(tokenizer_file or "")
        ends = self._tokenizer.encode("").ids if is_saved else [self.bos_token_id]
        self._add_bos_token = self.bos_token_id in ends[:1] if add_bos_token is None else add_bos_token
        self._add_eos_token = self.eos_token_id in ends[-1:] if add_eos_token is None else add_eos_token
        self.update_post_processor()
        self.init_kwargs |= {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token}
        turns = [self._tokenizer.id_to_token(index) or "" for index in TURN_TOKEN_IDS.values()]
        if self.chat_template is None and all(piece.startswith(RESERVED) for piece in turns):
            header = "{{%- set user_token, assistant_token = {!r}, {!r} -%}}\n".format(*turns)
            self.chat_template = header + read_template("baichuan")

    def check_backend(self, config: Mapping[str, Any], source: str | None) -> None:
        engine, normalizer = self._tokenizer.model, self._tokenizer.normalizer
        form = normalizer and normalizer.normalize_str(PROBE)
        ids = [self._tokenizer.token_to_id(token) for token in ("<unk>", "<s>", "</s>", "[gMASK]")]
        is_ours = isinstance(engine, BPE) and engine.byte_fallback and ids == [0, 1, 2, None]
        if not is_ours or form not in GENERATIONS:
            raise ValueError(
                f"{source} is not a vocabulary of Baichuan: it has other pieces or rules. {DOWNLOAD_AGAIN}."
            )
        # A Baichuan 2 whose head was trained without its norm (`hf-cnllm export --to original`) is one by all else it says.
        readings = [config, {**config, "norm_head": None}] if config.get("norm_head") is False else [config]
        wanted = ["Baichuan 2" if has_norm_head(reading) else "Baichuan 1" for reading in readings]
        # Who saves a model of a size of their own beside a tokenizer may pair them as they like.
        is_published = (source or "").endswith(self.vocab_files_names["vocab_file"])
        is_published = is_published or config.get("vocab_size") in NORM_HEAD_BY_VOCAB_SIZE
        if is_published and config.keys() & {"norm_head", "vocab_size"} and GENERATIONS[form] not in wanted:
            raise ValueError(
                f"{source} is a vocabulary of {GENERATIONS[form]}'s kind, but config.json beside it is that of a model of "
                f"{wanted[0]}'s (`norm_head`). {DOWNLOAD_AGAIN}."
            )

    def convert_tokens_to_string(self, tokens: Iterable[str | None]) -> str:
        parts: list[str] = []
        for is_special, run in groupby(known(tokens), key=set(self.all_special_tokens).__contains__):
            if is_special and parts:
                parts.insert(-1, " ")  # in front of the text, not of the special token: the original's way
            pieces = list(run)
            parts.append("".join(pieces) if is_special else self._tokenizer.decoder.decode(mend_bytes(pieces)))
        return "".join(parts)

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """0 for the first text with its special tokens, 1 for the second."""
        first = self.build_inputs_with_special_tokens(token_ids_0)
        return [0] * len(first) + [1] * (len(self.build_inputs_with_special_tokens(token_ids_1)) if token_ids_1 else 0)

    def chat_control_pieces(self) -> list[str]:
        """The pieces without a text of their own: `<reserved_0>` …, `<SEP>`, `<CLS>`."""
        vocab = self._tokenizer.get_vocab(with_added_tokens=False)
        return [piece for piece in vocab if piece.startswith(RESERVED) or piece in ("<SEP>", "<CLS>")]


class BaiChuanTokenizer(BaichuanTokenizer):
    """The spelling in Baichuan-7B's files."""
