"""Ids that are found without encodings are those of the backend, on any text and with any argument."""

import copy
import pickle

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, pre_tokenizers

from hf_cnllm._compat import LateEncodings
from hf_cnllm.models.baichuan.tokenization_baichuan import BaichuanTokenizer
from hf_cnllm.models.chatglm.tokenization_chatglm import ChatGLMTokenizer
from hf_cnllm.models.glm.tokenization_glm import GLMChineseTokenizer
from hf_cnllm.models.qwen.tokenization_qwen import QWenTokenizer
from hf_cnllm.tokenization.ids_alone import IdsAloneMixin
from tokenizer_goldens import TokenizerGolden

CLASSES = {
    **{"baichuan1_small": BaichuanTokenizer, "baichuan2_small": BaichuanTokenizer},
    **{"chatglm1_small": ChatGLMTokenizer, "chatglm2_small": ChatGLMTokenizer, "chatglm3_small": ChatGLMTokenizer},
    **{"glm_chinese_small": GLMChineseTokenizer, "qwen_small": QWenTokenizer},
}
LONG = "The quick brown fox，敏捷的棕色狐狸 jumps over 123 lazy dogs。\n\n\tdef f(x):  return x\u3000 " * 20


@pytest.fixture(scope="module", autouse=True)
def short_texts_go_this_way_too():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(IdsAloneMixin, "least_characters", 0)
        yield


@pytest.fixture(scope="module", params=CLASSES)
def tokenizer(request):
    return load(request.param)


def load(name: str):
    tokenizer = TokenizerGolden(name).load(CLASSES[name])
    tokenizer(LONG)  # whoever needs to build something has done it
    return tokenizer


def by_backend(tokenizer, texts: list[str], **arguments) -> dict:
    """What the encodings, which know offsets, say."""
    batch = dict(tokenizer(texts, return_offsets_mapping=True, **arguments))
    del batch["offset_mapping"]
    return batch


REAL = {
    **{"baichuan1": BaichuanTokenizer, "baichuan2": BaichuanTokenizer, "qwen": QWenTokenizer},
    **{"chatglm1": ChatGLMTokenizer, "chatglm2": ChatGLMTokenizer, "glm_chinese": GLMChineseTokenizer},
}


@pytest.mark.parametrize("name", [*CLASSES, *REAL])
def test_recorded_texts(name):
    golden = TokenizerGolden(name)
    tokenizer, texts = golden.load({**CLASSES, **REAL}[name]), [case["text"] for case in golden["strings"]]
    batch = tokenizer(texts)
    assert isinstance(batch, LateEncodings) and dict(batch) == by_backend(tokenizer, texts)


def test_few_characters_are_the_backends(monkeypatch):
    tokenizer = TokenizerGolden("baichuan2_small").load(BaichuanTokenizer)
    monkeypatch.setattr(IdsAloneMixin, "least_characters", 400)
    assert not isinstance(tokenizer("你好"), LateEncodings) and isinstance(tokenizer(LONG), LateEncodings)


def texts_of(tokenizer) -> st.SearchStrategy[str]:
    """What may part the ways: white space, marks, full width, bytes, look-alikes of tokens, long words, pieces."""
    pieces = [token for token in tokenizer.get_vocab() if token.isprintable()]
    item = st.one_of(
        st.sampled_from(pieces).map(lambda piece: piece.replace("▁", " ")),
        st.sampled_from(sorted(tokenizer.added_tokens_encoder) or ["</s>"]),
        st.sampled_from(
            ["<s>", "</s>", "<unk>", "<n>", "<|blank_2|>", "[gMASK]", "<0x0A>", "<|im_end|>", "<reserved_1>"]
        ),
        st.tuples(st.sampled_from(" \n\t\r\u3000\xa0▁\x00\x1f\x7f"), st.integers(1, 90)).map(
            lambda pair: pair[0] * pair[1]
        ),
        st.sampled_from(
            ["e\u0301", "か\u3099", "ﾊﾞ", "\u1112\u1161\u11ab", "가\u11a8", "👨‍👩‍👧", "👍🏽", "🇨🇳", "ﬁ", "①", "㈱", "Å"]
        ),
        st.text(st.characters(codec="utf-8"), max_size=6),
        st.text(st.characters(min_codepoint=0xFF00, max_codepoint=0xFFEF), max_size=4),
        st.text("，。！？；：、（）《》“”‘’…—·～￥％．／abcAB 12", max_size=12),
        st.tuples(st.characters(codec="utf-8"), st.integers(1, 400)).map(lambda pair: pair[0] * pair[1]),
        st.integers(1_000, 1_200).map(lambda length: (LONG * 2)[:length]),
    )
    return st.lists(item, max_size=8).map("".join)


def test_any_text(tokenizer):
    @settings(max_examples=12, deadline=None)
    @given(st.lists(texts_of(tokenizer), min_size=10, max_size=10))
    def check(texts):
        assert dict(tokenizer(texts)) == by_backend(tokenizer, texts)

    check()


@pytest.mark.parametrize(
    "arguments",
    [
        {"add_special_tokens": False, "return_length": True},
        {"padding": True, "return_token_type_ids": True},
        {"padding": True, "padding_side": "left", "pad_to_multiple_of": 8},
        {"truncation": True, "max_length": 7},
        {"truncation": True, "max_length": 1},  # less than what goes around a text, in most of them
        {"truncation": "only_first", "max_length": 5, "padding": "max_length", "return_attention_mask": False},
        {"truncation": True, "max_length": 6, "add_special_tokens": False, "split_special_tokens": True},
    ],
    ids=str,
)
def test_any_argument(tokenizer, arguments):
    if "padding" in arguments and tokenizer.pad_token is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    texts = ["你好，世界！Hello world", "", "a", "x </s><|endoftext|> y", LONG]
    assert dict(tokenizer(texts, **arguments)) == by_backend(tokenizer, texts, **arguments)
    for side in ("left", "right"):
        tokenizer.truncation_side, before = side, tokenizer.truncation_side
        try:
            assert dict(tokenizer(texts[0], **arguments)) == by_backend(tokenizer, texts[0], **arguments)
        finally:
            tokenizer.truncation_side = before


def test_what_encodings_know_comes_late(tokenizer):
    texts = ["你好，世界", "Hello, world"]
    batch, expected = tokenizer(texts), tokenizer(texts, return_offsets_mapping=True)
    assert isinstance(batch, LateEncodings) and batch.is_fast and batch._found is None
    assert batch.copy()._found is None
    for ask in ("tokens", "word_ids", "sequence_ids"):
        assert getattr(batch, ask)(1) == getattr(expected, ask)(1)
    assert batch.char_to_token(1, 3) == expected.char_to_token(1, 3)
    assert [e.offsets for e in batch.encodings] == expected["offset_mapping"] and batch[0].ids == batch["input_ids"][0]
    again = pickle.loads(pickle.dumps(tokenizer(texts)))
    assert dict(again) == dict(batch) and again.tokens() == batch.tokens()
    tensors = tokenizer(texts[0], return_tensors="pt")
    assert tensors["input_ids"].tolist() == [batch["input_ids"][0]] and tensors.tokens() == batch.tokens()


def test_a_tokenizer_that_has_changed_since():
    tokenizer = copy.deepcopy(load("baichuan2_small"))
    batch = tokenizer("你好<new>世界")
    tokenizer.add_tokens("<new>")
    assert tokenizer("你好<new>世界")["input_ids"] != batch["input_ids"]
    with pytest.raises(RuntimeError, match="has changed since"):
        batch.tokens()


@pytest.mark.parametrize("name", CLASSES)
def test_rules_that_are_not_its_own(name):
    """Whoever gives the backend other rules gets them."""
    tokenizer = copy.deepcopy(load(name))
    rules = [normalizers.Lowercase(), *([tokenizer.backend_tokenizer.normalizer] if name != "qwen_small" else [])]
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(rules)
    texts = [f"Hello WORLD {LONG}"]
    assert tokenizer(texts)["input_ids"] == by_backend(tokenizer, texts)["input_ids"] != load(name)(texts)["input_ids"]


@pytest.mark.slow
def test_tiktoken_reads_the_same_unicode():
    r"""`\p{L}`, `\p{N}`, `\s` and the contractions in any case mean the same to tiktoken and to the backend, for each of Unicode's
    characters: the rest of Qwen's pattern is made of them."""
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    text = "".join(characters)
    cased = [char for char in characters if char.casefold() != char or char.isascii()]
    contractions = "".join(f"'{char}{end}\n" for char in cased for end in ("", "e", "l"))
    for pattern, sample in [
        (r"\p{L}", text),
        (r"\p{N}", text),
        (r"\s", text),
        (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", contractions),
    ]:
        encoding = tiktoken.Encoding("bytes", pat_str=pattern, mergeable_ranks=single_bytes, special_tokens={})
        ours = pre_tokenizers.Split(Regex(pattern), "removed", invert=True).pre_tokenize_str(sample)
        assert bytes(encoding.encode_ordinary(sample)).decode() == "".join(part for part, _ in ours)


def test_long_white_space_in_qwen():
    """tiktoken's stack would overflow."""
    tokenizer = load("qwen_small")
    for text in (" " * 300_000 + "a", "\n" * 20_000, f"{LONG}{' ' * 10_001}{LONG}"):
        assert tokenizer(text)["input_ids"] == by_backend(tokenizer, text)["input_ids"]


def test_special_tokens_of_qwen():
    tokenizer = load("qwen_small")
    text = f"<|im_start|>a<|im_end|>>\u0338<|extra_3|>\n{LONG}"
    for arguments in (
        {},
        {"allowed_special": ()},
        {"allowed_special": {"<|im_end|>"}},
        {"split_special_tokens": True},
    ):
        assert tokenizer(text, **arguments)["input_ids"] == by_backend(tokenizer, text, **arguments)["input_ids"]
