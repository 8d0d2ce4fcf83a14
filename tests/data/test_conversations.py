"""Conversations: the embedded set, the user's files, and what is learned from them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GenerationConfig

import hf_cnllm  # noqa: F401
from hf_cnllm.data.conversations import (
    ConversationError,
    encode_conversation,
    load_instructions,
    read_conversations,
    reply_end_ids,
    with_system_in_question,
)
from tokenizer_goldens import TokenizerGolden

IGNORED = -100


def turns(*contents: str, system: str | None = None) -> list[dict]:
    roles = ("user", "assistant") * len(contents)
    chat = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + chat


# ---- the embedded set


def test_the_embedded_set_is_large_and_half_in_each_language():
    chinese, english = load_instructions("zh"), load_instructions("en")
    assert len(chinese) + len(english) == len(load_instructions()) >= 200
    assert abs(len(chinese) - len(english)) <= 10
    assert all(any("\u4e00" <= char <= "\u9fff" for message in c for char in message["content"]) for c in chinese)
    assert sum(len(c) > 3 for c in load_instructions()) >= 10  # several rounds


def test_the_embedded_set_is_what_the_reader_accepts(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(json.dumps({"messages": c}) for c in load_instructions()))
    assert read_conversations(path) == load_instructions()


def test_no_question_occurs_twice():
    openings = [tuple(m["content"] for m in c if m["role"] != "assistant")[:2] for c in load_instructions()]
    assert len(set(openings)) == len(openings)


def test_an_unknown_language_is_refused():
    with pytest.raises(ValueError, match="language must be"):
        load_instructions("fr")


# ---- files


def test_both_forms_and_blank_lines(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(
        "\ufeff"
        + json.dumps({"messages": turns("你好", "你好！", system="简短回答"), "id": 7}, ensure_ascii=False)
        + "\n\n"
        + json.dumps({"instruction": "Add.", "input": "1 and 2", "output": "3"})
        + "\n"
        + json.dumps({"instruction": "Say hi.", "input": "", "output": "hi"}),
        encoding="utf-8",
    )
    assert read_conversations(path) == [
        turns("你好", "你好！", system="简短回答"),
        turns("Add.\n1 and 2", "3"),
        turns("Say hi.", "hi"),
    ]


GOOD = json.dumps({"messages": turns("a", "b")})


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected an object, got list"),
        ("{}", "needs the field 'messages'"),
        ('{"messages": []}', "field 'messages' must be a list"),
        ('{"messages": "hi"}', "field 'messages' must be a list"),
        ('{"messages": ["hi"]}', r"field 'messages\[0\]' must be an object"),
        ('{"messages": [{"role": "assistant", "content": "b"}]}', r"'messages\[0\].role' must be 'user'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "must end with a message of the assistant"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}', r"\[1\].role"),
        ('{"messages": [{"role": "user", "content": 3}]}', r"'messages\[0\].content' must be a non-empty text, got 3"),
        ('{"messages": [{"role": "user", "content": " "}]}', r"'messages\[0\].content' must be a non-empty text"),
        ('{"instruction": "a"}', "field 'output' must be a non-empty text, got nothing"),
        ('{"instruction": "a", "input": [1], "output": "b"}', "field 'input' must be"),
    ],
)
def test_a_bad_line_is_named_with_its_field(line, named, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    with pytest.raises(ConversationError, match=named) as error:
        read_conversations(path)
    assert f"{path}, line 2: " in str(error.value)


@pytest.mark.parametrize(("content", "said"), [(b"\n", "holds no conversation"), (b"\xff\xfe", "not UTF-8")])
def test_a_file_without_text_is_refused(content, said, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConversationError, match=said):
        read_conversations(path)


# ---- tokens and labels

VOCABULARIES = [
    "baichuan1_small",
    "baichuan2_small",
    "qwen_small",
    "chatglm1_small",
    "chatglm2_small",
    "chatglm3_small",
]


@pytest.fixture(scope="module", params=VOCABULARIES)
def tokenizer(request):
    return AutoTokenizer.from_pretrained(TokenizerGolden(request.param).vocabulary)


def encoded(tokenizer, messages, **kwargs):
    ends = reply_end_ids(tokenizer, GenerationConfig(eos_token_id=tokenizer.eos_token_id))
    return encode_conversation(tokenizer, messages, ends, **kwargs), ends


def test_only_the_reply_and_its_end_are_learned(tokenizer):
    example, ends = encoded(tokenizer, turns("天空为什么是蓝色的？", "Because of scattering."))
    learned = [label for label in example["labels"] if label != IGNORED]
    assert learned[-1] == ends[0] and learned[-1] not in learned[:-1]
    assert tokenizer.decode(learned[:-1]).strip() == "Because of scattering."
    assert len(example["input_ids"]) == len(example["labels"]) == len(example["attention_mask"])


def test_labels_are_the_next_tokens_or_an_end(tokenizer):
    example, ends = encoded(tokenizer, turns("一", "二。", "三", "四。"))
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (IGNORED, token) or label in ends


def test_every_labelled_reply_ends(tokenizer):
    example, ends = encoded(tokenizer, turns("一", "二。", "三", "四。"))
    labels = [*example["labels"], IGNORED]
    lasts = [i for i in range(len(labels) - 1) if labels[i] != IGNORED and labels[i + 1] == IGNORED]
    assert lasts and all(labels[i] in ends for i in lasts)


def test_the_prompt_of_generate_is_what_stands_before_the_reply(tokenizer):
    messages = turns("天空为什么是蓝色的？", "因为散射。")
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    example, _ = encoded(tokenizer, messages)
    first = next(i for i, label in enumerate(example["labels"]) if label != IGNORED)
    assert example["input_ids"][:first] == prompt[:first] and len(prompt) - first in (0, 1)  # 1: ChatGLM3's line break


def test_max_length_cuts_the_end(tokenizer):
    whole, _ = encoded(tokenizer, turns("一", "二三四五六七八九十。"))
    cut, _ = encoded(tokenizer, turns("一", "二三四五六七八九十。"), max_length=5)
    assert cut == {name: values[:5] for name, values in whole.items()}


@pytest.fixture(scope="module")
def baichuan():
    return AutoTokenizer.from_pretrained(TokenizerGolden("baichuan2_small").vocabulary)


@settings(deadline=None, max_examples=30)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20))
def test_baichuan_replies_of_any_text_end_once(baichuan, text):
    example, ends = encoded(baichuan, turns(text, text + "."))
    assert [i for i, label in enumerate(example["labels"]) if label in ends] == [len(example["labels"]) - 1]


def test_without_any_end_token_the_field_to_set_is_named():
    tokenizer = AutoTokenizer.from_pretrained(TokenizerGolden("baichuan2_small").vocabulary)
    tokenizer.chat_template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    with pytest.raises(ValueError, match="set eos_token_id"):
        reply_end_ids(tokenizer, GenerationConfig())


def test_a_template_without_marks_is_refused():
    tokenizer = AutoTokenizer.from_pretrained(TokenizerGolden("baichuan2_small").vocabulary)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="marks no reply"):
        encode_conversation(tokenizer, turns("a", "b"), [2])


def test_a_system_message_can_move_into_the_question():
    moved = with_system_in_question(turns("今天天气很好。", "Fine.", system="只给译文。"))
    assert moved == turns("只给译文。\n今天天气很好。", "Fine.")
    assert with_system_in_question(turns("a", "b")) == turns("a", "b")
