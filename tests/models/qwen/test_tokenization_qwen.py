import base64
import copy
import json
import pickle
import re
import sys
import time
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, DataCollatorWithPadding

from hf_cnllm import QWenTokenizer
from hf_cnllm.hub.publishing import needs_package
from hf_cnllm.models.qwen.tiktoken_bpe import PRETOKENIZE_REGEX, read_tiktoken, to_bytes, write_tiktoken
from tokenizer_goldens import FIXTURES, SECTIONS, TokenizerGolden, compare, differences, settings

NAMES = ("qwen", "qwen_v0", "qwen_small")
SMALL = FIXTURES / "vocab" / "qwen_small"

# What of `meta` is deliberately not the original's, which had no eos and no pad token.
NEW_META = {"qwen": {"special_tokens_map", "eos", "pad"}, "qwen_v0": {"special_tokens_map", "pad"}}
NEW_META["qwen_small"] = NEW_META["qwen"]

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_204|>"]


@pytest.fixture(scope="module")
def small():
    return QWenTokenizer.from_pretrained(SMALL)


@pytest.fixture
def first_revision(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"remove_space": false, "tokenizer_class": "QWenTokenizer"}')
    (tmp_path / "qwen.tiktoken").write_bytes((SMALL / "qwen.tiktoken").read_bytes())
    return QWenTokenizer.from_pretrained(tmp_path)


def tiktoken_like(tokenizer):
    """The same vocabulary in tiktoken itself."""
    tiktoken = pytest.importorskip("tiktoken")
    return tiktoken.Encoding(
        "qwen",
        pat_str=PRETOKENIZE_REGEX,
        mergeable_ranks=tokenizer.mergeable_ranks,
        special_tokens=tokenizer.special_tokens,
    )


# ---- the recorded tokenizations ----


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_golden(name, section):
    golden = TokenizerGolden(name)
    found = differences(golden, golden.load(QWenTokenizer), section)
    if section == "meta":
        assert found.keys() == NEW_META[name]
    elif section == "batch":  # without a pad token, the original could not pad
        assert found and all(
            case.endswith("default") and expected == "an error" for case, (expected, _) in found.items()
        )
    else:
        assert {case: pair for case, pair in found.items() if not case.startswith("tokens of ")} == {}


@pytest.mark.parametrize("name", NAMES)
def test_golden_tokens_as_bytes(name):
    golden = TokenizerGolden(name)
    tokenizer = golden.load(QWenTokenizer)

    def tokens(text):
        return [
            token if token in tokenizer.special_tokens else {"b64": base64.b64encode(to_bytes(token)).decode()}
            for token in tokenizer.tokenize(text)
        ]

    cases = [(case["text"], case["tokens"], lambda text=case["text"]: tokens(text)) for case in golden["strings"]]
    assert compare(iter(cases)) == {}


SPECIAL_TEXT_RULES = {
    "ids_ordinary": {"allowed_special": (), "disallowed_special": ()},
    "ids_allow_all": {"allowed_special": "all"},
    "ids_disallow_all": {"allowed_special": (), "disallowed_special": "all"},
}


@pytest.mark.parametrize("field", SPECIAL_TEXT_RULES)
@pytest.mark.parametrize("name", NAMES)
def test_golden_special_text(name, field):
    golden = TokenizerGolden(name)
    tokenizer = golden.load(QWenTokenizer)

    def run(case):
        ids = tokenizer.encode(case["text"], **SPECIAL_TEXT_RULES[field])
        return len(ids) if field == "ids_disallow_all" else ids

    cases = [(case["text"], case[field], lambda case=case: run(case)) for case in golden["strings"] if field in case]
    assert compare(iter(cases)) == {}


# ---- against tiktoken on other texts ----

MARKS = (
    "\u0301\u0323\u0338\u093c\u0334\u07fd\u0898\u1abf\u0eba\u3099"  # some in NFC tables only since Unicode 11 to 14
)
PIECES = [
    *SPECIALS,
    *(
        "<|im_end|",
        "|>",
        "<|",
        "<|im_",
        "'s",
        "'LL",
        "'ſ",
        "'Re",
        "\r\n",
        "\n \n",
        "\u00a0",
        "\u3000",
        "\u2028",
        "\x85",
    ),
    *("你好", "汉", "𠮷", "ด้", "가", "각", "Å", "ﬁ", "①", "½", "٣", "é", "👨‍👩‍👧", "\u037e", "\u212a", "　"),
    *MARKS,
]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=4) | st.text(" \n\ta1.'", max_size=5), max_size=14).map(
    "".join
)


@pytest.mark.parametrize("name", ["qwen", "qwen_small"])
def test_ids_are_tiktokens(name):
    tokenizer = TokenizerGolden(name).load(QWenTokenizer)
    original = tiktoken_like(tokenizer)

    @hypothesis_settings(max_examples=250, deadline=None)
    @given(texts, st.sets(st.sampled_from(SPECIALS)))
    @example("<|im_end|>\u0338", {"<|im_end|>"})
    @example("a\u0301\u1abf\u0323 q\u0898\u0323", set())
    def check(text, allowed):
        normal = unicodedata.normalize("NFC", text)
        assert tokenizer.encode(text) == original.encode(normal, allowed_special="all")
        assert tokenizer(text, split_special_tokens=True)["input_ids"] == original.encode_ordinary(normal)
        some = tokenizer.encode(text, allowed_special=allowed)
        assert some == original.encode(normal, allowed_special=allowed, disallowed_special=())
        assert tokenizer.decode(tokenizer.encode(text)) == normal

    check()


def test_decoding_is_pythons():
    tokenizer = QWenTokenizer.from_pretrained(SMALL)
    original = tiktoken_like(tokenizer)

    @hypothesis_settings(max_examples=300, deadline=None)
    @given(
        st.lists(st.integers(0, 255) | st.integers(0, len(tokenizer) - 1), max_size=12),
        st.sampled_from(["replace", "ignore", "backslashreplace"]),
    )
    def check(ids, errors):
        assert tokenizer.decode(ids, errors=errors) == original.decode(ids, errors=errors)
        kept = [i for i in ids if i < tokenizer.eod_id]
        assert tokenizer.decode(ids, errors=errors, skip_special_tokens=True) == original.decode(kept, errors=errors)

    check()


def test_errors_is_the_default_of_decode():
    tokenizer = QWenTokenizer.from_pretrained(SMALL, errors="ignore")
    assert tokenizer.decode([64, 255, 65]) == "ab"
    assert tokenizer.decode([64, 255, 65], errors="replace") == "a�b"
    with pytest.raises(UnicodeDecodeError):
        tokenizer.decode([64, 255, 65], errors="strict")


def test_half_surrogates_are_replaced_as_in_tiktoken(small):
    assert small.encode("a\ud83d\ude00\ud83d") == small.encode("a😀\ufffd")


# ---- special tokens in text ----


def test_first_revision_refuses_special_text(first_revision):
    with pytest.raises(ValueError, match="disallowed special token '<mask>'"):
        first_revision(["fine", "a<mask>"])
    with pytest.raises(ValueError, match="disallowed special token '<S>'"):
        first_revision("fine", "<S>")
    assert first_revision.encode("<|extra_0|>") == QWenTokenizer.from_pretrained(SMALL).encode(
        "<|extra_0|>", allowed_special=()
    )
    assert first_revision.encode("<mask>", allowed_special="all") == [first_revision.special_tokens["<mask>"]]


def test_first_revision_can_be_said_and_is_saved(first_revision, tmp_path):
    tokenizer = QWenTokenizer.from_pretrained(SMALL, first_revision=True)
    assert tokenizer.special_tokens == first_revision.special_tokens
    tokenizer.save_pretrained(tmp_path)
    assert QWenTokenizer.from_pretrained(tmp_path).special_tokens == first_revision.special_tokens
    with pytest.raises(ValueError, match=re.escape("no special token <|extra_0|>")):
        QWenTokenizer.from_pretrained(tmp_path, first_revision=False)


def test_allowed_special_in_batches(small):
    texts = ["<|im_start|>a<|im_end|>", "b<|im_end|>"]
    batch = small(texts, allowed_special={"<|im_end|>"}, padding=True, return_tensors="pt")
    plain = small.encode("<|im_start|>a", allowed_special=())
    assert batch["input_ids"][0].tolist() == [*plain, small.im_end_id]
    padding = len(plain) - 1
    assert batch["input_ids"][1].tolist() == [65, small.im_end_id] + [small.eod_id] * padding
    assert batch["attention_mask"][1].tolist() == [1, 1] + [0] * padding
    cut = small(texts, allowed_special={"<|im_end|>"}, truncation=True, max_length=1)
    assert cut["input_ids"] == [plain[:1], [65]]
    with settings(small, truncation_side="left"):
        cut = small(texts[0], allowed_special={"<|im_end|>"}, truncation=True, max_length=1)
        assert cut["input_ids"] == [small.im_end_id]
        whole = small(texts[0], allowed_special={"<|im_end|>"}, truncation=True, max_length=50)
        assert whole["input_ids"] == [*plain, small.im_end_id]
    pair = small("a<|im_end|>", "<|im_start|>b", allowed_special={"<|im_end|>"}, return_offsets_mapping=True)
    assert pair["input_ids"] == [64, small.im_end_id, *small.encode("<|im_start|>b", allowed_special=())]
    assert pair["offset_mapping"][:3] == [(0, 1), (1, 11), (0, 1)]
    assert small.encode("<|im_start|>") == [small.im_start_id]  # the next call is not touched


def test_disallowed_special(small):
    with pytest.raises(ValueError, match=re.escape("disallowed special token '<|im_end|>'")):
        small.tokenize("a<|im_end|>", disallowed_special={"<|im_end|>"})
    assert small.tokenize("a<|im_start|>", disallowed_special={"<|im_end|>"}) == ["a", "<|im_start|>"]


# ---- the original's attributes, and the standard ones ----


def test_attributes(small):
    ranks = read_tiktoken(SMALL / "qwen.tiktoken")
    assert small.mergeable_ranks == ranks
    assert list(small.mergeable_ranks.values()) == list(range(len(ranks)))
    assert small.special_tokens["<|extra_204|>"] == len(small) - 1 == 2607
    assert (small.eod_id, small.im_start_id, small.im_end_id) == (2400, 2401, 2402)
    assert small.eos_token_id == small.pad_token_id == small.eod_id
    assert small.bos_token is None
    assert small.all_special_ids == list(range(2400, 2608))
    assert small.convert_tokens_to_ids([b"\xff", "<|im_end|>", "Ġ", "nothing like it"]) == [187, 2402, 220, None]
    assert small.convert_tokens_to_ids(b"!") == 0
    assert small.convert_tokens_to_string([b"\xe4\xbd", b"\xa0", "<|im_end|>", "Ġ"]) == "你<|im_end|> "
    assert small.convert_ids_to_tokens([2402, 220]) == ["<|im_end|>", "Ġ"]
    assert max(small.get_vocab().values()) == len(small) - 1
    assert small.build_inputs_with_special_tokens([5], [6, 7]) == [5, 6, 7]  # nothing is added


def test_setting_the_pad_token_by_id_as_finetuning_scripts_do(small):
    tokenizer = copy.deepcopy(small)
    tokenizer.pad_token_id = tokenizer.special_tokens["<|extra_0|>"]
    assert tokenizer(["a", "a b"], padding=True)["input_ids"][0][-1] == 2403
    assert tokenizer.add_special_tokens({"pad_token": "<|extra_1|>"}) == 0
    assert tokenizer.encode("<|extra_1|>\u0338") == small.encode("<|extra_1|>\u0338")


def test_tokens_can_be_added(small, tmp_path):
    tokenizer = copy.deepcopy(small)
    assert tokenizer.add_tokens(["你好吗é"]) == 1
    assert tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]}) == 1
    assert (tokenizer.vocab_size, len(tokenizer)) == (2608, 2610)
    assert tokenizer.encode("你好吗é<|tool|>a") == [2608, 2609, 64]
    assert tokenizer.decode([2608, 2609], errors="strict") == "你好吗é<|tool|>"
    for legacy_format in (None, False, True):
        folder = tmp_path / str(legacy_format)
        tokenizer.save_pretrained(folder, legacy_format=legacy_format)
        again = QWenTokenizer.from_pretrained(folder)
        assert again.encode("你好吗é<|tool|>a<|im_end|>") == [2608, 2609, 64, 2402], legacy_format
        assert len(again) == 2610


def test_collators_pad(small):
    features = [small("你好"), small("a")]
    batch = DataCollatorWithPadding(small)(features)
    assert batch["input_ids"].shape == (2, 3) and batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    batch = DataCollatorForLanguageModeling(small, mlm=False)(features)
    assert batch["labels"][1].tolist() == [64, -100, -100]


# ---- files ----


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "qwen_small" else pytest.mark.slow) for n in NAMES])
def test_saved_tokenizers_are_the_same(name, tmp_path):
    golden = TokenizerGolden(name)
    tokenizer = golden.load(QWenTokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "qwen.tiktoken").read_bytes() == (golden.vocabulary / "qwen.tiktoken").read_bytes()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "QWenTokenizer"
    assert config["auto_map"] == needs_package("AutoTokenizer") and "vocab_file" not in config

    for left_out in ("qwen.tiktoken", "tokenizer.json"):
        again_folder = tmp_path / left_out.replace(".", "_")
        again_folder.mkdir()
        for file in tmp_path.glob("*.*"):
            if file.is_file() and file.name != left_out:
                (again_folder / file.name).symlink_to(file)
        again = AutoTokenizer.from_pretrained(again_folder)
        assert type(again) is QWenTokenizer
        assert again.special_tokens == tokenizer.special_tokens
        assert differences(golden, again, "strings") == differences(golden, tokenizer, "strings")
        again.save_pretrained(again_folder / "third")
        assert (again_folder / "third/qwen.tiktoken").read_bytes() == (tmp_path / "qwen.tiktoken").read_bytes()


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
@pytest.mark.parametrize("with_model", [False, True])
def test_auto_tokenizer_prefers_this_class_to_the_checkpoints_code(tmp_path, trust_remote_code, with_model):
    for file in SMALL.iterdir():
        (tmp_path / file.name).symlink_to(file)
    if with_model:
        (tmp_path / "config.json").symlink_to(FIXTURES.parent / "goldens" / "qwen" / "config.json")
    assert "auto_map" in json.loads((SMALL / "tokenizer_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=trust_remote_code, use_fast=False)
    assert type(tokenizer) is QWenTokenizer


def test_a_single_file_and_keyword_arguments(small):
    for tokenizer in (
        QWenTokenizer(vocab_file=SMALL / "qwen.tiktoken"),
        QWenTokenizer.from_pretrained(SMALL / "qwen.tiktoken"),
    ):
        assert tokenizer.encode("你好<|im_end|>") == small.encode("你好<|im_end|>")


def test_missing_and_foreign_files(small, tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        small.save_vocabulary(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=re.escape("neither qwen.tiktoken nor tokenizer.json")):
        QWenTokenizer()
    QWenTokenizer.from_pretrained(SMALL).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text((tmp_path / "tokenizer.json").read_text()[:5000])
    with pytest.raises(ValueError, match=re.escape("tokenizer.json is damaged")):
        QWenTokenizer.from_pretrained(tmp_path)
    baichuan = AutoTokenizer.from_pretrained(FIXTURES / "vocab" / "baichuan2_small")
    baichuan.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=re.escape("no special token <|endoftext|>. It is not Qwen v1's")):
        QWenTokenizer.from_pretrained(tmp_path)


def test_pickle_and_copy(small):
    state = pickle.dumps(small)
    small.mergeable_ranks, small.apply_chat_template([{"role": "user", "content": "a"}])
    assert pickle.dumps(small) == state  # or datasets would take it for another tokenizer
    for tokenizer in (pickle.loads(state), copy.deepcopy(small)):
        assert tokenizer.encode("你好<|im_end|>") == small.encode("你好<|im_end|>")
        assert tokenizer.special_tokens == small.special_tokens


def test_training_a_new_vocabulary(small, tmp_path):
    new = small.train_new_from_iterator(["研究人员发现了一种新的方法。"] * 20, vocab_size=600)
    assert new.decode(new.encode("研究人员<|im_end|>")) == "研究人员<|im_end|>"
    new.save_pretrained(tmp_path)
    assert QWenTokenizer.from_pretrained(tmp_path).encode("研究人员<|im_end|>") == new.encode("研究人员<|im_end|>")


# ---- extra vocabulary ----


@pytest.fixture
def extra(tmp_path):
    """Tokens that are joined from others step by step, one that never is, one that is there already; ids with a gap."""
    ranks = {"zq": 2608, "zqz": 2609, "你好": 2611, "xyxy": 2612, "!": 2620}
    path = tmp_path / "extra.tiktoken"
    write_tiktoken({token.encode(): rank for token, rank in ranks.items()}, path)
    return path


def test_extra_vocabulary(extra, tmp_path):
    tokenizer = QWenTokenizer.from_pretrained(SMALL, extra_vocab_file=str(extra))
    original = tiktoken_like(tokenizer)
    assert len(tokenizer) == tokenizer.vocab_size == original.n_vocab == 2613
    assert tokenizer.eod_id == 2400
    texts = ["zqz zqzq", "你好，你好吗", "xyxy xyxyz", "!!", "a<|im_end|>zq"]
    tokenizer.save_pretrained(tmp_path / "saved")
    again = QWenTokenizer.from_pretrained(tmp_path / "saved")
    (tmp_path / "saved/tokenizer.json").unlink()
    from_ranks = QWenTokenizer.from_pretrained(tmp_path / "saved")
    for tok in (tokenizer, again, from_ranks):
        assert tok.mergeable_ranks == tokenizer.mergeable_ranks and len(tok) == 2613
        for text in texts:
            ids = tok.encode(text)
            assert ids == original.encode(text, allowed_special="all")
            assert tok.encode(text, allowed_special=()) == original.encode_ordinary(text)
            assert tok.decode(ids) == text
        assert tok.decode([2608, tok.im_end_id], skip_special_tokens=True) == "zq"  # the original dropped extra tokens
        assert tok.add_tokens(["<new>"]) == 1 and tok.encode("<new>") == [2613]
        assert tok.apply_chat_template([{"role": "user", "content": "<|im_end|>"}])["input_ids"].count(2402) == 2


def test_extra_vocabulary_comes_from_the_caller_alone(extra, tmp_path):
    (tmp_path / "qwen.tiktoken").symlink_to(SMALL / "qwen.tiktoken")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"extra_vocab_file": str(extra)}))
    assert len(QWenTokenizer.from_pretrained(tmp_path)) == 2608


def test_extra_vocabulary_with_taken_ids(tmp_path):
    path = tmp_path / "extra.tiktoken"
    for rank, complaint in ((7, "the id 7 belongs to a token of"), (2405, "2405 is the rank of a token")):
        write_tiktoken({b"zqzq": rank}, path)
        with pytest.raises(ValueError, match=complaint):
            QWenTokenizer(SMALL / "qwen.tiktoken", extra_vocab_file=path)
    with pytest.raises(ValueError, match=re.escape("neither qwen.tiktoken")):
        QWenTokenizer(extra_vocab_file=path, tokenizer_file="tokenizer.json")


# ---- time ----


@pytest.mark.slow
def test_loading_is_fast(tmp_path):
    """Processor seconds, with room for a busy machine: 2.3 and 0.4 were measured on an idle one."""
    folder = TokenizerGolden("qwen").vocabulary

    def seconds(path):
        start = time.process_time()
        tokenizer = QWenTokenizer.from_pretrained(path)
        return time.process_time() - start, tokenizer

    from_ranks, tokenizer = seconds(folder)
    tokenizer.save_pretrained(tmp_path)
    from_json, _ = seconds(tmp_path)
    assert from_ranks < 5
    assert from_json < 1


def test_nothing_but_the_original_object_needs_tiktoken(small, tmp_path, monkeypatch):
    """It is in no dependency: where it is missing, long texts and saved folders are the backend's."""
    long = "落霞与孤鹜齐飞，秋水共长天一色 hello <|im_end|> " * 50
    expected = small(long)["input_ids"]
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # how an import fails that is not there
    tokenizer = QWenTokenizer.from_pretrained(SMALL)
    assert tokenizer(long)["input_ids"] == expected
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(long)["input_ids"] == expected and again.decode(expected) == tokenizer.decode(expected)
    assert getattr(tokenizer, "tokenizer", tokenizer) is tokenizer  # as `transformers serve` asks
    with pytest.raises(AttributeError, match="pip install tiktoken"):
        _ = tokenizer.tokenizer
