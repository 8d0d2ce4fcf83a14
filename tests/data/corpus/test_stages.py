"""What each stage of the corpus pipeline takes out and what it leaves."""

import contextlib
import random
import time

import pytest

pytest.importorskip("datatrove", reason="needs the extra data")

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_cnllm.data.corpus import Settings, run
from hf_cnllm.data.corpus.duplicates import _chains, jaccard
from hf_cnllm.data.corpus.embeddings import cluster, find_repeated
from hf_cnllm.data.corpus.filters import PersonalData
from hf_cnllm.data.corpus.quality import SentenceClassifier, train_classifier
from hf_cnllm.data.corpus.texts import ScriptTokenizer
from hf_cnllm.data.languages import language_by_script
from hf_cnllm.data.packing import pack
from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint

from .corpora import read_records, words, write_records


def kept(tmp_path, texts, stage, **changes):
    """(texts that are left, the stage's row of the statistics)."""
    path = write_records(tmp_path / "in.jsonl", [{"id": i, "text": text} for i, text in enumerate(texts)])
    statistics = run(Settings(**{"input": [path], "output": tmp_path / "out", "stages": (stage,), **changes}))
    return [record["text"] for record in read_records(tmp_path / "out")], statistics["stages"][-1]


# ---- words, sentences, scripts ----


@given(st.text(st.sampled_from("ab 1。！?.\n”…中文\t　")))
def test_spans_of_sentences_are_in_order_and_leave_out_white_space_only(text):
    spans = ScriptTokenizer().span_tokenize(text)
    ends = [0, *(end for _, end in spans)]
    assert [start for start, _ in spans] == ends[:-1] and not text[ends[-1] :].strip()
    assert len(ScriptTokenizer().sent_tokenize(text)) == len(spans)
    assert all(text[start:end].strip() for start, end in spans)


def test_words_and_sentences_of_both_languages():
    tokenizer = ScriptTokenizer()
    assert tokenizer.word_tokenize("我有3.5个 apples_x，ok!") == [
        *"我有",
        "3",
        ".",
        "5",
        "个",
        "apples_x",
        "，",
        "ok",
        "!",
    ]
    sentences = ["他说：“好。”", "然后走了！", "It is 3.5 m.", "Right?"]
    assert tokenizer.sent_tokenize("他说：“好。”然后走了！It is 3.5 m. Right?") == sentences


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("今天天气很好 ok", "zh"),
        ("It is fine", "en"),
        ("これは日本語です", "ja"),
        ("한국어", "ko"),
        ("123 …", "und"),
        ("Привет", "und"),
    ],
)
def test_languages_by_script(text, language):
    assert language_by_script(text)[0] == language


# ---- duplicates ----


def test_repeated_paragraphs_go_and_short_ones_stay(tmp_path):
    boiler = "本站所有文章均来自网络，转载请注明出处。"
    texts = [f"第{i}篇文章的正文，讲的是第{i}件事情。\n{boiler}\n谢谢\n完" for i in range(3)] + [boiler]
    left, row = kept(tmp_path, texts, "paragraph")
    assert left[0] == texts[0] and left[1:] == [text.replace(f"{boiler}\n", "") for text in texts[1:3]]
    assert row["dropped"] == 1 and row["details"]["removed_sentences"] == 3


def test_repeated_spans_of_three_sentences_go(tmp_path):
    span = "春眠不觉晓。处处闻啼鸟。夜来风雨声。"
    texts = [f"甲一。甲二！{span}甲三。", f"乙一。{span}乙二？", "丙一。春眠不觉晓。丙二。"]
    left, _ = kept(tmp_path, texts, "sentence")
    assert left == [texts[0], "乙一。乙二？", texts[2]]


@pytest.mark.parametrize("stage", ["minhash", "paragraph"])
def test_numbers_are_words(tmp_path, stage):
    texts = [" ".join(f"w{rng.randrange(900)}" for _ in range(40)) for rng in map(random.Random, range(5))]
    assert kept(tmp_path, texts, stage)[0] == texts


def test_chains_and_jaccard():
    pairs = np.array([[0, 1, 0, 2], [0, 2, 1, 5], [0, 3, 0, 4]])
    assert list(_chains(pairs)) == [[(0, 1), (0, 2), (1, 5)], [(0, 3), (0, 4)]]
    assert jaccard(np.array([1, 2, 3, 4]), np.array([2, 3, 4, 5])) == 3 / 5


def test_embeddings_find_texts_that_share_few_words(tmp_path):
    write_tiny_checkpoint("qwen", tmp_path / "model")
    texts = ["天气很好，我们去公园散步。", "天气很好，我们去公园散步", "The price of gold rose by three percent."]
    left, row = kept(tmp_path, texts, "embedding", embedder=str(tmp_path / "model"), embedding_threshold=0.9)
    assert left == [texts[0], texts[2]] and row["details"] == {"removed_documents": 1}


def test_k_means_puts_neighbors_together_and_large_blocks_agree_with_small(monkeypatch):
    from hf_cnllm.data.corpus import embeddings

    generator = torch.Generator().manual_seed(0)
    centers = torch.nn.functional.normalize(torch.randn(20, 16, generator=generator), dim=-1)
    vectors = centers.repeat(10, 1) + 0.01 * torch.randn(200, 16, generator=generator)
    vectors = torch.nn.functional.normalize(vectors, dim=-1)
    at_once = find_repeated(vectors, 0.95)
    assert at_once.sum() == 180 and not at_once[:20].any()
    monkeypatch.setattr(embeddings, "ONE_CLUSTER", 32)
    assert torch.equal(find_repeated(vectors, 0.95), at_once)
    clusters = cluster(centers.repeat(10, 1)).view(10, 20)
    assert (clusters == clusters[0]).all(), "copies of one center are never apart"


# ---- filters ----


def test_heuristics_go_by_the_script(tmp_path):
    rng = random.Random(0)
    stop = ["的", "了", "是", "在", "和", "有"]
    chinese = "".join(
        token + (rng.choice(stop) if i % 5 == 0 else "") for i, token in enumerate(words(rng, 120, True))
    )
    english = " ".join(
        rng.choice(["the", "of", "and", "with", *(["".join(rng.sample("abcdefghij", 6))] * 8)]) for _ in range(120)
    )
    bad = ["太短", "the of and", chinese[:80] * 5, "# alpha beta " * 100]
    left, row = kept(tmp_path, [chinese, english, *bad], "heuristics")
    assert left == [chinese, english]
    assert row["details"]["dropped_gopher_short_doc"] == 2 and sum(row["details"].values()) == 4


def test_language_filter(tmp_path):
    left, row = kept(tmp_path, ["今天天气很好", "It is fine", "한국어입니다"], "language", languages=("zh",))
    assert left == ["今天天气很好"] and row["details"] == {"dropped_en": 1, "dropped_ko": 1}


def test_language_filter_with_a_model_of_fasttext(tmp_path):
    fasttext = pytest.importorskip("fasttext", reason="needs fasttext-numpy2-wheel")
    examples = ["le chat est sur la table", "où est la gare", "the cat is on the table", "where is the station"]
    labels = ["fr", "fr", "en", "en"]
    (tmp_path / "train.txt").write_text(
        "".join(f"__label__{a} {b}\n" for a, b in zip(labels, examples, strict=True) for _ in range(50))
    )
    for _ in range(20):
        with contextlib.suppress(RuntimeError):  # this wheel's training meets NaN now and then
            options = {"thread": 1, "verbose": 0, "minn": 2, "maxn": 4, "bucket": 1000}
            model = fasttext.train_supervised(str(tmp_path / "train.txt"), **options)
            break
    model.save_model(str(tmp_path / "lid.bin"))
    changes = {"languages": ("fr",), "language_model": str(tmp_path / "lid.bin")}
    left, _ = kept(tmp_path, examples, "language", **changes)
    assert left == examples[:2]


GOOD = [
    "这部电影的摄影非常出色，情节也引人入胜。",
    "作者用平实的语言讲述了一个动人的故事。",
    "The study describes its method in detail.",
]
BAD = ["点击领取红包！！！加微信看片", "代开发票，诚信办证，加QQ！！！", "Buy cheap pills now!!! Click here!!!"]


def test_sentence_quality_learns_from_own_examples(tmp_path):
    for name, texts in (("good", GOOD), ("bad", BAD)):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts * 5), encoding="utf-8")
    texts = [GOOD[0] + GOOD[1] + "加微信看片！！！", BAD[0] + BAD[1], GOOD[2]]
    changes = {"quality_good": [tmp_path / "good.txt"], "quality_bad": [tmp_path / "bad.txt"]}
    left, row = kept(tmp_path, texts, "quality", **changes)
    assert left == [GOOD[0] + GOOD[1], GOOD[2]]
    assert row["details"]["dropped_bad_sentences"] == 1


def test_a_trained_classifier_is_saved_and_loaded(tmp_path):
    examples = [(text, True) for text in GOOD] + [(text, False) for text in BAD]
    model = train_classifier(examples)
    model.save(tmp_path / "model")
    assert SentenceClassifier.load(tmp_path / "model").score([*GOOD, ""]) == model.score([*GOOD, ""])
    assert train_classifier(examples).score(BAD) == model.score(BAD), "the same examples make the same model"
    with pytest.raises(ValueError, match="both kinds"):
        train_classifier(examples[:3])
    (tmp_path / "model" / "model.safetensors").write_bytes(b"?")
    with pytest.raises(ValueError, match="no quality model"):
        SentenceClassifier.load(tmp_path / "model")


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("写信给zhang.san+x@mail.example.com.cn吧", "写信给<EMAIL>吧"),
        ("电话13812345678，+86 138-1234-5678，010-62345678", "电话<PHONE>，<PHONE>，<PHONE>"),
        ("(555) 123-4567 or +44 20 7946 0958", "<PHONE> or <PHONE>"),
        ("身份证11010519491231002X。", "身份证<ID_NUMBER>。"),
        ("not an id: 110105194912310021", "not an id: 110105194912310021"),
        ("4111 1111 1111 1111", "<CARD_NUMBER>"),
        ("4111 1111 1111 1112", "4111 1111 1111 1112"),
        (
            "8.8.8.8 but 192.168.0.1, 1.2.3.4.5 and version 10.2.3",
            "<IP_ADDRESS> but 192.168.0.1, 1.2.3.4.5 and version 10.2.3",
        ),
        ("2001:4860:4860::8888 at 12:30:45", "<IP_ADDRESS> at 12:30:45"),
        ("key sk-abcdefghijklmnopqrstuvwx", "key <KEY>"),
        (
            "π=3.14159265358979323846, 2024-01-15, 订单20240115123456789",
            "π=3.14159265358979323846, 2024-01-15, 订单20240115123456789",
        ),
    ],
)
def test_personal_data_is_masked(text, masked):
    assert PersonalData().format(text) == masked


@pytest.mark.parametrize("unit", ["a!", "a.", "1 ", "a@", "1.", "a:", "+1 ", "a@a."])
def test_no_text_keeps_the_masks_busy(unit):
    start = time.process_time()
    PersonalData().format(unit * 50_000)
    ScriptTokenizer().span_tokenize(unit * 50_000)
    assert time.process_time() - start < 10


def test_decontamination_keeps_benchmarks_out(tmp_path):
    question = "下列哪一项是中华人民共和国的根本政治制度？请选出最合适的一项"
    benchmark = write_records(
        tmp_path / "ceval.jsonl", [{"question": question, "A": "人大", "answer": {"text": ["A"]}}]
    )
    texts = [f"某论坛：{question}！求答案", "人大代表讨论了根本政治制度的问题，会议持续了三天。"]
    left, row = kept(tmp_path, texts, "decontamination", decontaminate=[benchmark])
    assert left == texts[1:]
    assert row["details"]["contaminated_0-ceval"] == 1 and row["details"]["strings_too_short"] == 2


def test_weights_mix_sources(tmp_path):
    for name in "ab":
        write_records(tmp_path / f"{name}.jsonl", [{"id": f"{name}{i}", "text": f"{name}{i}"} for i in range(400)])
    left, _ = kept(tmp_path, ["c"], "mix", input=[tmp_path / "a.jsonl", tmp_path / "b.jsonl"], weights=(2, 0.25))
    assert sum(text.startswith("a") for text in left) == 800
    assert 70 < sum(text.startswith("b") for text in left) < 130


# ---- tokens ----


@given(st.lists(st.lists(st.integers(0, 9), min_size=1), max_size=8), st.integers(1, 7))
def test_packing_keeps_every_token_in_order(documents, length):
    rows = list(pack(documents, length))
    assert [token for row in rows for token in row["input_ids"]] == [token for ids in documents for token in ids]
    assert all(len(row["input_ids"]) == length for row in rows[:-1])
    assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) and min(row["seq_lengths"]) > 0 for row in rows)
