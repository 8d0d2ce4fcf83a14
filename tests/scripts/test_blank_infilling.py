"""What the study of blank infilling counts: the words it blanks, and the log-probabilities of what is written into them."""

import argparse

import pytest
import torch

from blank_infilling import CHOICES, LINES, Blanks, Causal, make_clozes, make_model, read, train_vocabulary, words_of
from hf_cnllm import DataCollatorForBlankInfilling

TEXT = (
    "".join(f"the {first}{last} of it, " for first in ("ab", "cd", "ef", "gh") for last in ("xy", "zw", "uv", "st"))
    * 3
)
LENGTH = 24


@pytest.fixture(scope="module")
def tokenizer():
    return train_vocabulary(TEXT, 60)


@pytest.fixture(scope="module")
def encoding(tokenizer):
    return tokenizer.backend_tokenizer.encode(TEXT)


def made(tokenizer, name):
    torch.manual_seed(0)
    model = make_model(argparse.Namespace(hidden_size=16, layers=2, length=48), tokenizer, LINES[name]).eval()
    collator = DataCollatorForBlankInfilling(tokenizer, 48)
    return model, Blanks(collator, LINES[name].block_positions) if LINES[name].blanks else Causal()


def test_words_are_whole_and_have_choices(tokenizer, encoding):
    words = words_of(encoding, TEXT)
    texts = {tokenizer.decode(encoding.ids[start:end]).replace(" ", "") for start, end in words}
    assert texts <= {*TEXT.replace(",", "").split()} and "abxy" in texts
    for cloze in make_clozes(encoding.ids, words, LENGTH, 5):
        start, end = cloze.span
        assert len(cloze.text) == LENGTH and tuple(cloze.text[start:end]) == cloze.choices[0]
        assert len({*cloze.choices}) == CHOICES and {len(choice) for choice in cloze.choices} == {end - start}
    with pytest.raises(ValueError, match="words to blank"):
        make_clozes(encoding.ids, words, LENGTH, 500)


@pytest.mark.parametrize("name", LINES)
def test_log_probabilities_are_the_models_own(name, tokenizer, encoding):
    model, form = made(tokenizer, name)
    texts, span = [encoding.ids[:LENGTH], encoding.ids[7 : 7 + LENGTH]], (10, 13)
    scores, _ = read(model, form.rows(texts, [span, span], "token"), size=1)
    for text, score in zip(texts, scores, strict=True):
        batch = form.rows([text], [span], "token")
        with torch.no_grad():
            loss = model(**batch).loss  # a mean over the span's tokens
        assert (batch["labels"] != -100).sum() == 3
        assert score.item() == pytest.approx(-3 * loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", LINES)
def test_only_glm_sees_what_is_behind_a_blank(name, tokenizer, encoding):
    model, form = made(tokenizer, name)
    text = encoding.ids[:LENGTH]
    other = [*text[:20], *(3 + index for index in range(4))]
    one, two = read(model, form.rows([text, other], [(10, 13)] * 2, "token"))[0]
    assert (abs(one - two) < 2e-5) == (name == "causal LM")


def test_most_probable_tokens_are_found(tokenizer, encoding):
    model, form = made(tokenizer, "causal LM")
    text = list(encoding.ids[:10])
    with torch.no_grad():
        text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    rows = form.rows([text, [*text[:-1], (text[-1] + 1) % len(tokenizer)]], [(10, 11)] * 2, "token")
    assert read(model, rows)[1].tolist() == [True, False]
