"""Conversations: the embedded set, the user's files, and what is learned from them."""

import json
from functools import partial
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GenerationConfig

import hf_cnllm  # noqa: F401
from hf_cnllm.data.conversations import (
    ConversationError,
    encode_conversation,
    encode_conversations,
    load_instructions,
    read_conversations,
    read_rows,
    reply_end_ids,
    with_system_in_question,
)
from hf_cnllm.data.formats import to_messages
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
    assert [row["messages"] for row in read_conversations(path)] == load_instructions()


def test_no_question_occurs_twice():
    openings = [tuple(m["content"] for m in c if m["role"] != "assistant")[:2] for c in load_instructions()]
    assert len(set(openings)) == len(openings)


def test_an_unknown_language_is_refused():
    with pytest.raises(ValueError, match="language must be"):
        load_instructions("fr")


# ---- files


@pytest.mark.parametrize("layout", ["lines", "list", "indented list"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "BOM"])
def test_lines_and_lists_of_mixed_formats(layout, mark, tmp_path):
    rows = [
        {"messages": turns("你好", "你好！", system="简短回答"), "id": 7},
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        {"conversations": [{"from": "human", "value": "a\u2028b"}, {"from": "gpt", "value": "c"}]},
    ]
    texts = [json.dumps(row, ensure_ascii=False, indent=1 if layout == "indented list" else None) for row in rows]
    path = tmp_path / "data.json"
    text = "\n\n".join(["", *texts, ""]) if layout == "lines" else "\n[" + " ,\n ".join(texts) + "\n ]\n"
    path.write_text(mark + text, encoding="utf-8")
    expected = [turns("你好", "你好！", system="简短回答"), turns("Add.\n1 and 2", "3"), turns("a\u2028b", "c")]
    assert read_conversations(path) == [{"messages": messages, "tools": None} for messages in expected]


def test_columns_by_name(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps({"q": "今天", "a": "明天", "past": [["一", "二"]], "notes": "x"}))
    columns = {"prompt_column": "q", "response_column": "a", "history_column": "past"}
    with pytest.raises(ConversationError, match="line 1: field 'notes' is not read"):
        read_conversations(path, **columns)
    assert read_conversations(path, **columns, ignore=["notes"])[0]["messages"] == turns("一", "二", "今天", "明天")
    with pytest.raises(ValueError, match="give both"):
        read_conversations(path, prompt_column="q")


GOOD = json.dumps({"messages": turns("a", "b")})


def test_a_list_that_is_nested_too_deeply(tmp_path):
    (tmp_path / "data.json").write_text("[" * 100_000)
    with pytest.raises(ConversationError, match=r"line 1: not valid JSON .*recursion"):
        read_conversations(tmp_path / "data.json")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "not valid JSON"),
        ("[1]", "expected an object, got list"),
        ("{}", "needs the field 'messages'"),
        ('{"messages": [], "messages": []}', "the name 'messages' occurs twice"),
        ('{"instruction": "a", "output": ' + "[" * 100_000, "nested too deeply"),
        ("1" * 5000, "not valid JSON .*4300"),
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
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (f"[{GOOD},\n\n{GOOD},\n{{]", "line 4: not valid JSON"),
        (f"[\n{GOOD},\n{{}}]", "line 3: needs the field"),
        (f"[{GOOD}\n{GOOD}]", r"line 2: not valid JSON \(Expecting ',' or '\]'"),
        (f"[{GOOD}", r"line 1: not valid JSON \(Expecting ',' or '\]'"),
        (f"[{GOOD},]", "line 1: not valid JSON"),
        (f"[{GOOD}]\n{GOOD}", r"line 2: not valid JSON \(More behind the end"),
        ("[", "line 1: not valid JSON"),
        ("[]", "holds no conversation"),
    ],
)
def test_a_bad_item_of_a_list_is_named_with_its_line(text, named, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(ConversationError, match=named):
        read_conversations(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\n", "holds no conversation"),
        (b"\xff\xfe", "not UTF-8"),
        ("好".encode("gb18030"), "by iconv -f GB18030 -t UTF-8"),
    ],
)
def test_a_file_without_text_is_refused(content, said, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConversationError, match=said):
        read_conversations(path)


def test_parquet_is_read_as_lines_of_json_are(tmp_path):
    from datasets import Dataset

    turns = [{"role": "user", "content": "你好😀"}, {"role": "assistant", "content": "𠮷"}]
    rows = [{"messages": turns}, {"messages": turns * 2}]
    Dataset.from_list(rows).to_parquet(tmp_path / "data.parquet")
    expected = [{**row, "tools": None} for row in rows]
    assert read_conversations(tmp_path / "data.parquet") == expected
    assert read_rows([str(tmp_path / "data.parquet")], to_messages) == expected
    with pytest.raises(ConversationError, match=r"data\.parquet, row 0: needs the field 'a'"):
        read_rows([str(tmp_path / "data.parquet")], partial(to_messages, prompt_column="a", response_column="b"))


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


def learned_text(tokenizer, example):
    learned = [label for label in example["labels"] if label != IGNORED]
    return tokenizer.decode(learned[:-1]).strip()


def test_a_long_question_is_cut_so_that_the_answer_is_kept(tokenizer):
    messages, answer = turns("天地玄黄" * 400, "Because of scattering."), "Because of scattering."
    ends = reply_end_ids(tokenizer, GenerationConfig(eos_token_id=tokenizer.eos_token_id))
    rows = [{"messages": messages, "tools": None}, {"messages": turns("一", "二"), "tools": None}]
    (example, short), cuts = encode_conversations(tokenizer, rows, ends, 64)
    assert cuts == {"question shortened": 1} and short == encoded(tokenizer, turns("一", "二"))[0]
    assert 50 < len(example["input_ids"]) <= 64 and learned_text(tokenizer, example) == answer
    assert [label for label in example["labels"] if label != IGNORED][-1] in ends and "天地玄黄" in tokenizer.decode(
        example["input_ids"]
    )


def test_the_earliest_rounds_go_first_and_the_system_message_stays(tokenizer):
    rounds = [f"问题{number}" if number % 2 == 0 else "答" * 9 for number in range(40)]
    messages = turns(*rounds, "最后的问题", "最后的答", system="要简短")
    ends = reply_end_ids(tokenizer, GenerationConfig(eos_token_id=tokenizer.eos_token_id))
    (example,), cuts = encode_conversations(tokenizer, [{"messages": messages}], ends, 120)
    text = tokenizer.decode(example["input_ids"])
    assert cuts == {"earlier rounds left out": 1} and len(example["input_ids"]) <= 120
    assert "要简短" in text and "问题38" in text and "问题0" not in text and "最后的答" in text


def test_what_fits_to_the_token_is_not_cut(tokenizer):
    messages = turns("天地玄黄", "宇宙洪荒", "日月盈昃", "辰宿列张")
    ends = reply_end_ids(tokenizer, GenerationConfig(eos_token_id=tokenizer.eos_token_id))
    whole = encode_conversation(tokenizer, messages, ends)
    length = len(whole["input_ids"])
    assert encode_conversations(tokenizer, [{"messages": messages}], ends, length) == ([whole], {})
    (shorter,), cuts = encode_conversations(tokenizer, [{"messages": messages}], ends, length - 1)
    assert cuts == {"earlier rounds left out": 1} and len(shorter["input_ids"]) < length


def test_an_answer_that_is_too_long_loses_its_end_and_says_so(tokenizer):
    messages = turns("天地玄黄" * 400, "宇宙洪荒" * 400)
    ends = reply_end_ids(tokenizer, GenerationConfig(eos_token_id=tokenizer.eos_token_id))
    (example,), cuts = encode_conversations(tokenizer, [{"messages": messages}], ends, 64)
    assert cuts == {"answer shortened": 1, "question shortened": 1}
    learned = [label for label in example["labels"] if label != IGNORED]
    assert 24 <= len(learned) <= 48 and not set(learned) & set(ends) and len(example["input_ids"]) == 64


def test_a_row_of_which_nothing_would_be_learned_is_refused(tokenizer):
    ends = reply_end_ids(tokenizer, GenerationConfig(eos_token_id=tokenizer.eos_token_id))
    with pytest.raises(ConversationError, match=r"nothing of it would be learned: of the first 4 tokens"):
        encode_conversation(tokenizer, turns("天地玄黄", "宇宙洪荒", system="日月盈昃" * 9), ends, max_length=4)
    silent = [{**message, "loss": False} for message in turns("一", "二")]
    with pytest.raises(ConversationError, match=r"^conversation 2: nothing of it .*every answer has `loss` False"):
        encode_conversations(tokenizer, [{"messages": turns("一", "二")}, {"messages": silent}], ends)


def test_nothing_is_learned_from_messages_without_loss(tokenizer):
    whole, _ = encoded(tokenizer, turns("一", "二。", "三", "四。"))
    messages = turns("一", "二。", "三", "四。")
    messages[1]["loss"] = False
    example, _ = encoded(tokenizer, messages)
    assert example["input_ids"] == whole["input_ids"]
    assert learned_text(tokenizer, example) == "四。"


def test_what_a_template_of_the_users_own_would_drop_is_refused():
    tokenizer = AutoTokenizer.from_pretrained(TokenizerGolden("baichuan2_small").vocabulary)
    tokenizer.chat_template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    cases = {
        "tools": ([{}, {}], [{"name": "f"}]),
        "tool_calls": ([{}, {"tool_calls": [call]}], None),
        "loss": ([{}, {"loss": False}], None),
    }
    for name, (changes, tools) in cases.items():
        messages = [message | change for message, change in zip(turns("a", "b"), changes, strict=True)]
        with pytest.raises(ConversationError, match=f"has no place for `{name}`, and would drop it"):
            encode_conversation(tokenizer, messages, [2], tools=tools)


@pytest.mark.parametrize("unit", ["天地玄黄，", "abcdefghij"])
@pytest.mark.parametrize("length", [20_000, pytest.param(2_000_000, marks=pytest.mark.slow)])
def test_a_very_long_line_is_cut(tokenizer, unit, length, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"instruction": unit * (length // len(unit)), "output": "好。"}))
    ends = reply_end_ids(tokenizer, GenerationConfig(eos_token_id=tokenizer.eos_token_id))
    (example,), cuts = encode_conversations(tokenizer, read_conversations(path), ends, 2048)
    assert cuts == {"question shortened": 1} and learned_text(tokenizer, example) == "好。"
    assert 2000 < len(example["input_ids"]) <= 2048


contents = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)


@settings(deadline=None, max_examples=30)
@given(said=st.lists(st.tuples(contents, contents), min_size=1, max_size=3), silent=st.sets(st.integers(0, 1)))
def test_labels_are_exactly_the_answers(tokenizer, said, silent):
    messages = turns(*chain(*said))
    for number in silent & set(range(len(said) - 1)):
        messages[2 * number + 1]["loss"] = False
    example, ends = encoded(tokenizer, messages)
    answers = [message for message in messages if message["role"] == "assistant"]
    if getattr(tokenizer, "generation", "") in ("chatglm", "chatglm2"):
        answers = answers[-1:]  # the others are context, as in the original scripts
    before = tokenizer.encode_message("\n") if getattr(tokenizer, "generation", "") == "chatglm3" else []
    expected = []
    for answer in answers:
        if answer.get("loss", True):
            expected += [*before, *tokenizer.encode_message(answer["content"]), *ends[:1]]
    learned = [label for label in example["labels"] if label != IGNORED]
    # ChatGLM3's answers end with the role of whoever is next, which is an end too.
    assert [ends[0] if label in ends else label for label in learned] == expected


def test_chatglm3_learns_calls_and_not_what_tools_say():
    tokenizer = AutoTokenizer.from_pretrained(TokenizerGolden("chatglm3_small").vocabulary)
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
    messages = [
        {"role": "user", "content": "天气"},
        {"role": "assistant", "content": "查一下", "tool_calls": [call]},
        {"role": "tool", "content": '{"temperature": 22}'},
        {"role": "assistant", "content": "晴"},
    ]
    example, _ = encoded(tokenizer, messages, tools=[{"name": "weather", "parameters": {}}])
    learned = tokenizer.decode([label for label in example["labels"] if label != IGNORED])
    assert "查一下" in learned and "tool_call(city='北京')" in learned and "晴" in learned
    assert "temperature" not in learned and "天气" not in learned
    assert '"name": "weather"' in tokenizer.decode(example["input_ids"])


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
