"""The originals' methods, padding and positions, loading and saving."""

import copy
import json
import pickle
import shutil

import pytest
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, DataCollatorWithPadding

from chatglm_texts import BPE, ICE, SMALL
from hf_cnllm import ChatGLMTokenizer
from hf_cnllm.hub.publishing import needs_package
from hf_cnllm.models.chat import as_messages
from tokenizer_goldens import FIXTURES, TokenizerGolden, differences

VOCAB = FIXTURES / "vocab"
TEXT = "你好 world\n  [MASK]<eop> <|user|>\tfoo   bar"


@pytest.fixture(params=SMALL)
def small(request):
    return TokenizerGolden(request.param).load(ChatGLMTokenizer)


@pytest.fixture
def ice():
    return TokenizerGolden("chatglm1_small").load(ChatGLMTokenizer)


@pytest.fixture
def chatglm3():
    return ChatGLMTokenizer.from_pretrained(VOCAB / "chatglm3_small")


# ---- the originals' methods ----


def test_methods_of_chatglm3(chatglm3):
    assert chatglm3.get_command("<|user|>") == chatglm3.convert_tokens_to_ids("<|user|>") == len(chatglm3) - 3
    assert chatglm3.get_command("<eos>") == 2 and chatglm3.get_command("<pad>") == chatglm3.pad_token_id == 0
    assert chatglm3.get_prefix_tokens() == chatglm3("")["input_ids"] == [chatglm3.gmask_token_id, len(chatglm3) - 6]
    assert chatglm3.build_inputs_with_special_tokens([7], [8]) == [*chatglm3.get_prefix_tokens(), 7, 8, 2]
    with pytest.raises(ValueError, match="is not a special token of chatglm3"):
        chatglm3.get_command("你好")
    with pytest.raises(ValueError, match="role is 'robot'"):
        chatglm3.build_single_message("robot", "", "")
    with pytest.raises(ValueError, match="build_prompt is for chatglm_early and chatglm and chatglm2"):
        chatglm3.build_prompt("a")


def test_methods_of_the_others(ice):
    assert ice.build_inputs_with_special_tokens([7], [8]) == [
        7,
        ice.gmask_token_id,
        ice.bos_token_id,
        8,
        ice.eos_token_id,
    ]
    assert ice.end_token_id == 2 and ice.end_token == "</s>" and ice.gmask_token == "[gMASK]"
    assert ice.build_prompt("q") == "q"
    assert ice.build_prompt("q", [("a", "b")]) == "[Round 0]\n问：a\n答：b\n[Round 1]\n问：q\n答："
    for method, arguments in (
        ("build_chat_input", ("q",)),
        ("get_prefix_tokens", ()),
        ("build_single_message", ("user", "", "")),
    ):
        with pytest.raises(ValueError, match=f"{method} is for .*generation is chatglm"):
            getattr(ice, method)(*arguments)
    with pytest.raises(ValueError, match="encode_special_tokens is for chatglm3"):
        ice.encode_special_tokens = True


def test_early_revision_fills_mask_tokens():
    tokenizer = TokenizerGolden("chatglm1_image20000").load(ChatGLMTokenizer)
    mask, gmask, sop, end = (tokenizer.get_command(token) for token in ("[MASK]", "[gMASK]", "<sop>", "</s>"))
    texts = ["你好", "你好[MASK]", "[MASK]你好"]
    alone = [tokenizer(text)["input_ids"] for text in texts]
    assert [ids[-2:] for ids in alone] == [[gmask, sop], [mask, sop], [end, sop]]
    plain = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert alone == [tokenizer.build_inputs_with_special_tokens(ids) for ids in plain]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert [row[row != tokenizer.pad_token_id].tolist() for row in batch["input_ids"]] == alone
    assert batch["attention_mask"].sum(1).tolist() == list(map(len, alone))
    cut = tokenizer(texts, truncation=True, max_length=3)["input_ids"]
    assert cut == [tokenizer.build_inputs_with_special_tokens(ids[:1]) for ids in plain]
    assert tokenizer("a[MASK]", "b")["input_ids"][-2:] == [end, sop]
    filled = tokenizer(texts, padding="max_length", max_length=16, truncation=True, pad_to_multiple_of=8)
    assert [len(row) for row in filled["input_ids"]] == [16] * 3
    assert tokenizer("你好[MASK]", return_offsets_mapping=True)["offset_mapping"][-2:] == [(2, 8), (0, 0)]
    assert tokenizer("你好")["input_ids"] == alone[0]  # nothing stays behind


def test_lower_case_and_squeezed_white_space():
    tokenizer = ChatGLMTokenizer.from_pretrained(VOCAB / "chatglm1_small", do_lower_case=True, remove_space=True)
    plain = TokenizerGolden("chatglm1_small").load(ChatGLMTokenizer)
    assert tokenizer(" Hello \n  WORLD ")["input_ids"] == plain("hello world")["input_ids"]


# ---- padding, positions, collators ----


def test_positions_follow_padding(small):
    texts = ["你好", "今天天气不错 Hello"]
    alone = [small(text)["position_ids"] for text in texts]
    for side in ("left", "right"):
        batch = small(texts, padding=True, padding_side=side)
        padded = small.pad([small(text) for text in texts], padding_side=side)
        assert padded.data == batch.data
        for positions, own, mask in zip(batch["position_ids"], alone, batch["attention_mask"], strict=True):
            for row, expected in zip(_rows(positions), _rows(own), strict=True):
                assert [p for p, kept in zip(row, mask, strict=True) if kept] == expected
                assert all(p == 0 for p, kept in zip(row, mask, strict=True) if not kept)


def _rows(positions):
    return positions if isinstance(positions[0], list) else [positions]


def test_blank_in_the_middle_gives_the_position(ice):
    ids, positions = (ice("你好[MASK]世界")[name] for name in ("input_ids", "position_ids"))
    at = ids.index(ice.mask_token_id)
    assert positions == [[*range(len(ids) - 1), at], [0] * (len(ids) - 1) + [1]]


def test_ids_alone_are_padded_with_positions(small):
    batch = small.pad({"input_ids": [[5, 6], [5]]}, return_tensors="pt")
    assert batch["position_ids"].shape == ((2, 2, 2) if small.generation == "chatglm" else (2, 2))
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize(
    "collator", (DataCollatorWithPadding, lambda t: DataCollatorForLanguageModeling(t, mlm=False))
)
def test_collators(small, collator):
    batch = collator(small)([small("你好"), small("今天天气不错")])
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["position_ids"].shape[-1] == batch["input_ids"].shape[1]


@pytest.mark.parametrize("name", BPE[1::2])
def test_text_never_becomes_a_special_token(name):
    tokenizer = TokenizerGolden(name).load(ChatGLMTokenizer)
    text = "".join((*tokenizer.chat_control_pieces(), "<unk>", "<s>"))
    assert tokenizer.decode(ids := tokenizer.encode(text, add_special_tokens=False)) == text
    assert not set(ids) & set(map(tokenizer.get_command, (*tokenizer.chat_control_pieces(), "<s>", "<unk>")))


def test_decoding_passes_over_label_padding(small):
    assert small.decode([-100, *small.encode("你好", add_special_tokens=False), -100]) == "你好"


def test_a_special_token_alone_has_its_name_and_is_no_text(small, chatglm3):
    for tokenizer in (small, chatglm3):
        end = tokenizer.eos_token_id
        assert tokenizer.decode(end) == tokenizer.eos_token
        assert tokenizer.decode([end]) == tokenizer.decode(end, skip_special_tokens=True) == ""


# ---- loading and saving ----


@pytest.mark.parametrize("trust_remote_code", (None, True, False))
def test_auto_tokenizer(small, trust_remote_code):
    folder = VOCAB / {"chatglm": "chatglm1_small"}.get(small.generation, f"{small.generation}_small")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    assert type(tokenizer) is ChatGLMTokenizer and tokenizer.generation == small.generation


@pytest.mark.parametrize("legacy_format", (None, True, False))
@pytest.mark.parametrize("name", SMALL)
def test_saved_and_loaded_again(name, legacy_format, tmp_path):
    tokenizer = ChatGLMTokenizer.from_pretrained(VOCAB / name)
    vocab_file = "ice_text.model" if name in ICE else "tokenizer.model"
    for folder in (tmp_path / "once", tmp_path / "twice"):
        tokenizer.save_pretrained(folder, legacy_format=legacy_format)
        files = {file.name for file in folder.iterdir()}
        assert ("tokenizer.json" in files) == (legacy_format is not True)
        assert (vocab_file in files) == (legacy_format is not False)
        saved = json.loads((folder / "tokenizer_config.json").read_text())
        assert saved["auto_map"] == needs_package("AutoTokenizer")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        shutil.copy(
            FIXTURES.parent / "goldens" / ("chatglm_6b" if name in ICE else "chatglm3_6b") / "config.json", folder
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer) is ChatGLMTokenizer
    golden = TokenizerGolden(name)
    chat = as_messages("<n>[MASK]<eop>", [("你好", "<|user|>sop")])
    fresh = golden.load(ChatGLMTokenizer)
    assert differences(golden, tokenizer, "strings") == differences(golden, fresh, "strings")
    assert tokenizer.apply_chat_template(chat).data == fresh.apply_chat_template(chat).data
    for attribute in (
        "eos_token",
        "pad_token_id",
        "padding_side",
        "clean_up_tokenization_spaces",
        "model_input_names",
    ):
        assert getattr(tokenizer, attribute) == getattr(fresh, attribute)


def test_eos_token_can_be_set_and_saved(small, tmp_path):
    tokenizer = copy.deepcopy(small)
    tokenizer.add_special_tokens({"eos_token": "<|end|>", "additional_special_tokens": ["<|more|>"]})
    tokenizer.pad_token = tokenizer.eos_token
    ids = tokenizer("a<|end|>b<|more|>", add_special_tokens=False)["input_ids"]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == len(small) and ids[-1] == len(small) + 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a b"
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("a<|end|>b<|more|>").data == tokenizer("a<|end|>b<|more|>").data
    assert (again.eos_token, again.pad_token_id, len(again)) == ("<|end|>", len(small), len(small) + 2)


def test_copies_and_pickles(small):
    for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert other(TEXT).data == small(TEXT).data and other.generation == small.generation


def test_roles_parsed_from_text_survive_saving(chatglm3, tmp_path):
    chatglm3.encode_special_tokens = True
    chatglm3.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode_special_tokens
    assert again.encode("<|user|>", add_special_tokens=False) == [again.get_command("<|user|>")]
