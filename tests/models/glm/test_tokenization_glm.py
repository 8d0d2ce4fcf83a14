import json
import re
import shutil
from functools import cache

import pytest
import sentencepiece
import torch
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, DataCollatorWithPadding

from hf_cnllm import GLMChineseTokenizer
from tokenizer_goldens import FIXTURES, SECTIONS, TokenizerGolden, differences, settings

NAMES = ("glm_chinese", "glm_chinese_small")
VOCAB = FIXTURES / "vocab"
ADDED = GLMChineseTokenizer.ADDED_TOKENS
TEXT = "清华大学[MASK]。 a\nb [gMASK]<n>"


@pytest.fixture
def chinese():
    return TokenizerGolden("glm_chinese_small").load(GLMChineseTokenizer)


# ---- the recorded tokenizations ----


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_golden(name, section):
    golden = TokenizerGolden(name)
    found = differences(golden, golden.load(GLMChineseTokenizer), section)
    if section == "meta":  # today's special_tokens_map has the named ones only
        assert found.keys() == {"special_tokens_map"}
    elif section == "batch":  # the original's token_type_ids leave out the special tokens
        for expected, ours in found.values():
            assert expected | {"token_type_ids": None} == ours | {"token_type_ids": None}
            assert [len(row) for row in ours["token_type_ids"]] == [len(row) for row in ours["input_ids"]]
            assert not any(map(any, ours["token_type_ids"]))
    else:
        found = {case: pair for case, pair in found.items() if not _is_unknown_token(case, pair)}
        assert found == {}


def _is_unknown_token(case, pair):
    """The original's `tokenize` gives the text of unknown characters, ours their token."""
    return case.startswith("tokens of ") and all(a == b or b == "[UNK]" for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_golden_meta_of_glm(name):
    golden = TokenizerGolden(name)
    tokenizer, meta = golden.load(GLMChineseTokenizer), golden["meta"]
    for kind in ("cls", "sep", "mask", "sop", "eop"):
        assert meta[kind] == [getattr(tokenizer, f"{kind}_token"), getattr(tokenizer, f"{kind}_token_id")]
    for attribute in ("gmask_token_id", "smask_token_id", "mask_token_ids", "all_special_tokens", "all_special_ids"):
        assert sorted(map(str, _list(getattr(tokenizer, attribute)))) == sorted(map(str, _list(meta[attribute])))
    assert tokenizer.num_special_tokens_to_add() == meta["num_special_tokens_to_add"]
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in ADDED} == meta["added_tokens"]


def _list(value):
    return value if isinstance(value, list) else [value]


@pytest.mark.parametrize("name", NAMES)
def test_golden_decoding_without_additional_special_tokens(name):
    golden = TokenizerGolden(name)
    tokenizer = GLMChineseTokenizer.from_pretrained(golden.vocabulary, additional_special_tokens=[])
    for case in golden["decode_cases"]:
        if isinstance(case["skip_no_additional"], str):
            assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["skip_no_additional"]


@pytest.mark.parametrize("method", ("build_inputs_for_generation", "build_inputs_for_multiple_choice"))
@pytest.mark.parametrize("name", NAMES)
def test_golden_inputs(name, method):
    golden = TokenizerGolden(name)
    tokenizer = golden.load(GLMChineseTokenizer)
    for case in golden[method]:
        with settings(tokenizer, padding_side=case["padding_side"]):
            encoded = tokenizer(case["texts"], **case["kw"])
        assert encoded["input_ids"].tolist() == case["encoded"]["input_ids"]
        arguments = case["build"] if "build" in case else {"choices": case["choices"]}
        if "error" in case["out"]:
            with pytest.raises(ValueError, match="Cannot find mask token in the input"):
                getattr(tokenizer, method)(encoded, **arguments)
        else:
            assert _nested(dict(getattr(tokenizer, method)(encoded, **arguments))) == case["out"]


def _nested(value):
    if isinstance(value, dict):
        return {name: _nested(item) for name, item in value.items()}
    return [_nested(item) for item in value] if isinstance(value, list) else value.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_golden_default_length(name):
    golden = TokenizerGolden(name)
    tokenizer = golden.load(GLMChineseTokenizer)
    for case in golden["default_max_gen_length"]:
        inputs = tokenizer.build_inputs_for_generation(tokenizer([case["text"]], return_tensors="pt"))
        assert {name: list(value.shape) for name, value in inputs.items()} == case["shapes"]


# ---- the original's rules over the real SentencePiece, on any text ----


class Reference:
    """What the original does, as literally as possible."""

    def __init__(self, name):
        file = TokenizerGolden(name).vocabulary / "cog-pretrain.model"
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        size = self.model.vocab_size()
        self.special = {token: size + index for index, token in enumerate(ADDED)}
        self.pattern = re.compile("(" + "|".join(map(re.escape, (*self.special, "[UNK]"))) + ")")

    def encode(self, text):
        parts = self.pattern.split(text)
        ids = []
        for at, part in enumerate(parts):
            if at % 2:
                ids.append(self.special.get(part, 0))
                continue
            part = part.lstrip() if at else part
            part = part.rstrip() if at + 1 < len(parts) else part
            ids += self.model.encode(part) if part else []
        return ids

    def decode(self, ids):
        names = {index: token for token, index in self.special.items()}
        texts, run = [], []
        for index in [*ids, None]:
            if index not in names and index is not None:
                run.append(index)
                continue
            texts += [self.model.decode(run)] if run else []
            texts += [names[index]] if index is not None else []
            run = []
        return " ".join(texts)


reference = cache(Reference)

ATOMS = [
    *(
        "你好",
        "世界。",
        "Hello",
        " world",
        "a",
        "123",
        "，",
        "……",
        "ｆｕｌｌ",
        "①",
        "ﬁ",
        "한",
        "e\u0301",
        "ﾊﾟ",
        "\u0338",
        "龘",
        "😀",
    ),
    *(" ", "  ", "\n", "\t", "\u3000", "\xa0", "\x85", "▁", "\u200b", "\x00", "\x01", "\ufffd", "\ue000", "\ufdd0"),
    *("<n>", "＜n＞", "<unk>", "<s>", "</s>", "［MASK］", "[mask]", "<|user|>", "<0x41>", "n>", "[UNK]", *ADDED),
]
# Without the code points, assigned to nothing, that the backend uses for itself.
CHARACTERS = st.characters(
    exclude_categories=["Cs"], exclude_characters="\U000e0f00\U000e0f01\U000e0f02\U000e0ffe\U000e0fff"
)
TEXTS = st.lists(st.sampled_from(ATOMS) | st.text(CHARACTERS, max_size=3), max_size=12).map("".join)


@given(text=TEXTS)
@example("<n>[MASK] <n>")
@hypothesis_settings(max_examples=200, deadline=None)
def test_ids_and_text_are_the_originals(text):
    tokenizer = TokenizerGolden("glm_chinese_small").load(GLMChineseTokenizer)
    expected = reference("glm_chinese_small").encode(text)
    assert tokenizer.encode(text, add_special_tokens=False) == expected
    assert tokenizer.decode(expected, clean_up_tokenization_spaces=False) == reference("glm_chinese_small").decode(
        expected
    )


@given(texts=st.lists(TEXTS, min_size=20, max_size=20))
@hypothesis_settings(max_examples=10, deadline=None)
def test_ids_are_the_originals_with_the_real_vocabulary(texts):
    tokenizer = TokenizerGolden("glm_chinese").load(GLMChineseTokenizer)
    # Beside a control token Python's white space is taken along, and U+001C to U+001F are none for Rust (docs/differences.md).
    texts = [text for text in texts if not ("[" in text and set(text) & set("\x1c\x1d\x1e\x1f"))]
    expected = [reference("glm_chinese").encode(text) for text in texts]
    assert tokenizer(texts, add_special_tokens=False)["input_ids"] == expected


@given(ids=st.lists(st.integers(0, 2009), max_size=20))
@hypothesis_settings(max_examples=100, deadline=None)
def test_any_ids_decode_as_in_the_original(ids):
    tokenizer = TokenizerGolden("glm_chinese_small").load(GLMChineseTokenizer)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == reference("glm_chinese_small").decode(ids)


# ---- filling blanks ----


def test_training_inputs_show_each_token_what_came_before(chinese):
    encoded = chinese(["你好[MASK]。", "[MASK]"], return_tensors="pt", padding=True)
    inputs = chinese.build_inputs_for_generation(encoded, targets=["世界 Hello", "a"], max_gen_length=30)
    length = encoded["input_ids"].shape[1]
    for row in range(2):
        piece = inputs["labels"][row][inputs["labels"][row] != -100]
        assert piece[-1] == chinese.eop_token_id
        written = inputs["input_ids"][row, length:]
        assert written[0] == chinese.sop_token_id and torch.equal(written[1 : len(piece)], piece[:-1])
        seen = inputs["attention_mask"][row, 0]
        real = encoded["attention_mask"][row].bool()
        assert torch.equal(seen[:, :length].bool(), real.expand(len(seen), -1))
        assert torch.equal(seen[length:, length:], torch.ones_like(seen[length:, length:]).tril())
        assert not seen[:length, length:].any()


def test_choices_do_not_see_each_other(chinese):
    encoded = chinese(["你好[MASK]。"], return_tensors="pt")
    choices = [["世界", "Hello world", "a"]]
    together = chinese.build_inputs_for_multiple_choice(encoded, choices)
    for number, choice in enumerate(choices[0]):
        alone = chinese.build_inputs_for_multiple_choice(encoded, [[choice]])
        at = together["choice_indices"][0][number]
        context = torch.arange(encoded["input_ids"].shape[1])
        where = torch.cat([context, at])
        assert torch.equal(together["input_ids"][0, where], alone["input_ids"][0])
        assert torch.equal(together["position_ids"][0][:, where], alone["position_ids"][0])
        assert torch.equal(together["attention_mask"][0, 0][where][:, where], alone["attention_mask"][0, 0])
        assert together["attention_mask"][0, 0, at].sum() == alone["attention_mask"][0, 0, len(context) :].sum()


def test_batches_with_nested_values_move(chinese):
    batch = chinese.build_inputs_for_multiple_choice(chinese(["[MASK]"], return_tensors="pt"), [["a", "b c"]])
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in (moved["input_ids"], *moved["choice_ids"][0])} == {"meta"}


@pytest.mark.parametrize(
    ("build", "problem"),
    [
        (
            lambda t: t.build_inputs_for_generation(t(["a"], return_tensors="pt")),
            r"text 0 has none of \[MASK\], \[sMASK\]",
        ),
        (lambda t: t.build_inputs_for_generation(t(["[MASK]", "[MASK]a b c d"])), "rows of different lengths"),
        (lambda t: t.build_inputs_for_generation(t("[MASK]")), r"must be of shape \[batch, length\]"),
        (lambda t: t.build_inputs_for_generation(t(["[MASK]"]), targets=["a", "b"]), "2 targets for 1 texts"),
        (lambda t: t.build_inputs_for_multiple_choice(t(["[gMASK]"]), [["a"]]), r"text 0 has none of \[MASK\]\."),
        (
            lambda t: t.build_inputs_for_multiple_choice(t(["[MASK]"]), [["a"], ["b"]]),
            "2 lists of choices for 1 texts",
        ),
        (lambda t: t.build_inputs_for_multiple_choice(t(["[MASK]"]), [["a", ""]]), "the choice '' has no tokens"),
        (lambda t: t("a", "b"), "no form for two texts"),
        (lambda t: t("a", ""), "no form for two texts"),
        (lambda t: t.build_inputs_with_special_tokens([1], [2]), "no form for two texts"),
    ],
)
def test_bad_input(chinese, build, problem):
    with pytest.raises(ValueError, match=problem):
        build(chinese)


# ---- loading and saving ----


@pytest.mark.parametrize("legacy_format", (None, True, False))
def test_saved_and_loaded_again(legacy_format, tmp_path):
    tokenizer = fresh = GLMChineseTokenizer.from_pretrained(VOCAB / "glm_chinese_small")
    for folder in (tmp_path / "once", tmp_path / "twice"):
        tokenizer.save_pretrained(folder, legacy_format=legacy_format)
        files = {file.name for file in folder.iterdir()}
        assert ("tokenizer.json" in files) == (legacy_format is not True)
        assert ("cog-pretrain.model" in files) == (legacy_format is not False)
        tokenizer = GLMChineseTokenizer.from_pretrained(folder)
    assert tokenizer(TEXT).data == fresh(TEXT).data and tokenizer(TEXT)["input_ids"][0] == fresh.cls_token_id
    assert tokenizer.all_special_tokens == fresh.all_special_tokens and tokenizer.truncation_side == "left"
    ids = fresh(TEXT)["input_ids"]
    for skip in (True, False):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == fresh.decode(ids, skip_special_tokens=skip)


def test_vocabulary_file_alone(tmp_path, chinese):
    shutil.copy(VOCAB / "glm_chinese_small" / "cog-pretrain.model", tmp_path)
    for tokenizer in (
        GLMChineseTokenizer.from_pretrained(tmp_path),
        GLMChineseTokenizer(tmp_path / "cog-pretrain.model"),
    ):
        assert tokenizer(TEXT).data == chinese(TEXT).data
        assert tokenizer.all_special_tokens == chinese.all_special_tokens


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("chatglm2_small/tokenizer.model", "is not the vocabulary of GLM's Chinese models"),
        ("chatglm1_small/ice_text.model", "is not the vocabulary of GLM's Chinese models"),
        ("baichuan1_small/tokenizer.model", "is not the vocabulary of GLM's Chinese models"),
        (None, "neither cog-pretrain.model"),
    ],
)
def test_wrong_vocabulary(tmp_path, file, problem):
    if file:
        shutil.copy(VOCAB / file, tmp_path / "cog-pretrain.model")
    with pytest.raises(ValueError, match=problem):
        GLMChineseTokenizer.from_pretrained(tmp_path)


def test_special_tokens_with_other_ids_are_refused(tmp_path):
    shutil.copytree(VOCAB / "glm_chinese_small", tmp_path, dirs_exist_ok=True)
    added = json.loads((tmp_path / "added_tokens.json").read_text())
    added["[sMASK]"], added["[gMASK]"] = added["[gMASK]"], added["[sMASK]"]
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(ValueError, match=r"gives \[sMASK\] the id 2009"):
        GLMChineseTokenizer.from_pretrained(tmp_path)


def test_collator(chinese):
    batch = DataCollatorWithPadding(chinese)([chinese("你好"), chinese("a b c")])
    assert batch["attention_mask"].sum(1).tolist() == [
        len(chinese("你好")["input_ids"]),
        len(chinese("a b c")["input_ids"]),
    ]


@pytest.mark.parametrize("trust_remote_code", (None, True))
@pytest.mark.parametrize("legacy_format", (None, True, False))
def test_auto_tokenizer_finds_it_in_a_saved_checkpoint(chinese, tmp_path, legacy_format, trust_remote_code):
    chinese.save_pretrained(tmp_path, legacy_format=legacy_format)
    shutil.copy(FIXTURES.parent / "goldens" / "glm" / "config.json", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=trust_remote_code)
    assert type(tokenizer) is GLMChineseTokenizer and tokenizer(TEXT).data == chinese(TEXT).data


@pytest.mark.parametrize("trust_remote_code", (None, True))
def test_auto_tokenizer(trust_remote_code):
    tokenizer = AutoTokenizer.from_pretrained(VOCAB / "glm_chinese_small", trust_remote_code=trust_remote_code)
    assert type(tokenizer) is GLMChineseTokenizer
