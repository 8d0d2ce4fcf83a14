"""Training vocabularies in the originals' layouts, comparing them, and extending a model's.

train_baichuan(read_texts(["corpus"]), Path("vocabulary"), vocab_size=64_000)
BaichuanTokenizer.from_pretrained("vocabulary")
"""

import argparse
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece as spm
import torch
from sentencepiece import sentencepiece_model_pb2 as sp_pb2
from tokenizers.trainers import BpeTrainer

from ..models.qwen.tiktoken_bpe import build_backend, to_bytes, write_tiktoken
from ..models.qwen.tokenization_qwen import SPECIAL_TOKENS

# The first 237 user-defined symbols of Baichuan 2, in order: they put <reserved_106> (the user's turn) and
# <reserved_107> (the assistant's) at ids 195 and 196.
HTML_TAGS = ("img", "h2", "td", "strong", "table", "tr", "li", "b", "h3", "br", "h4", "h5", "p", "h1", "tbody")
BAICHUAN2_SYMBOLS = [
    *("<SEP>", "<CLS>", "\n", "\t"),
    *(form.format(tag) for tag in HTML_TAGS for form in ("<{}>", "<{}/>", "</{}>")),
    *"０１２３４５６７８９+-=，。！？、：￥.!?",
    *("...", "。。。", "。。。。。。", *"《》【】『』", "```", "<!--", "-->", "---", "<!DOCTYPE>"),
    *"；．＝＜＞－＋％‼㊣／｜",
    *(f"<reserved_{n}>" for n in range(12, 151)),
]
# The text as it is; SentencePiece's own default is NFKC without repeated blanks.
NOT_NORMALIZED: dict[str, Any] = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
}
LONGEST_PIECE = 32  # characters, as Baichuan 2 has
MAX_SENTENCE = 4000  # characters; SentencePiece leaves longer ones out without a word
BAICHUAN_FILES: dict[str, dict[str, Any]] = {
    "tokenizer_config.json": {
        "tokenizer_class": "BaichuanTokenizer",
        **{"add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False},
        **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"},
        "model_max_length": 4096,
        "sp_model_kwargs": {},
    },
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"},
}
QWEN_FILES: dict[str, dict[str, Any]] = {
    "tokenizer_config.json": {"tokenizer_class": "QWenTokenizer", "model_max_length": 8192}
}


# ---- training ----


def train_sentencepiece(texts: Iterable[str], **options: Any) -> Any:
    """A SentencePiece model as protobuf: BPE with byte fallback and single digits, unless the options say otherwise.

    Raises:
        ValueError: the texts do not yield a vocabulary of that size.
    """
    buffer = io.BytesIO()
    shared = {"model_type": "bpe", "character_coverage": 0.9999, "split_digits": True, "byte_fallback": True}
    # Where no text has a space, those of other texts would come back as the bytes of `▁`.
    shared["required_chars"] = "▁"
    options = {"num_threads": 1, "minloglevel": 2, **shared, **options}
    try:
        spm.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=buffer, **options)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"SentencePiece: {' '.join(str(error).split())}") from error
    return sp_pb2.ModelProto.FromString(buffer.getvalue())


def train_baichuan(
    texts: Iterable[str],
    folder: Path,
    vocab_size: int,
    symbols: Sequence[str] = (),
    character_coverage: float = 0.9999,
    threads: int = 1,
) -> None:
    """Writes a vocabulary as Baichuan 2's: `tokenizer.model` and the files beside it.

    The text is not normalized; digits are single, runs of spaces may be pieces of their own, what has no piece becomes bytes.

    Args:
        vocab_size: number of ids, those of 3 special tokens, Baichuan 2's first 237 symbols and 256 bytes included.
        symbols: further texts that are one token wherever they stand.
        character_coverage: share of the texts' characters that get a piece of their own.

    Raises:
        ValueError: the texts do not yield that many tokens, or fewer characters must do.
    """
    model = train_sentencepiece(
        _sentences(texts),
        vocab_size=vocab_size,
        character_coverage=character_coverage,
        add_dummy_prefix=False,
        max_sentencepiece_length=LONGEST_PIECE,
        max_sentence_length=4 * MAX_SENTENCE,
        num_threads=threads,
        user_defined_symbols=list(dict.fromkeys([*BAICHUAN2_SYMBOLS, *symbols])),
        **NOT_NORMALIZED,
    )
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    _write_json(folder, BAICHUAN_FILES)


def train_qwen(texts: Iterable[str], folder: Path, vocab_size: int) -> None:
    """Writes a vocabulary as Qwen's: `qwen.tiktoken`, byte-level BPE on NFC text cut by Qwen's pattern (single digits).

    Args:
        vocab_size: number of ids, those of the 208 special tokens included.

    Raises:
        ValueError: the texts do not yield that many tokens.
    """
    write_tiktoken(train_ranks(texts, vocab_size - len(SPECIAL_TOKENS)), folder / "qwen.tiktoken")
    _write_json(folder, QWEN_FILES)


def train_ranks(texts: Iterable[str], size: int) -> dict[bytes, int]:
    """`size` tokens of byte-level BPE, with their ranks: the bytes, then what was merged, in order.

    Raises:
        ValueError: the texts do not yield that many.
    """
    backend = build_backend({bytes([byte]): byte for byte in range(256)}, special_tokens=[])
    alphabet = list(backend.get_vocab())
    trainer = BpeTrainer(vocab_size=max(size, 0), initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    ranks = {to_bytes(name): rank for name, rank in backend.get_vocab().items()}
    if len(ranks) != size:
        least, most = 256 + len(SPECIAL_TOKENS), len(ranks) + len(SPECIAL_TOKENS)
        bound = f"must be at least {least}" if size < 256 else f"is too high for these texts, which yield {most}"
        raise ValueError(f"a vocabulary size of {size + len(SPECIAL_TOKENS)} {bound}")
    return ranks


STYLES: dict[str, Callable[..., None]] = {"baichuan": train_baichuan, "qwen": train_qwen}


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Texts cut at line ends, and where a line is too long for SentencePiece."""
    for text in texts:
        for line in text.splitlines(keepends=True):
            yield from (line[start : start + MAX_SENTENCE] for start in range(0, len(line), MAX_SENTENCE))


def _write_json(folder: Path, files: Mapping[str, Any]) -> None:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


# ---- comparing ----


def standard_domains() -> dict[str, list[str]]:
    """What is at hand everywhere: code of Python's own library, and digits."""
    numbers = [str(7919 * i % 10**9) for i in range(2000)]
    return {"code": [Path(argparse.__file__).read_text(encoding="utf-8")], "digits": [" ".join(numbers)]}


def compression(tokenizer: Any, texts: Iterable[str]) -> float:
    """Bytes of UTF-8 that a token stands for on average."""
    texts = list(texts)
    tokens = sum(len(tokenizer.encode(text, add_special_tokens=False, verbose=False)) for text in texts)
    return sum(len(text.encode()) for text in texts) / max(tokens, 1)


# ---- extending ----


def new_tokens(old: Any, trained: Any, count: int) -> list[str]:
    """The first `count` tokens of a trained vocabulary, the most frequent in front, that the old tokenizer needs several for and
    that are whole characters without white space.

    Raises:
        ValueError: there are not as many.
    """
    found: dict[str, None] = {}
    for index in sorted(set(range(len(trained))).difference(trained.all_special_ids)):
        text = trained.decode([index]).strip()
        is_text = "\ufffd" not in text and len(text.split()) == 1
        if is_text and text not in found and len(old.encode(text, add_special_tokens=False)) > 1:
            found[text] = None
        if len(found) == count:
            return list(found)
    raise ValueError(f"the texts yield {len(found)} tokens that the vocabulary lacks, and {count} are wanted")


@torch.no_grad()
def extend_vocabulary(model: Any, tokenizer: Any, tokens: Sequence[str], init: str = "subtokens") -> None:
    """Adds tokens to a tokenizer and rows for them to a model's embeddings and output head.

    Args:
        init: what a new row is: the mean of the rows of the tokens that its text had before (`subtokens`), or of all (`mean`).

    Raises:
        ValueError: a token is there already.
    """
    if known := [
        token for token in tokens if tokenizer.convert_tokens_to_ids(token) not in (None, tokenizer.unk_token_id)
    ]:
        raise ValueError(f"the vocabulary has {', '.join(map(repr, known[:5]))} already")
    before = len(tokenizer)
    parts = [tokenizer.encode(token, add_special_tokens=False) for token in tokens]
    tokenizer.add_tokens(list(tokens))
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [getattr(layer, "raw_weight", layer.weight) for layer in layers]  # NormHead's own weight is computed
    tables = {id(weight): weight for weight in weights}
    for table in tables.values():  # one, where they are tied
        old = table[:before].float()
        for index, part in zip(tokenizer.convert_tokens_to_ids(list(tokens)), parts, strict=True):
            table[index] = (old if init == "mean" else old[part]).mean(0)
