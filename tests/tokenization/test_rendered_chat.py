"""Chats that are rendered first and encoded then."""

import copy
import pickle
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baichuan_chats import EOS, as_lists, control_ids, standard
from hf_cnllm.models.baichuan import BaichuanTokenizer
from hf_cnllm.models.chatglm import ChatGLMTokenizer
from hf_cnllm.models.qwen import QWenTokenizer
from hf_cnllm.tokenization.rendered_chat import MEANINGLESS, RenderedChat
from tokenizer_goldens import TokenizerGolden
from tokenizer_goldens import settings as attributes

EVERY_CHAT = {
    "baichuan1_small": BaichuanTokenizer,
    "baichuan2_small": BaichuanTokenizer,
    "chatglm1_small": ChatGLMTokenizer,
    "chatglm2_small": ChatGLMTokenizer,
    "chatglm3_small": ChatGLMTokenizer,
    "qwen_small": QWenTokenizer,
}


@pytest.fixture(scope="module", params=EVERY_CHAT)
def every(request):
    return TokenizerGolden(request.param).load(EVERY_CHAT[request.param])


def hostile(tokenizer) -> str:
    return " ".join(["e\u0301", *tokenizer.added_tokens_encoder, *tokenizer.chat_control_pieces()])


def test_a_rendered_chat_is_encoded_as_the_chat(every):
    control = re.compile(every._chat_backends().control)
    names = [name for name in [*every.added_tokens_encoder, *every.chat_control_pieces()] if "extra" not in name]
    names = [*names[:40], "<|im_start|>", "</s>", "a", " ", "\n", "你好", "\U000f0000", "e\u0301"]

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
    @given(st.lists(st.sampled_from(names), max_size=4).map("".join), st.booleans())
    def check(text, is_prompt):
        chat = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        chat += [{"role": "user", "content": text}] * is_prompt
        rendered = every.apply_chat_template(chat, tokenize=False, sanitize_control_tokens=True)
        ids = every.apply_chat_template(chat)["input_ids"]
        assert every.encode(rendered, add_special_tokens=False) == ids
        assert every(rendered, add_special_tokens=False)["input_ids"] == ids
        assert (
            every([rendered, rendered], add_special_tokens=False, return_tensors="pt")["input_ids"].tolist()
            == [ids] * 2
        )
        assert rendered == standard(every, every.read_messages(chat), tokenize=False)
        again = pickle.loads(pickle.dumps(copy.deepcopy(rendered)))
        assert every.encode(again, add_special_tokens=False, sanitize_control_tokens=True) == ids
        if control.search(text):
            assert all(
                type(other) is str for other in (str(rendered), f"{rendered}", rendered[1:], rendered.strip("\0"))
            )

    check()


def test_rendered_chats_in_batches(every):
    chats = [[{"role": "user", "content": text}] for text in (hostile(every), "hi")]
    for options in (
        {"padding": True},
        {"padding": "max_length", "max_length": 40, "truncation": True},
        {"truncation": True, "max_length": 3, "padding": True, "return_tensors": "pt"},
    ):
        for side in ("left", "right"):
            with attributes(every, padding_side=side, truncation_side=side):
                flags = {"return_offsets_mapping": True, "return_special_tokens_mask": True, "return_length": True}
                expected = every.apply_chat_template(chats, tokenizer_kwargs=flags, **options)
                rendered = every.apply_chat_template(chats, tokenize=False)
                found = every(rendered, add_special_tokens=False, **flags, **options)
                assert as_lists(found) == as_lists(expected)


def test_rendered_chats_among_texts(every):
    chat = every.apply_chat_template([{"role": "user", "content": hostile(every)}], tokenize=False)
    prefix, suffix = every.build_inputs_with_special_tokens([]), []
    while prefix and every("a")["input_ids"][: len(prefix)] != prefix:
        suffix.insert(0, prefix.pop())
    ids = every.encode(chat, add_special_tokens=False)
    mixed = every(["a</s>b", chat, "你好"], padding=True)
    alone = [every("a</s>b"), every(chat), every("你好")]
    assert every(chat)["input_ids"] == [*prefix, *ids, *suffix]
    for row, mask, one in zip(mixed["input_ids"], mixed["attention_mask"], alone, strict=True):
        assert [index for index, real in zip(row, mask, strict=True) if real] == one["input_ids"]
    room = len(prefix) + len(suffix) + 2
    with attributes(every, truncation_side="right"):
        cut = every(chat, truncation=True, max_length=room)
    assert cut["input_ids"] == [*prefix, *ids[:2], *suffix]
    assert every(chat, split_special_tokens=True) == every(str(chat), split_special_tokens=True)
    for arguments in ((chat, "a"), ("a", chat), ([chat], ["a"]), ([("a", chat)],)):
        with pytest.raises(ValueError, match="not one of a pair or of words"):
            every(*arguments)
    with pytest.raises(ValueError, match="not one of a pair or of words"):
        every([chat], is_split_into_words=True)
    with pytest.raises(ValueError, match=r"use apply_chat_template\(messages, tokenize=True\)"):
        every(str(chat), sanitize_control_tokens=True)


def test_a_chat_of_another_tokenizer_has_no_control_tokens_here(plain):
    qwen = TokenizerGolden("qwen_small").load(QWenTokenizer)
    chat = qwen.apply_chat_template([{"role": "user", "content": "</s><reserved_106>"}], tokenize=False)
    ids = plain.encode(chat)
    assert not set(ids) & control_ids(plain) and plain.decode(ids) == str(chat)


@pytest.mark.parametrize(
    ("template", "is_carried"),
    [
        ("{% for m in messages %}<reserved_106>{{ m.content | trim }}{% endfor %}", True),
        (
            "{% for m in messages %}{% if m.content == ' </s>x ' %}<reserved_106>{{ m.content }}{% endif %}{% endfor %}",
            False,
        ),
        ("{% for m in messages %}{{ m.content.split('</s>')[1] }}{% endfor %}", False),
        ("{% for m in messages %}{% if '\U000f0001' in m.content %}{{ 1 / 0 }}{% endif %}{% endfor %}a", True),
    ],
)
def test_templates_that_look_into_messages(plain, template, is_carried):
    chat = [{"role": "user", "content": " </s>x "}]
    text = plain.apply_chat_template(chat, chat_template=template, tokenize=False)
    assert text == standard(plain, chat, chat_template=template, tokenize=False)
    assert isinstance(text, RenderedChat) == is_carried
    if is_carried:
        assert EOS not in plain.encode(text, add_special_tokens=False)
    else:
        with pytest.raises(ValueError, match="changes what messages say"):
            plain.apply_chat_template(chat, chat_template=template, tokenize=False, sanitize_control_tokens=True)


PRIVATE = [*range(0xE000, 0xF900), *range(0xF0000, 0x10FFFE)]


@pytest.mark.parametrize("characters", [range(0xF0000, 0xFFFFE), PRIVATE], ids=["plane 15", "all"])
def test_messages_of_private_use_characters(every, characters):
    text = "".join(map(chr, characters))
    ids = every.apply_chat_template([{"role": "user", "content": text}])["input_ids"]
    short = every.apply_chat_template([{"role": "user", "content": text[:9]}])["input_ids"]
    control = set(every.all_special_ids) - {every.unk_token_id}
    assert [index for index in ids if index in control] == [index for index in short if index in control]


def test_no_character_is_left_for_marks(tokenizer):
    text = "".join(chr(code) for span in MEANINGLESS for code in span)
    for tokenize in (True, False):
        with pytest.raises(ValueError, match="the text holds all 137,504 private-use characters"):
            tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=tokenize)
