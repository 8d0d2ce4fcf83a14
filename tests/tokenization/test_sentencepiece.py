import os
import time

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer

from hf_cnllm.tokenization.sentencepiece import (
    ModelType,
    SentencePieceModel,
    build_tokenizer,
    decode_bytes,
    mend_bytes,
)
from tokenizer_goldens import TokenizerGolden

FILES = {"chatglm1": "ice_text.model", "glm_chinese": "cog-pretrain.model"}
KINDS = ("baichuan1", "baichuan2", "chatglm1", "chatglm2", "glm_chinese")
SMALL = [f"{kind}_small" for kind in KINDS]


def path_of(name: str) -> str:
    return str(TokenizerGolden(name).vocabulary / FILES.get(name.removesuffix("_small"), "tokenizer.model"))


@pytest.fixture(scope="module")
def loaded():
    """name -> (what the file says, our tokenizer, the original), each built once."""
    cache = {}

    def get(name: str):
        if name not in cache:
            path = path_of(name)
            model = SentencePieceModel.from_file(path)
            cache[name] = model, build_tokenizer(model), sentencepiece.SentencePieceProcessor(model_file=path)
        return cache[name]

    return get


def assert_same(loaded, name: str, texts: list[str]) -> None:
    model, ours, original = loaded(name)
    for text, expected, encoding in zip(texts, original.encode(texts), ours.encode_batch(texts), strict=True):
        if model.model_type is ModelType.UNIGRAM and encoding.ids != expected:
            # Segmentations that score the same: the original's float32 sums and ours in float64 round them apart.
            totals = [sum(model.scores[index] for index in ids) for ids in (expected, encoding.ids)]
            assert totals[0] == pytest.approx(totals[1], rel=1e-6), text
            assert ours.decode(encoding.ids, skip_special_tokens=False) == original.decode(expected)
            continue
        assert encoding.ids == expected, text
        if model.byte_fallback:  # without it the original decodes <unk> as ⁇
            assert ours.decode(expected, skip_special_tokens=False) == original.decode(expected)


TRAPS = {
    "spaces": ["", " ", "  ", " a  b ", "a ", "▁", "▁▁a ▁", "a▁ ", "\u3000", "a\u3000\u3000b", "\xa0x", " " * 100 + "x"],
    "lines": ["\n", "\r\n", "a\r\nb", "\n\n\r\n\t", "\x0b\x0c", "\u2028\u2029", "\t x"],
    "controls": ["\x00", "\x01", "e\x01\u0301", "\x7f\x80\x9f", "\xad", "\ufeffa", "\u200b \u200d", "\ufffd"],
    "compositions": [
        "e\u0301", "e\u0323\u0301", "e\u0301\u0323", "a\u0302\u0323", "q\u0323\u0307", "q\u0307\u0323", "\u0308\u0301",
        "ﾊﾞﾋﾟﾌﾟｶﾞ", "か\u3099き\u309a", "Ａ\u0301", "²\u0301²\u200d", ">\u0338=\u0338", "\u0308", " \u0301", "▁\u0301",
        "🅉\u0301", "Å\u030a", "\u212b\u030a", "ο\u0345\u0301", "क\u093c\u093c", "\u0dd9\u0dcf\u0dca", "\u1b05\u1b35",
    ],
    "hangul": ["한국", "\u1112\u1161\u11ab", "가\u11a8", "각\u11a8", "ㅎㅏㄴ", "ﾎￂ", "㉠ㅏ", "㉮\u11a8", "\u1100\u1160\u11a8"],
    "compatibility": ["ﬁ ﬂ", "㌀㍿㈱", "①½№", "Ⅷ", "ﷺ", "１２３", "ＡＢＣ，！", "K\u212a", "ſ", "豈更"],
    "emoji": ["👨‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇨🇳🇨", "1️⃣", "❤️", "\U000e0041"],
    "symbols": [
        "<SEP>", "a<SEP>b", "<<SEP>>", "<h1>标题</h1>", "＜h1＞", "<h1>\u0338", "<reserved_102>", "<reserved_10", "----",
        "......", "。。。。。。。", "```\n```", "<!--x-->", "<n>a<n>", "<|blank_2|>", "<|tab|>",
    ],
    "pieces as text": ["<s>", "</s>x", "<unk>", "<0x0A>", "\n<0x0A>", "<0xE4><0xBD>", "[gMASK]", "<pad>", " ⁇ "],
    "private": ["\ue000\uf8ff", "\U000f0000", "\U0010ffff", "\ufdd0\uffff"],
    "runs": ["a" * 300, "哈" * 99, "!" * 77, "ab" * 120, "=" * 50, " \n" * 40, "0" * 60],
}  # fmt: skip


@pytest.mark.parametrize("kind", TRAPS)
@pytest.mark.parametrize("name", SMALL)
def test_ids_on_traps(loaded, name, kind):
    assert_same(loaded, name, TRAPS[kind] + [f"你好{text}world" for text in TRAPS[kind]])


def texts_from(model: SentencePieceModel) -> st.SearchStrategy[str]:
    """Texts of vocabulary, marks, jamo, white space and anything: few are words, many are borders between rules."""
    chars = st.characters(exclude_categories=["Cs"], exclude_characters="\U000e0ffe\U000e0fff")
    marks = st.sampled_from("\u0300\u0301\u0302\u0308\u0323\u031b\u0327\u0338\u0345\u3099\uff9e\uff9f\u200d\ufe0f")
    jamo = st.characters(categories=["Lo"], min_codepoint=0x1100, max_codepoint=0x11FF) | st.sampled_from("가각ㄱㅏﾡￂ")
    piece = st.sampled_from(model.texts)
    item = st.one_of(
        piece,
        piece.map(lambda text: text.replace("▁", " ")),
        st.tuples(st.sampled_from("aeioucnz<>=ハﾊかＡ²é▁ "), marks, marks | st.just("")).map("".join),
        st.lists(jamo, min_size=1, max_size=4).map("".join),
        st.sampled_from([" ", "  ", "\n", "\r\n", "\t", "\u3000", "\x01", "▁"]),
        st.tuples(chars, st.integers(1, 12)).map(lambda pair: pair[0] * pair[1]),
        st.text(chars, max_size=4),
    )
    return st.lists(item, max_size=8).map("".join)


@pytest.mark.parametrize("name", SMALL)
def test_ids_on_any_text(loaded, name):
    @settings(max_examples=25, deadline=None)
    @given(st.lists(texts_from(loaded(name)[0]), min_size=20, max_size=20))
    def check(texts):
        assert_same(loaded, name, texts)

    check()


@pytest.mark.parametrize("name", ["baichuan1_small", "chatglm1_small", "glm_chinese_small"])
def test_normalized_text(loaded, name):
    """The normalizer alone, also where the vocabulary would hide a difference in <unk>."""
    model, ours, original = loaded(name)

    @settings(max_examples=200, deadline=None)
    @given(texts_from(model))
    def check(text):
        assert ours.normalizer.normalize_str(text) == original.normalize(text)

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_real_vocabularies(loaded, kind):
    golden = TokenizerGolden(kind)
    path = path_of(kind)
    start = time.process_time()
    build_tokenizer(SentencePieceModel.from_file(path))
    assert time.process_time() - start < 20  # 1 to 3 s; a guard against quadratic work
    texts = [case["text"] for case in golden["strings"]]
    assert_same(loaded, kind, texts + [text for traps in TRAPS.values() for text in traps])

    @settings(max_examples=25, deadline=None)
    @given(st.lists(texts_from(loaded(kind)[0]), min_size=40, max_size=40))
    def check(texts):
        assert_same(loaded, kind, texts)

    check()


@pytest.mark.parametrize("name", SMALL)
def test_survives_serialization(loaded, name):
    _, ours, _ = loaded(name)
    again = Tokenizer.from_str(ours.to_str())
    texts = [text for traps in TRAPS.values() for text in traps]
    assert [encoding.ids for encoding in again.encode_batch(texts)] == [e.ids for e in ours.encode_batch(texts)]


@given(st.binary(max_size=12))
def test_bytes_that_are_not_text(loaded, data):
    """Each byte without a place in a character becomes U+FFFD, as in the original."""
    model, ours, original = loaded("baichuan2_small")
    tokens = [f"<0x{byte:02X}>" for byte in data]
    expected = original.decode([model.ids[token] for token in tokens])
    assert decode_bytes(data) == expected
    assert ours.decoder.decode(mend_bytes(["好", *tokens, "▁好"])) == f"好{expected} 好"


def proto_of(name: str) -> sentencepiece_model_pb2.ModelProto:
    proto = sentencepiece_model_pb2.ModelProto()
    with open(path_of(name), "rb") as file:
        proto.ParseFromString(file.read())
    return proto


class TestBadFiles:
    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.model"):
            SentencePieceModel.from_file(tmp_path / "nowhere.model")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "damaged"),
            (os.urandom(4000), "damaged"),
            (b"version https://git-lfs.github.com/spec/v1\n", "git lfs"),
        ],
    )
    def test_not_a_model(self, tmp_path, content, message):
        path = tmp_path / "tokenizer.model"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            SentencePieceModel.from_file(path)

    def test_truncated_anywhere(self, tmp_path):
        with open(path_of("baichuan1_small"), "rb") as file:
            data = file.read()
        path = tmp_path / "tokenizer.model"
        for size in [*range(0, len(data), len(data) // 60), len(data) - 1, len(data) - 20]:
            path.write_bytes(data[:size])
            with pytest.raises(ValueError, match="Download the file again"):
                SentencePieceModel.from_file(path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda proto: setattr(proto.trainer_spec, "model_type", ModelType.WORD), "model_type"),
            (lambda proto: setattr(proto.trainer_spec, "treat_whitespace_as_suffix", True), "whitespace_as_suffix"),
            (lambda proto: setattr(proto.normalizer_spec, "escape_whitespaces", False), "escape_whitespaces"),
            (lambda proto: setattr(proto.normalizer_spec, "precompiled_charsmap", b"\x08\0\0\0abcd"), "character map"),
            (lambda proto: setattr(proto.pieces[300], "piece", proto.pieces[301].piece), "twice"),
            (lambda proto: setattr(proto.pieces[300], "type", 5), "unused"),
            (lambda proto: setattr(proto.pieces[0], "type", 1), "unknown piece"),
            (lambda proto: setattr(next(p for p in proto.pieces if p.piece == "<0x0A>"), "type", 1), "256 byte"),
        ],
    )
    def test_unsupported(self, tmp_path, change, message):
        proto = proto_of("baichuan1_small")
        change(proto)
        path = tmp_path / "tokenizer.model"
        path.write_bytes(proto.SerializeToString())
        with pytest.raises(ValueError, match=message):
            SentencePieceModel.from_file(path)

    def test_damaged_rules_do_not_hang(self, tmp_path):
        proto = proto_of("baichuan1_small")
        rules = bytearray(proto.normalizer_spec.precompiled_charsmap)
        path = tmp_path / "tokenizer.model"
        for start in range(4, 4000, 400):
            rules[start : start + 200] = bytes((7 * start + 3 * i) % 256 for i in range(200))
            proto.normalizer_spec.precompiled_charsmap = bytes(rules)
            path.write_bytes(proto.SerializeToString())
            try:
                build_tokenizer(SentencePieceModel.from_file(path)).encode("Ａe\u0301")
            except ValueError as error:
                assert "character map" in str(error)
