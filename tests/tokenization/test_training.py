"""Vocabularies trained here: what they are made of, that they encode as SentencePiece and tiktoken themselves do, and that
every text of the goldens comes back."""

import json
import unicodedata
from functools import cache

import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cnllm import BaichuanTokenizer, QWenTokenizer
from hf_cnllm.data.conversations import load_instructions
from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint
from hf_cnllm.models.qwen.tiktoken_bpe import PRETOKENIZE_REGEX, read_tiktoken
from hf_cnllm.models.qwen.tokenization_qwen import SPECIAL_TOKENS
from hf_cnllm.recipes import train_tokenizer
from hf_cnllm.tokenization.training import (
    BAICHUAN2_SYMBOLS,
    compression,
    extend_vocabulary,
    new_tokens,
    train_baichuan,
    train_qwen,
)
from tokenizer_goldens import FIXTURES

CODE = "def first(x):\n    if x:\n        return x[0]\n"
TEXTS = [message["content"] for conversation in load_instructions() for message in conversation] + [CODE * 50]
SIZE = 2500


@cache
def golden_strings():
    files = sorted((FIXTURES / "goldens").glob("*.json"))
    cases = (case for file in files for case in json.loads(file.read_text(encoding="utf-8"))["strings"])
    return list(dict.fromkeys(case["text"] for case in cases))


@pytest.fixture(scope="module")
def baichuan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baichuan")
    train_baichuan(TEXTS, folder, SIZE, symbols=["[药品]"])
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    train_qwen(TEXTS, folder, SIZE)
    return folder


def test_baichuan_encodes_as_sentencepiece_and_every_text_comes_back(baichuan):
    tokenizer = AutoTokenizer.from_pretrained(baichuan)
    assert type(tokenizer) is BaichuanTokenizer and len(tokenizer) == SIZE
    original = sentencepiece.SentencePieceProcessor(model_file=str(baichuan / "tokenizer.model"))
    for text in golden_strings():
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ids == original.encode(text), text
        assert tokenizer.decode(ids) == text.replace("▁", " "), "to SentencePiece, ▁ is a space"


def test_spaces_come_back_where_no_text_had_one(tmp_path):
    texts = ["".join(text.split()) for text in TEXTS]
    train_baichuan(texts, tmp_path, SIZE)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer("你 好  ")["input_ids"]) == "你 好  "


def test_baichuan_has_the_rules_of_the_original(baichuan):
    tokenizer = AutoTokenizer.from_pretrained(baichuan)
    ids = tokenizer.convert_tokens_to_ids
    assert (ids("<unk>"), ids("<s>"), ids("</s>"), ids("<reserved_106>"), ids("<reserved_107>")) == (0, 1, 2, 195, 196)
    assert [token for token in tokenizer.tokenize("２0241") if token.isdigit()] == [*"２0241"]
    assert "▁▁▁▁" in tokenizer.tokenize("    return"), "a run of spaces"
    assert tokenizer.tokenize("用[药品]吧")[1] == "[药品]"
    assert tokenizer.tokenize("龘") == ["<0xE9>", "<0xBE>", "<0x98>"]
    assert set(BAICHUAN2_SYMBOLS) <= set(tokenizer.get_vocab())
    assert tokenizer.apply_chat_template([{"role": "user", "content": "你好"}], return_dict=False)[0] == 195


def test_qwen_encodes_as_tiktoken_and_every_text_comes_back(qwen):
    tiktoken = pytest.importorskip("tiktoken")
    tokenizer = AutoTokenizer.from_pretrained(qwen)
    assert type(tokenizer) is QWenTokenizer and len(tokenizer) == SIZE
    ranks = read_tiktoken(qwen / "qwen.tiktoken")
    assert len(ranks) == SIZE - len(SPECIAL_TOKENS)
    original = tiktoken.Encoding("trained", pat_str=PRETOKENIZE_REGEX, mergeable_ranks=ranks, special_tokens={})
    for text in [*golden_strings(), *TEXTS]:
        ids = tokenizer.encode(text, allowed_special=set(), disallowed_special=())
        normal = unicodedata.normalize("NFC", text)
        assert ids == original.encode(normal, disallowed_special=()), text
        assert tokenizer.decode(ids) == normal
    assert tokenizer.tokenize("12345") == [*"12345"]


@pytest.mark.parametrize("train", [train_baichuan, train_qwen])
@pytest.mark.parametrize("size", [100, 100_000])
def test_sizes_that_cannot_be_are_refused(train, size, tmp_path):
    with pytest.raises(ValueError, match=r"(?i)vocabulary size"):
        train(TEXTS[:20], tmp_path, size)
    assert not list(tmp_path.iterdir())


def test_compression_counts_bytes_per_token(baichuan):
    tokenizer = AutoTokenizer.from_pretrained(baichuan)
    assert compression(tokenizer, ["123", "4"]) == 1.0
    assert compression(tokenizer, TEXTS) > 2
    assert compression(tokenizer, []) == 0


@pytest.mark.parametrize("family", ["baichuan", "qwen"])
def test_a_vocabulary_is_extended(family, baichuan, qwen, tmp_path):
    write_tiny_checkpoint(family, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    before, rows = len(tokenizer), model.get_input_embeddings().weight.detach().clone()
    parts = tokenizer.encode("阿司匹林", add_special_tokens=False)
    assert len(parts) > 1
    extend_vocabulary(model, tokenizer, ["阿司匹林", "布洛芬"])
    assert len(tokenizer) == before + 2
    ids = tokenizer.encode("吃阿司匹林吧", add_special_tokens=False)
    assert before in ids and tokenizer.decode(ids) == "吃阿司匹林吧"
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert layer.weight.shape[0] >= len(tokenizer)
    assert torch.equal(model.get_input_embeddings().weight[:before], rows[:before]), "the old rows stay"
    assert torch.allclose(model.get_input_embeddings().weight[before], rows[parts].mean(0), atol=1e-6)
    with pytest.raises(ValueError, match="already"):
        extend_vocabulary(model, tokenizer, ["布洛芬"])
    extend_vocabulary(model, tokenizer, ["对乙酰氨基酚"], init="mean")
    weight = model.get_input_embeddings().weight
    assert torch.allclose(weight[before + 2], weight[: before + 2].mean(0), atol=1e-5)
    model.save_pretrained(tmp_path / "extended")
    tokenizer.save_pretrained(tmp_path / "extended")
    again = AutoTokenizer.from_pretrained(tmp_path / "extended")
    assert again.encode("吃阿司匹林吧", add_special_tokens=False) == ids
    output = AutoModelForCausalLM.from_pretrained(tmp_path / "extended")(torch.tensor([ids]))
    assert output.logits.shape[-1] >= len(again)


def test_new_tokens_are_what_the_old_vocabulary_lacks(baichuan, tmp_path):
    train_qwen(["阿司匹林可以缓解疼痛。"] * 50 + TEXTS, tmp_path, 1200)
    old, trained = AutoTokenizer.from_pretrained(baichuan), AutoTokenizer.from_pretrained(tmp_path)
    found = new_tokens(old, trained, 20)
    assert len(set(found)) == 20
    assert all(len(old.encode(token, add_special_tokens=False)) > 1 and token == token.strip() for token in found)
    with pytest.raises(ValueError, match="are wanted"):
        new_tokens(old, trained, 10**6)


def run_program(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["train_tokenizer.py", *map(str, words)])
    train_tokenizer.main()


@pytest.mark.parametrize(("style", "kind"), [("baichuan", BaichuanTokenizer), ("qwen", QWenTokenizer)])
def test_the_program(style, kind, baichuan, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    (tmp_path / "zh.txt").write_text("今天天气很好", encoding="utf-8")
    words = ["--input", tmp_path / "a.txt", "--vocab-size", 2200, "--style", style, "--output", tmp_path / "out"]
    run_program(monkeypatch, *words, "--compare", baichuan, "--domains", f"zh={tmp_path / 'zh.txt'}")
    assert type(AutoTokenizer.from_pretrained(tmp_path / "out")) is kind
    assert "| input | zh |" in capsys.readouterr().out
    table = json.loads((tmp_path / "out" / "compression.json").read_text())
    assert list(table) == [str(tmp_path / "out"), str(baichuan)]
    assert all(set(row) == {"code", "digits", "input", "zh"} and min(row.values()) > 0.5 for row in table.values())
    with pytest.raises(FileExistsError, match="not empty"):
        run_program(monkeypatch, *words)


def test_the_program_extends_a_checkpoint(tmp_path, monkeypatch):
    write_tiny_checkpoint("baichuan", tmp_path / "model")
    texts = ["阿司匹林可以缓解疼痛，布洛芬也可以缓解疼痛。"] * 30 + TEXTS
    (tmp_path / "a.txt").write_text("\n".join(texts), encoding="utf-8")
    words = ["--input", tmp_path / "a.txt", "--style", "baichuan", "--extend", tmp_path / "model"]
    run_program(monkeypatch, *words, "--vocab-size", 2405, "--output", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer) == 2405
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size >= 2405
    with pytest.raises(ValueError, match="ids already"):
        run_program(monkeypatch, *words, "--vocab-size", 2400, "--output", tmp_path / "other")


@pytest.mark.parametrize(
    ("content", "words", "message"),
    [
        ("", [], "no record with a text"),
        ("x", ["--domains", "zh"], "NAME=FILE"),
        ("x", ["--style", "qwen", "--threads", "2"], "has no threads"),
        (None, [], "no such file"),
    ],
)
def test_bad_input_leaves_nothing(content, words, message, tmp_path, monkeypatch):
    if content is not None:
        (tmp_path / "a.txt").write_text(content)
    given = ["--input", tmp_path / "a.txt", "--vocab-size", 2200, "--style", "baichuan", "--output", tmp_path / "out"]
    with pytest.raises((ValueError, OSError), match=message):
        run_program(monkeypatch, *given, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["baichuan", "qwen", "chatglm", "chatglm2", "glm", "glm130b"])
def test_training_anew_from_a_tokenizer(family, tmp_path):
    """What it makes loads again, or it says that it cannot."""
    write_tiny_checkpoint(family, tmp_path / "old")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "old")
    if family not in ("baichuan", "qwen"):
        with pytest.raises(NotImplementedError, match=f"load it as {tokenizer.vocab_files_names['vocab_file']}"):
            tokenizer.train_new_from_iterator(TEXTS, 900)
        return
    tokenizer.train_new_from_iterator(TEXTS, 900).save_pretrained(tmp_path / "new")
    again = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert len(again) < len(tokenizer) and again.decode(again("你好，世界")["input_ids"]) == "你好，世界"
