"""The ROUGE filter against `rouge-score` itself."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("rapidfuzz", reason="needs the extra data")
pytest.importorskip("jieba", reason="needs the extra data")
from hf_cnllm.data.synthetic.similarity import Pool, words

rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="needs rouge-score")

ENGLISH = st.text("aB3c d-'_.\n", max_size=30) | st.text(max_size=20).filter(str.isascii)
MIXED = st.text("天气很好今的abAB 12，。é½İ", max_size=30)
THRESHOLDS = st.sampled_from([0.1, 0.3, 0.5, 0.6, 2 / 3, 0.7, 0.75, 0.9, 1.0])


class Words:
    def tokenize(self, text):
        return words(text)


@settings(max_examples=100, deadline=None)
@given(st.lists(ENGLISH, max_size=4), ENGLISH, THRESHOLDS)
def test_english_is_similar_where_rouge_score_says_so(texts, text, threshold):
    agrees(rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False), texts, text, threshold)


@settings(max_examples=100, deadline=None)
@given(st.lists(MIXED, max_size=4), MIXED, THRESHOLDS)
def test_chinese_is_similar_where_rouge_score_says_so_of_its_words(texts, text, threshold):
    agrees(rouge_scorer.RougeScorer(["rougeL"], tokenizer=Words()), texts, text, threshold)


@pytest.mark.parametrize("shared", range(1, 6))
@pytest.mark.parametrize("other", range(5))
def test_a_score_that_is_the_threshold_is_similar(shared, other):
    pool, text = Pool([" ".join("abcde"[:shared])]), " ".join("abcde"[:shared] + "vwxyz"[:other])
    score = 2 * shared / (2 * shared + other)
    assert pool.has_similar(text, score) and not pool.has_similar(text, score + 1e-6)


def agrees(scorer, texts, text, threshold):
    scores = [scorer.score(other, text)["rougeL"].fmeasure for other in texts]
    if any(abs(score - threshold) < 1e-12 for score in scores):
        scores = [round(score, 12) for score in scores]  # 2PR / (P + R) is rounded, 7 / 10 is not
        threshold = round(threshold, 12)
    assert Pool(texts).has_similar(text, threshold) == (max(scores, default=0) >= threshold)


def test_chinese_is_cut_into_words():
    assert words("今天我们去公园散步，Hello, GPT-4!") == ["今天", "我们", "去", "公园", "散步", "hello", "gpt", "4"]


def test_the_paper_s_threshold_itself_is_too_similar():
    pool = Pool(["a b c d e f g h i j"])
    assert pool.has_similar("a b c d e f g x y z") and not pool.has_similar("a b c d e f w x y z")


def test_more_words_than_there_are_characters():
    pool = Pool()
    pool._letters.update((str(number), number + 1) for number in range(sys.maxunicode - 2))
    pool.add("a b c d e")
    assert pool.has_similar("b c d e") and pool.has_similar("a b c d e f") and not pool.has_similar("f g a b")
