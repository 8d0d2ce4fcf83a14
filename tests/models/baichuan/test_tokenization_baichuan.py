import copy
import json
import pickle
import re
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken, AutoTokenizer

from hf_cnllm.models.baichuan import BaichuanTokenizer
from hf_cnllm.models.baichuan.chat import build_chat_input
from tokenizer_goldens import SECTIONS, TokenizerGolden, differences

NAMES = ("baichuan1", "baichuan1_small", "baichuan2", "baichuan2_small")
SMALL = ("baichuan1_small", "baichuan2_small")
TEXTS = ["你好</s>再见", " a  b\r\n", "ﾊﾞﾅﾅ <h1>é</h1>", "<reserved_106>", ""]
CONTROL_TEXTS = ("<s>", "</s>", "<unk>", "<SEP>", "<CLS>", "<reserved_")


@pytest.fixture(params=SMALL)
def name(request):
    return request.param


@pytest.fixture
def tokenizer(name):
    return TokenizerGolden(name).load(BaichuanTokenizer)


# --------------------------------------------------------------------------------------------------------------------
# the recorded originals


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_goldens(name, section):
    golden = TokenizerGolden(name)
    assert differences(golden, golden.load(BaichuanTokenizer), section) == {}


@pytest.mark.parametrize("name", NAMES)
def test_chat_goldens(name):
    golden = TokenizerGolden(name)
    tokenizer = golden.load(BaichuanTokenizer)
    compared = 0
    for case in golden["chat"]:
        room = case["model_max_length"] - case["max_new_tokens"]
        ids = build_chat_input(tokenizer, case["messages"], room)
        if any(text in message["content"] for message in case["messages"] for text in CONTROL_TEXTS):
            # The original lets these messages forge turns: ours has a token of a turn for each message and no more.
            assert [index for index in ids if index in (1, 2, 195, 196)] == [195, 196, 195, 196]
            continue
        compared += 1
        assert ids == case["generation_utils"]
        whole = tokenizer.apply_chat_template(case["messages"], add_generation_prompt=True)["input_ids"]
        if len(whole) <= room:
            assert whole == case["generation_utils"]
    assert compared == 18


def original_ids(tokenizer, text: str) -> list[int]:
    """The original in three lines: special tokens are cut out of the raw text, SentencePiece takes each piece between."""
    parts = re.split("(<s>|</s>|<unk>)", text)
    special = {"<s>": [1], "</s>": [2], "<unk>": [0]}
    return [index for part in parts for index in special.get(part) or tokenizer.sp_model.encode(part)]


def original_text(tokenizer, ids: list[int], skip: bool) -> str:
    """The original's `convert_tokens_to_string`."""
    special = {0: "<unk>", 1: "<s>", 2: "</s>"}
    text, run = "", []
    ids = [index for index in ids if not (skip and index in special)]
    for place, index in enumerate(ids):
        if index not in special:
            run.append(index)
            continue
        if place and ids[place - 1] not in special:
            text += " "
        text, run = text + tokenizer.sp_model.decode(run) + special[index], []
    return text + tokenizer.sp_model.decode(run)


@pytest.mark.parametrize("name", SMALL)
def test_any_text_as_in_the_original(name):
    tokenizer = TokenizerGolden(name).load(BaichuanTokenizer)
    special = st.sampled_from(["<s>", "</s>", "<unk>", "<unk", "</s", "<reserved_102>", "<SEP>", "＜s＞", "<0x0A>"])
    plain = st.sampled_from(["你好", "a", " ", "  ", "\n", "\r\n", "▁", "é", "e\u0301", "1", "，", "👋", "\x01"])
    anything = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\U000e0ffe\U000e0fff"), max_size=4)

    @settings(max_examples=400, deadline=None)
    @given(st.lists(special | plain | anything, max_size=8).map("".join))
    def texts(text):
        ids = tokenizer(text)["input_ids"]
        assert ids == original_ids(tokenizer, text)
        for skip in (False, True):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == original_text(tokenizer, ids, skip)

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.integers(0, len(tokenizer) - 1) | st.integers(0, 500), max_size=12), st.booleans())
    def ids(ids, skip):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == original_text(tokenizer, ids, skip)

    texts()
    ids()


# --------------------------------------------------------------------------------------------------------------------
# loading


@pytest.mark.parametrize("kwargs", [{}, {"trust_remote_code": True}, {"use_fast": False}, {"use_fast": True}], ids=str)
def test_auto_tokenizer_never_runs_the_checkpoints_code(name, tmp_path, kwargs):
    folder = shutil.copytree(TokenizerGolden(name).vocabulary, tmp_path / "checkpoint")
    for file in ("tokenization_baichuan.py", "configuration_baichuan.py", "modeling_baichuan.py"):
        (folder / file).write_text("raise SystemExit('code from a checkpoint ran')\n")
    config = {"model_type": "baichuan", "auto_map": {"AutoConfig": "configuration_baichuan.BaichuanConfig"}}
    (folder / "config.json").write_text(json.dumps(config | {"model_max_length": 4096}))
    tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
    assert type(tokenizer) is BaichuanTokenizer
    assert tokenizer("你好")["input_ids"] == TokenizerGolden(name).load(BaichuanTokenizer)("你好")["input_ids"]


def test_the_spelling_of_the_7b_checkpoint(tmp_path):
    folder = shutil.copytree(TokenizerGolden("baichuan1_small").vocabulary, tmp_path / "checkpoint")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "BaiChuanTokenizer", "auto_map": {"AutoTokenizer": ["code.BaiChuanTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert isinstance(tokenizer, BaichuanTokenizer)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert type(AutoTokenizer.from_pretrained(tmp_path / "saved")) is type(tokenizer)


def test_from_the_vocabulary_file_alone(name):
    file = TokenizerGolden(name).vocabulary / "tokenizer.model"
    tokenizer = BaichuanTokenizer(str(file))
    assert tokenizer("好")["input_ids"][0] == tokenizer.bos_token_id == 1  # the original's default
    assert tokenizer.pad_token is None
    assert BaichuanTokenizer(str(file), add_bos_token=False, add_eos_token=True)("好")["input_ids"][-1] == 2


def test_arguments_of_the_original(name):
    tokenizer = BaichuanTokenizer.from_pretrained(
        TokenizerGolden(name).vocabulary,
        sp_model_kwargs={"enable_sampling": False},
        bos_token=AddedToken("<s>", single_word=True, normalized=True),
        pad_token="</s>",
        add_bos_token=True,
        add_eos_token=True,
        model_max_length=77,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    ids = tokenizer("a<s>b")["input_ids"]
    assert (ids[0], ids[-1], ids.count(1)) == (1, 2, 2)
    assert (tokenizer.pad_token_id, tokenizer.model_max_length, tokenizer.padding_side) == (2, 77, "left")
    assert tokenizer.sp_model.get_piece_size() == tokenizer.vocab_size


def test_a_vocabulary_without_tokens_for_turns(tmp_path):
    """Another family's file: it is a fine vocabulary, but there is no chat to be had with it."""
    tokenizer = BaichuanTokenizer(str(TokenizerGolden("chatglm2_small").vocabulary / "tokenizer.model"))
    with pytest.raises(ValueError, match="chat_template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


# --------------------------------------------------------------------------------------------------------------------
# saving


def files_in(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


COMMON_FILES = {"tokenizer_config.json", "chat_template.jinja"}
LAYOUTS = {
    None: COMMON_FILES | {"tokenizer.json", "tokenizer.model"},
    False: COMMON_FILES | {"tokenizer.json"},
    True: COMMON_FILES | {"tokenizer.model"},
}


@pytest.mark.parametrize("legacy_format", LAYOUTS)
@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True, "add_eos_token": True}], ids=["plain", "bos_eos"])
def test_saved_and_loaded_again(name, tmp_path, legacy_format, flags):
    golden = TokenizerGolden(name)
    original = golden.load(BaichuanTokenizer, **flags)
    original.save_pretrained(tmp_path / "one", legacy_format=legacy_format)
    assert files_in(tmp_path / "one") == LAYOUTS[legacy_format]
    config = json.loads((tmp_path / "one/tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "BaichuanTokenizer" and "auto_map" not in config
    assert config["add_bos_token"] is config["add_eos_token"] is bool(flags)

    again = AutoTokenizer.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "two", legacy_format=legacy_format)
    again = AutoTokenizer.from_pretrained(tmp_path / "two")
    assert files_in(tmp_path / "two") == LAYOUTS[legacy_format]
    assert type(again) is BaichuanTokenizer
    assert (again.add_bos_token, again.add_eos_token) == (bool(flags), bool(flags))
    assert again.get_vocab() == original.get_vocab()
    assert again.special_tokens_map == original.special_tokens_map
    assert again.chat_template == original.chat_template
    assert again(TEXTS)["input_ids"] == original(TEXTS)["input_ids"]
    if not flags:
        for section in SECTIONS:
            assert differences(golden, again, section) == {}
    if legacy_format is not False:
        kept = (tmp_path / "two/tokenizer.model").read_bytes()
        assert kept == (golden.vocabulary / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("legacy_format", LAYOUTS)
def test_added_tokens_are_kept(tokenizer, tmp_path, legacy_format):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["新词"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    text = "我爱新词<|tool|>好新词"
    tokenizer.save_pretrained(tmp_path, legacy_format=legacy_format)
    again = AutoTokenizer.from_pretrained(tmp_path)
    ids = again(text)["input_ids"]
    assert ids == tokenizer(text)["input_ids"]
    assert ids.count(again.convert_tokens_to_ids("新词")) == 2
    assert len(again) == len(tokenizer) == again.vocab_size + 2
    assert again.decode(ids, skip_special_tokens=True).replace(" ", "") == "我爱新词好新词"


def test_saving_over_itself(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    before = (tmp_path / "tokenizer.model").read_bytes()
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == before


def test_old_layout_without_the_original_file(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "json", legacy_format=False)
    without = AutoTokenizer.from_pretrained(tmp_path / "json")
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        without.save_pretrained(tmp_path / "old", legacy_format=True)
    assert not (tmp_path / "old").exists()
    with pytest.raises(ValueError, match=r"tokenizer\.model"):
        _ = without.sp_model


# --------------------------------------------------------------------------------------------------------------------
# what broke for users of the original code


def test_special_tokens_can_be_set_after_a_resave(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    again.pad_token = again.eos_token
    again.eos_token = "<reserved_106>"
    assert (again.pad_token_id, again.eos_token) == (2, "<reserved_106>")
    assert AutoTokenizer.from_pretrained(tmp_path, eos_token="<unk>", pad_token="</s>").pad_token_id == 2


def test_padding_side_as_an_argument(tokenizer):
    left = tokenizer(["a", "a b c"], padding=True, padding_side="left")["input_ids"]
    assert left[0][0] == 0 and left[0][-1] != 0
    padded = tokenizer.pad({"input_ids": [[5], [5, 6]]}, padding_side="left", return_tensors="pt")
    assert padded["input_ids"].tolist() == [[0, 5], [5, 6]]


def test_copies_and_pickles(tokenizer):
    for again in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert again(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]


def test_sp_model_gives_the_same_ids(tokenizer):
    assert tokenizer.sp_model.encode("你好 world\n") == tokenizer("你好 world\n")["input_ids"]


@pytest.mark.parametrize(
    "flags", [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}], ids=str
)
def test_building_inputs_by_hand(name, flags):
    tokenizer = TokenizerGolden(name).load(BaichuanTokenizer, **flags)
    first, second = (tokenizer.encode(text, add_special_tokens=False) for text in ("你好", "world"))
    assert tokenizer.build_inputs_with_special_tokens(first) == tokenizer("你好")["input_ids"]
    assert tokenizer.build_inputs_with_special_tokens(first, second) == tokenizer("你好", "world")["input_ids"]


def test_batches_are_their_texts(tokenizer):
    assert tokenizer(TEXTS)["input_ids"] == [tokenizer(text)["input_ids"] for text in TEXTS]


def test_offsets_are_characters_of_the_text(tokenizer):
    text = "你好</s>ＡＢ c"
    batch = tokenizer(text, return_offsets_mapping=True)
    assert batch["offset_mapping"][-1][1] == len(text)
    assert text[slice(*batch["offset_mapping"][batch["input_ids"].index(2)])] == "</s>"


# --------------------------------------------------------------------------------------------------------------------
# bad input


def test_no_vocabulary(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BaichuanTokenizer"}')
    with pytest.raises(ValueError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"version https://git-lfs.github.com/spec/v1\noid sha256:0"])
def test_damaged_vocabulary(tmp_path, name, content):
    folder = shutil.copytree(TokenizerGolden(name).vocabulary, tmp_path / "checkpoint")
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.model is"):
        AutoTokenizer.from_pretrained(folder)


def test_damaged_tokenizer_json(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text().replace('"BPE"', '"BPX"')
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", [None, 5, b"bytes", [1, 2], "a\ud800b", ["fine", "\udc00"]])
def test_what_is_not_text(tokenizer, text):
    with pytest.raises((ValueError, TypeError)):
        tokenizer(text)
    with pytest.raises((ValueError, TypeError)):
        tokenizer.encode_message(text)
