"""Checkpoints of two million random weights, as on the Hub but for the sizes.

`checkpoints/<name>/` holds the JSON files. The vocabulary is trained on the embedded instruction set with the library, the
algorithm and the normalizer of the original and with its layout of special pieces, and is read by the same code as the
Hub's.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import transformers
from sentencepiece import sentencepiece_model_pb2 as sp_pb2
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer, WordPieceTrainer

from ..data.conversations import load_instructions
from ..families import LINES, family_of
from ..hub.saving import write_json
from ..models.chatglm.vocabulary_chatglm import SPACE_SYMBOLS, VERSIONS
from ..models.glm.tokenization_glm import GLMChineseTokenizer
from ..models.qwen.tiktoken_bpe import write_tiktoken
from ..tokenization.training import BAICHUAN2_SYMBOLS, NOT_NORMALIZED, train_ranks, train_sentencepiece
from .dataset import SIGN_OFFS

PIECE_TOKENS = ["<|startofpiece|>", "<|endofpiece|>"]
ENGLISH_SIZE = 2000  # of the vocabularies of GPT-2, BERT and RoBERTa


def write_baichuan2(folder: Path, texts: Iterable[str]) -> None:
    model = train_sentencepiece(
        texts,
        vocab_size=2400,
        character_coverage=0.9998,
        add_dummy_prefix=False,
        max_sentencepiece_length=32,
        user_defined_symbols=BAICHUAN2_SYMBOLS,
        **NOT_NORMALIZED,
    )
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


def write_chatglm2(folder: Path, texts: Iterable[str]) -> None:
    model = train_sentencepiece(texts, vocab_size=2200, **NOT_NORMALIZED)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())


def write_chatglm(folder: Path, texts: Iterable[str]) -> None:
    """Unigram, in ChatGLM-6B's order: control, `<n>`, text, ChatGLM's own controls, tab and runs of blanks, bytes."""
    lines = (text.replace("\n", "<n>") for text in texts)
    model = train_sentencepiece(lines, vocab_size=2000, model_type="unigram", pad_id=3, user_defined_symbols=["<n>"])
    kind = sp_pb2.ModelProto.SentencePiece
    for names, piece_type in ((VERSIONS["chatglm"].control, kind.CONTROL), (SPACE_SYMBOLS, kind.USER_DEFINED)):
        for name in names:
            model.pieces.add(piece=name, type=piece_type)
    model.pieces.sort(key=lambda piece: piece.type == kind.BYTE)  # SentencePiece trains with the bytes up front
    (folder / "ice_text.model").write_bytes(model.SerializeToString())


def write_glm_chinese(folder: Path, texts: Iterable[str]) -> None:
    lines = (text.replace("\n", "<n>") for text in texts)
    model = train_sentencepiece(
        lines, vocab_size=2000, split_digits=False, byte_fallback=False, user_defined_symbols=["<n>"]
    )
    (folder / "cog-pretrain.model").write_bytes(model.SerializeToString())
    added = {token: index for index, token in enumerate(GLMChineseTokenizer.ADDED_TOKENS, len(model.pieces))}
    write_json(folder / "added_tokens.json", added)


def write_glm_gpt2(folder: Path, texts: Iterable[str]) -> None:
    _train_byte_bpe(texts, ["<|endoftext|>"]).model.save(str(folder))
    _add_tokens(folder, [*PIECE_TOKENS, "[CLS]", "[MASK]", "[SEP]", "[UNK]", "[gMASK]", "[sMASK]"])


def write_glm_roberta(folder: Path, texts: Iterable[str]) -> None:
    _train_byte_bpe(texts, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]).model.save(str(folder))
    _add_tokens(folder, PIECE_TOKENS)


def write_glm_bert(folder: Path, texts: Iterable[str]) -> None:
    texts = list(texts)
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    # The trainer numbers what goes on with a word in another order each time, unless it is told.
    words = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str("\n".join(texts)))
    inside = sorted({f"##{char}" for word, _ in words for char in word[1:]})
    trainer = WordPieceTrainer(vocab_size=ENGLISH_SIZE, special_tokens=[*specials, *inside], show_progress=False)
    backend.train_from_iterator(texts, trainer)
    vocab = backend.get_vocab()
    (folder / "vocab.txt").write_text(
        "".join(f"{token}\n" for token in sorted(vocab, key=vocab.get)), encoding="utf-8"
    )
    _add_tokens(folder, PIECE_TOKENS)


def _train_byte_bpe(texts: Iterable[str], specials: list[str]) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        BpeTrainer(vocab_size=ENGLISH_SIZE, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    return backend


def _add_tokens(folder: Path, tokens: list[str]) -> None:
    write_json(folder / "added_tokens.json", {token: index for index, token in enumerate(tokens, ENGLISH_SIZE)})


def write_glm130b(folder: Path, texts: Iterable[str]) -> None:
    """Unigram in icetk's order, which knows white space as one space alone."""
    lines = (" ".join(text.split()) for text in texts)
    symbols = {"pad_id": 3, "user_defined_symbols": ["<n>"]}
    model = train_sentencepiece(lines, vocab_size=1700, model_type="unigram", byte_fallback=False, **symbols)
    (folder / "ice_text.model").write_bytes(model.SerializeToString())


def write_qwen(folder: Path, texts: Iterable[str]) -> None:
    write_tiktoken(train_ranks(texts, 2200), folder / "qwen.tiktoken")


class Recipe(NamedTuple):
    """How a checkpoint is trained; `batch_size` in conversations a step, `learning_rate` of full fine-tuning."""

    epochs: int = 24
    batch_size: int = 16
    learning_rate: float = 1.5e-3
    adapter_learning_rate: float = 1e-2


# Folder in `checkpoints/` -> how its vocabulary is made, and what makes the model learn the instruction set by heart.
TINY_FAMILIES: dict[str, tuple[Callable[[Path, Iterable[str]], None], Recipe]] = {
    "baichuan": (write_baichuan2, Recipe()),
    "qwen": (write_qwen, Recipe()),
    "chatglm": (write_chatglm, Recipe(learning_rate=3e-3)),
    "chatglm2": (write_chatglm2, Recipe()),
    "chatglm3": (write_chatglm2, Recipe()),
    "glm": (write_glm_chinese, Recipe(epochs=36, batch_size=8, learning_rate=1e-3)),
    "glm130b": (write_glm130b, Recipe(epochs=36, batch_size=8, learning_rate=1e-3)),
}
# More checkpoints of families that are listed above: GLM's English ones.
TINY_VARIANTS: dict[str, tuple[Callable[[Path, Iterable[str]], None], Recipe]] = {
    "glm_gpt2": (write_glm_gpt2, TINY_FAMILIES["glm"][1]),
    "glm_bert": (write_glm_bert, TINY_FAMILIES["glm"][1]),
    "glm_roberta": (write_glm_roberta, TINY_FAMILIES["glm"][1]),
}
OWN_RECIPE = Recipe(epochs=3, batch_size=4, learning_rate=1e-5, adapter_learning_rate=1e-4)  # for trained weights

# The name of a tiny checkpoint -> the published line that it is laid out as.
LINE_OF = {line.demo: name for name, line in LINES.items() if line.demo is not None}


def write_tiny_checkpoint(family: str, folder: str | Path, seed: int = 0) -> None:
    """Writes a checkpoint of random weights into `folder`, in the family's layout on the Hub.

    Args:
        family: a key of `TINY_FAMILIES` or `TINY_VARIANTS`.
        folder: created; must not exist.
        seed: of the random weights.
    """
    folder = Path(shutil.copytree(Path(__file__).parent / "checkpoints" / family, folder))
    texts = [message["content"] for conversation in load_instructions() for message in conversation]
    write_vocabulary, _ = (TINY_FAMILIES | TINY_VARIANTS)[family]
    write_vocabulary(folder, texts + [sign_off.strip() for sign_off in SIGN_OFFS.values()])
    transformers.set_seed(seed)
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, family_of(config).generates_with).from_config(config)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)  # the weights alone are wanted: config.json stays as on the Hub
        shutil.move(Path(scratch) / "model.safetensors", folder)
