import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_cnllm.models.qwen.tiktoken_bpe import (
    PRETOKENIZE_REGEX,
    build_backend,
    merges_of,
    read_tiktoken,
    to_bytes,
    to_name,
    write_tiktoken,
)
from tokenizer_goldens import FIXTURES, TokenizerGolden

BYTES = [bytes([i]) for i in range(256)]
SMALL = FIXTURES / "vocab" / "qwen_small" / "qwen.tiktoken"


def ranks_of(tokens):
    return {token: rank for rank, token in enumerate([*BYTES, *tokens])}


# Tokens over two letters in any order: parts may have higher ranks than the whole, or be missing.
any_ranks = st.lists(st.text("ab", min_size=2, max_size=6), max_size=14, unique=True).map(
    lambda texts: ranks_of([text.encode() for text in texts])
)


@st.composite
def trained_ranks(draw):
    """Every token is two earlier ones joined, as training makes them."""
    tokens = [b"a", b"b"]
    for _ in range(draw(st.integers(0, 14))):
        joined = draw(st.sampled_from(tokens)) + draw(st.sampled_from(tokens))
        if joined not in tokens and len(joined) <= 12:
            tokens.append(joined)
    return ranks_of(tokens[2:])


@pytest.mark.parametrize("name", ["qwen_small", pytest.param("qwen", marks=pytest.mark.slow)])
def test_every_token_of_a_trained_vocabulary_is_formed(name):
    ranks = read_tiktoken(TokenizerGolden(name).vocabulary / "qwen.tiktoken")
    merges = merges_of(ranks)
    assert [a + b for a, b in merges] == [token for token in ranks if len(token) > 1]


def test_tokens_that_are_never_formed_have_no_merge():
    ranks = ranks_of([b"bc", b"ab", b"abc", b"xyz"])
    assert merges_of(ranks) == [(b"b", b"c"), (b"a", b"b"), (b"a", b"bc")]  # abc: bc is joined before ab


@settings(max_examples=300, deadline=None)
@given(any_ranks | trained_ranks(), st.lists(st.text("ab", max_size=30), min_size=1, max_size=5))
def test_ids_are_tiktokens_for_any_ranks(ranks, words):
    tiktoken = pytest.importorskip("tiktoken")
    encoding = tiktoken.Encoding("any", pat_str=PRETOKENIZE_REGEX, mergeable_ranks=ranks, special_tokens={})
    backend = build_backend(ranks, [])
    for text in [*words, " ".join(words)]:
        assert backend.encode(text).ids == encoding.encode_ordinary(text)


@given(st.binary())
def test_names_stand_for_bytes(token):
    assert to_bytes(to_name(token)) == token


def test_a_file_is_written_as_it_was_read(tmp_path):
    write_tiktoken(read_tiktoken(SMALL), tmp_path / "again.tiktoken")
    assert (tmp_path / "again.tiktoken").read_bytes() == SMALL.read_bytes()


def test_blank_lines_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(SMALL.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\r\n")
    assert read_tiktoken(path) == read_tiktoken(SMALL)


@pytest.mark.parametrize(
    "line, complaint",
    [
        (b"aGVsbG8=", "line 2401 is damaged: expected '<token in base64> <rank>', found b'aGVsbG8='"),
        (b"aGVsbG8= 2400 x", "line 2401 is damaged"),
        (b"aGVsb 2400", "line 2401 is damaged"),  # no whole bytes
        (b"aGVs!G8= 2400", "line 2401 is damaged"),
        (b"aGVsbG8= -1", "line 2401 is damaged"),
        (b"aGVsbG8= 99999999999", "line 2401: rank 99999999999 is out of range"),
        (b"IQ== 2400", "line 2401: the token b'!' stands in line 1 already"),
        (b"aGVsbG9oZWxsbw== 7", "line 2401: the rank 7 stands in line 8 already"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, line, complaint):
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(SMALL.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match=re.escape(f"{path}: {complaint}")):
        read_tiktoken(path)


def test_a_large_file_pointer_and_an_empty_file_are_refused(tmp_path):
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:b2b1b8\nsize 2561218\n")
    with pytest.raises(ValueError, match=r"line 1 is damaged.*git-lfs"):
        read_tiktoken(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="holds no tokens"):
        read_tiktoken(path)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda ranks: ranks.pop(b"\x00"), "no token for 1 of the 256 bytes"),
        (lambda ranks: ranks.pop(list(ranks)[1000]), "No token has the rank 1000.*lines are missing"),
        (lambda ranks: ranks.update({b"zzzz": 2405}), "2405 is the rank of a token"),
        (lambda ranks: ranks.update({b"<|im_end|>": 5000}), "is a special token and cannot be an ordinary token"),
    ],
)
def test_a_vocabulary_that_is_not_whole_is_refused(change, complaint):
    ranks = read_tiktoken(SMALL)
    change(ranks)
    with pytest.raises(ValueError, match=complaint):
        build_backend(ranks, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))])
