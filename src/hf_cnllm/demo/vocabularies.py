"""Small vocabulary files in each family's own manner, trained on a handful of texts.

Every function writes the file(s) that the family's tokenizer is built from, trained with the library, the algorithm and
the normaliser of the original and with its layout of special pieces, so that the result is read by the same code as the
Hub's vocabulary. Only the number of pieces differs.
"""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece as spm
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from ..models.qwen.tiktoken_bpe import PRETOKENIZE_REGEX, to_bytes, write_tiktoken

ModelProto = Any  # protobuf makes its classes at run time, so type checkers do not see sp_pb2.ModelProto

# The first 237 user-defined symbols of Baichuan 2, in order: they put <reserved_106> (the user's turn) and
# <reserved_107> (the assistant's) at ids 195 and 196.
BAICHUAN2_SYMBOLS = [
    *("<SEP>", "<CLS>", "\n", "\t"),
    *("<img>", "<img/>", "</img>", "<h2>", "<h2/>", "</h2>", "<td>", "<td/>", "</td>"),
    *("<strong>", "<strong/>", "</strong>", "<table>", "<table/>", "</table>", "<tr>", "<tr/>", "</tr>"),
    *("<li>", "<li/>", "</li>", "<b>", "<b/>", "</b>", "<h3>", "<h3/>", "</h3>", "<br>", "<br/>", "</br>"),
    *("<h4>", "<h4/>", "</h4>", "<h5>", "<h5/>", "</h5>", "<p>", "<p/>", "</p>", "<h1>", "<h1/>", "</h1>"),
    *("<tbody>", "<tbody/>", "</tbody>"),
    *"０１２３４５６７８９+-=，。！？、：￥.!?",
    *(
        "...",
        "。。。",
        "。。。。。。",
        *"《》【】『』",
        "```",
        "<!--",
        "-->",
        "---",
        "<!DOCTYPE>",
        *"；．＝＜＞－＋％‼㊣／｜",
    ),
    *(f"<reserved_{n}>" for n in range(12, 151)),
]

CHATGLM_CONTROLS = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
CHATGLM_BLANKS = ["<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81))]

GLM_SPECIALS = [
    *("<|endoftext|>", "[SEP]", "[CLS]", "[MASK]", "[UNUSED1]", "[UNUSED2]"),
    *("<|startofpiece|>", "<|endofpiece|>", "[sMASK]", "[gMASK]"),
]

QWEN_SPECIALS = 3 + 205  # <|endoftext|>, <|im_start|>, <|im_end|> and <|extra_0|> … <|extra_204|> follow the ranks


def write_baichuan2(folder: Path, texts: Iterable[str], size: int = 2400) -> int:
    """Write `tokenizer.model`: BPE, no normalisation, no dummy prefix, byte fallback. Returns the vocabulary size."""
    model = _train(
        texts,
        model_type="bpe",
        vocab_size=size,
        character_coverage=0.9998,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        byte_fallback=True,
        max_sentencepiece_length=32,
        user_defined_symbols=BAICHUAN2_SYMBOLS,
    )
    return _write(model, folder / "tokenizer.model")


def write_chatglm2(folder: Path, texts: Iterable[str], size: int = 2200) -> int:
    """Write `tokenizer.model`: BPE, no normalisation, dummy prefix, byte fallback. Returns the number of pieces."""
    model = _train(
        texts,
        model_type="bpe",
        vocab_size=size,
        character_coverage=0.9999,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        byte_fallback=True,
    )
    return _write(model, folder / "tokenizer.model")


def write_chatglm(folder: Path, texts: Iterable[str], size: int = 2000) -> int:
    """Write `ice_text.model`: Unigram, NFKC, byte fallback, in ChatGLM-6B's order of pieces. Returns their number.

    The order is: control, `<n>`, text pieces, ChatGLM's own controls, tab and runs of blanks, bytes. SentencePiece
    trains with the bytes up front, so they are moved to the end afterwards.
    """
    model = _train(
        (text.replace("\n", "<n>") for text in texts),
        model_type="unigram",
        vocab_size=size,
        character_coverage=0.9999,
        normalization_rule_name="nmt_nfkc",
        split_digits=True,
        byte_fallback=True,
        pad_id=3,
        user_defined_symbols=["<n>"],
    )
    piece_type = sp_pb2.ModelProto.SentencePiece.Type
    pieces = [piece for piece in model.pieces if piece.type != piece_type.BYTE]
    pieces += [sp_pb2.ModelProto.SentencePiece(piece=name, type=piece_type.CONTROL) for name in CHATGLM_CONTROLS]
    pieces += [sp_pb2.ModelProto.SentencePiece(piece=name, type=piece_type.USER_DEFINED) for name in CHATGLM_BLANKS]
    pieces += [piece for piece in model.pieces if piece.type == piece_type.BYTE]
    ordered = sp_pb2.ModelProto()
    ordered.CopyFrom(model)
    ordered.ClearField("pieces")
    ordered.pieces.extend(pieces)
    return _write(ordered, folder / "ice_text.model")


def write_glm_chinese(folder: Path, texts: Iterable[str], size: int = 2000) -> int:
    """Write `cog-pretrain.model` (BPE, NFKC) and `added_tokens.json`. Returns the vocabulary size with the added."""
    model = _train(
        (text.replace("\n", "<n>") for text in texts),
        model_type="bpe",
        vocab_size=size,
        character_coverage=0.9999,
        normalization_rule_name="nmt_nfkc",
        user_defined_symbols=["<n>"],
    )
    pieces = _write(model, folder / "cog-pretrain.model")
    added = {token: pieces + offset for offset, token in enumerate(GLM_SPECIALS)}
    (folder / "added_tokens.json").write_text(json.dumps(added, indent=2), encoding="utf-8")
    return pieces + len(added)


def write_qwen(folder: Path, texts: Iterable[str], size: int = 2200) -> int:
    """Write `qwen.tiktoken` (one base64 token and its rank a line). Returns the vocabulary size with the specials."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [to_bytes(token) for token, _ in by_id]
    # A tiktoken file starts with the 256 single bytes; only then does a token's rank say when its merge applies.
    single, merged = [t for t in tokens if len(t) == 1], [t for t in tokens if len(t) > 1]
    ranks = {token: rank for rank, token in enumerate([*single, *merged])}
    write_tiktoken(ranks, folder / "qwen.tiktoken")
    return len(ranks) + QWEN_SPECIALS


def _train(texts: Iterable[str], **options: Any) -> ModelProto:
    """Train a SentencePiece model in memory."""
    buffer = io.BytesIO()
    options = {"num_threads": 1, "minloglevel": 2, **options}
    spm.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=buffer, **options)
    model = sp_pb2.ModelProto()
    model.ParseFromString(buffer.getvalue())
    return model


def _write(model: ModelProto, path: Path) -> int:
    path.write_bytes(model.SerializeToString())
    return len(model.pieces)
