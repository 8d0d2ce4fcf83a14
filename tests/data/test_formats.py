"""Rows of every published format: read back to the same messages, or refused by the field."""

import json
from itertools import chain

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_cnllm  # noqa: F401
from hf_cnllm.data.formats import METADATA, ConversationError, map_conversations, to_messages

TOOLS = [{"name": "weather", "description": "of a city", "parameters": {"type": "object", "properties": {}}}]


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


# ---- conversations, and writers of them in each format

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(str.strip)
arguments = st.dictionaries(texts, st.one_of(texts, st.integers(), st.booleans(), st.none()), max_size=2)


@st.composite
def rounds(draw, can_call=False, can_silence=False):
    """A question and what answers it, with or without a tool's help."""
    messages = [{"role": "user", "content": draw(texts)}]
    for _ in range(draw(st.integers(0, 2)) if can_call else 0):
        thought = draw(st.one_of(st.just(""), texts))
        calls = [call(draw(texts), draw(arguments))]
        messages += [
            {"role": "assistant", "content": thought, "tool_calls": calls},
            {"role": "tool", "content": draw(texts)},
        ]
    messages.append({"role": "assistant", "content": draw(texts)})
    if can_silence and draw(st.booleans()):
        messages = [message | ({"loss": False} if message["role"] == "assistant" else {}) for message in messages]
    return messages


def conversations(**kinds):
    systems = st.one_of(st.just([]), texts.map(lambda text: [{"role": "system", "content": text}]))
    several = st.lists(rounds(**kinds), min_size=1, max_size=3).map(lambda parts: [*chain(*parts)])
    return st.tuples(systems, several).map(lambda parts: parts[0] + parts[1])


def as_openai(messages, tools):
    written = []
    for message in messages:
        message = dict(message)
        if "tool_calls" in message:
            message["tool_calls"] = [
                one | {"function": one["function"] | {"arguments": json.dumps(one["function"]["arguments"])}}
                for one in message["tool_calls"]
            ]
            message["content"] = message["content"] or None
        if message["role"] == "assistant":
            message["weight"] = int(message.pop("loss", True))
        written.append(message)
    return {"messages": written, "tools": tools}


def as_sharegpt(messages, tools):
    names = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
    turns = []
    for message in messages:
        if message["content"] or "tool_calls" not in message:
            turns.append({"from": names[message["role"]], "value": message["content"]})
        for one in message.get("tool_calls", []):
            turns.append({"from": "function_call", "value": json.dumps(one["function"])})
    row = {"id": "identity_0", "conversations": turns, "tools": json.dumps(tools) if tools else ""}
    if turns[0]["from"] == "system":
        row |= {"system": turns[0]["value"], "conversations": turns[1:]}
    return row


def as_chatglm3(messages, tools):
    turns, called = [], {}
    for message in messages:
        loss = {"loss": message.get("loss", True)} if message["role"] == "assistant" else {}
        if message["role"] == "tool":
            turns.append({"role": "tool", **called, "observation": message["content"]})
        elif message["content"]:
            turns.append({"role": message["role"], "content": message["content"], **loss})
        for one in message.get("tool_calls", []):
            function = one["function"]
            called = {"name": function["name"], "parameters": function["arguments"], **loss}
    return {"conversations": turns, "tools": tools} if tools else {"conversations": turns}


def as_qwen(messages, tools):
    turns = [{"from": message["role"], "value": message["content"]} for message in messages]
    return {"id": "identity_0", "conversations": turns}


def in_pairs(prompt, response, history="history", **more):
    def write(messages, tools):
        system = [message["content"] for message in messages if message["role"] == "system"]
        said = [message["content"] for message in messages if message["role"] != "system"]
        pairs = [list(pair) for pair in zip(said[::2], said[1::2], strict=True)]
        row = {prompt: pairs[-1][0], response: pairs[-1][1], history: pairs[:-1], **more}
        return row | ({"system": system[0]} if system else {})

    return write


FORMATS = {
    "OpenAI": (as_openai, {"can_call": True, "can_silence": True}, {}),
    "ShareGPT": (as_sharegpt, {"can_call": True}, {}),
    "ChatGLM3": (as_chatglm3, {"can_call": True, "can_silence": True}, {}),
    "Qwen": (as_qwen, {}, {}),
    "Alpaca": (in_pairs("instruction", "output", input=""), {}, {}),
    "prompt and response": (in_pairs("prompt", "response"), {}, {}),
    "prompt and completion": (in_pairs("prompt", "completion"), {}, {}),
    "AdvertiseGen": (in_pairs("content", "summary"), {}, {}),
    "named columns": (
        in_pairs("input", "text", history="past"),
        {},
        {"prompt_column": "input", "response_column": "text", "history_column": "past"},
    ),
}


def test_a_named_column_that_is_not_there_is_what_is_told():
    with pytest.raises(ConversationError, match=r"needs the field '答'; has \['instruction', 'output', '问'\]"):
        to_messages({"问": "q", "instruction": "q", "output": "a"}, prompt_column="问", response_column="答")


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_what_is_written_in_a_format_reads_back(name, data):
    write, kinds, columns = FORMATS[name]
    messages = data.draw(conversations(**kinds))
    has_calls = any("tool_calls" in message for message in messages)
    row = json.loads(json.dumps(write(messages, TOOLS if has_calls else None)))
    assert to_messages(row, **columns) == {"messages": messages, "tools": TOOLS if has_calls else None}
    # Nothing else of a row is passed over.
    with pytest.raises(ConversationError, match="field 'reasoning' is not read"):
        to_messages(row | {"reasoning": "because"}, **columns)
    assert to_messages(row | {"reasoning": "because"}, **columns, ignore=["reasoning"])["messages"] == messages


def test_published_examples():
    """The layouts of the official repositories' data, with texts of our own."""
    question, answer = {"role": "user", "content": "你好"}, {"role": "assistant", "content": "您好！"}
    spoken = [question, answer]
    step = {"role": "tool", "name": "weather", "parameters": {"city": "北京"}, "observation": {"degrees": 22}}
    rows = {
        "Baichuan 2": {
            "id": "7",
            "conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "您好！"}],
        },
        "ChatGLM3": {"conversations": spoken},
        "ChatGLM3, pairs": {"prompt": "你好", "response": "您好！"},
        "AdvertiseGen": {"content": "你好", "summary": "您好！"},
        "Stanford": {"instruction": "你好", "input": "", "output": "您好！", "text": "### 你好\n\n### 您好！"},
        "content in parts": {"messages": [question | {"content": [{"type": "text", "text": "你好"}]}, answer]},
    }
    for name, row in rows.items():
        assert to_messages(row) == {"messages": spoken, "tools": None}, name
    read = to_messages({"tools": TOOLS, "conversations": [question, answer, step, answer]})
    called = answer | {"tool_calls": [call("weather", {"city": "北京"})]}
    assert read["messages"] == [question, called, {"role": "tool", "content": '{"degrees": 22}'}, answer]
    assert read["tools"] == TOOLS
    deprecated = answer | {"content": None, "function_call": {"name": "weather", "arguments": '{"city": "北京"}'}}
    result = {"role": "function", "name": "weather", "content": "22"}
    read = to_messages({"messages": [question, deprecated, result, answer]})["messages"]
    assert read[1:3] == [called | {"content": ""}, {"role": "tool", "content": "22", "name": "weather"}]


def test_a_thought_and_its_call_part_where_only_one_is_learned():
    step = {"role": "tool", "name": "f", "parameters": {}, "observation": ""}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": False}, step]
    read = to_messages({"conversations": [*turns, {"role": "assistant", "content": "c"}]})["messages"]
    assert [message.get("loss") for message in read] == [None, False, None, None, None]


# ---- refusals

ASK, SAY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


def chat(*messages, **more):
    return {"messages": [ASK, *messages], **more}


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"messages": [SAY]}, r"'messages\[0\].role' must be 'user' or 'system', got 'assistant'"),
        ({"conversations": [{"from": "gpt", "value": "hi"}]}, r"'conversations\[0\].role' must be 'user'"),
        (chat(), r"'messages\[0\]' is the last: a conversation must end with a message of the assistant"),
        (chat(SAY, {"role": "system", "content": "c"}), r"'messages\[2\].role' must be 'user' or 'tool'"),
        (chat({"role": "critic", "content": "c"}), r"'messages\[1\].role' must be one of system, .*got \"critic\""),
        (chat(SAY, ASK, SAY | {"reasoning_content": "c"}), r"'messages\[3\].reasoning_content' is not read"),
        (chat(SAY | {"loss": "no"}), r"'messages\[1\].loss' must say yes or no"),
        ({"messages": [ASK | {"loss": True}, SAY]}, r"'messages\[0\].loss' asks for what is not learned"),
        (chat(SAY | {"content": [{"type": "image", "url": "u"}]}), r"'messages\[1\].content\[0\]' must be of the type text"),
        (chat(SAY | {"tool_calls": [call("f", "[1]")]}), r"\[1\].tool_calls\[0\].arguments' must be an object"),
        (chat(SAY | {"tool_calls": [call("f", "{")]}), r"\[1\].tool_calls\[0\].arguments' must be JSON"),
        (chat(SAY | {"tool_calls": [{"function": {"arguments": {}}}]}), r"tool_calls\[0\].name' must be a non-empty text"),
        (chat(SAY | {"tool_calls": [call("f", {}) | {"result": 1}]}), r"tool_calls\[0\].result' is not read in a tool call"),
        (chat(SAY | {"tool_calls": [call("f", {})]}, ASK, SAY), r"'messages\[2\].role' must be 'tool', got 'user'"),
        (chat(SAY, {"role": "tool"}, SAY), r"'messages\[2\].content' is missing: what the tool gave back"),
        (chat(SAY, tools="weather"), "'tools' must be JSON"),
        (chat(SAY, tools=["weather"]), "'tools' must be a list of objects"),
        (chat(SAY, functions=TOOLS), "'functions' is not read beside 'messages'"),
        (chat(SAY, conversations=[]), None),
        (chat(SAY, conversations=[ASK, SAY]), "'messages' and 'conversations' are two conversations"),
        (chat(SAY, images=["cat.png"]), "'images' is not read"),
        ({"instruction": "a", "chosen": "b", "rejected": "c"}, "'chosen' is not read beside 'instruction'"),
        ({"instruction": "a", "output": "b", "history": "c"}, "'history' must be a list of"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, r"'history\[0\]' must be \[question, answer\]"),
        ({"instruction": "a", "output": "b", "history": [[None, "c"]]}, r"'history\[0\]\[0\]' must be a non-empty text"),
        ({"instruction": "a", "output": "b", "text": "a and c"}, "'text' must hold 'instruction' and 'output'"),
        ({"prompt": "a", "response": "b\ud800"}, "'response' holds half a surrogate pair"),
        ({"text": "a"}, "needs the field 'messages', or 'conversations', 'instruction' and 'output'"),
        (["a"], "expected an object, got list"),
    ],
)  # fmt: skip
def test_what_is_not_read_whole_is_refused_by_field(row, named):
    if named is None:  # what is empty says nothing
        with pytest.raises(ConversationError, match="two conversations"):
            to_messages(row)
        return
    with pytest.raises(ConversationError, match=named):
        to_messages(row)


def test_metadata_and_empty_fields_are_let_be():
    row = {"instruction": "a", "output": "b", **dict.fromkeys(METADATA, 1), "images": [], "chosen": None, "notes": ""}
    assert to_messages(row)["messages"] == [ASK, SAY]


# ---- datasets


@pytest.mark.parametrize("kind", ["map-style", "streamed", "splits"])
def test_datasets_become_messages_and_tools(kind):
    called = SAY | {"tool_calls": [call("weather", {"city": "北京"})]}
    other = SAY | {"tool_calls": [call("date", {"year": 2023})]}
    answered = [{"role": "tool", "content": "x"}, SAY]
    expected = [[ASK, SAY], [ASK, called, *answered], [ASK, other, *answered]] * 2
    rows = [json.dumps(as_sharegpt(messages, TOOLS if len(messages) > 2 else None)) for messages in expected]
    dataset = Dataset.from_list([json.loads(row) for row in rows])
    given = {"map-style": dataset, "streamed": dataset.to_iterable_dataset(), "splits": DatasetDict(train=dataset)}[
        kind
    ]
    mapped = map_conversations(given)
    mapped = list(mapped["train"] if kind == "splits" else mapped)
    assert [row["messages"] for row in mapped] == expected
    assert [row["tools"] for row in mapped] == [TOOLS if len(messages) > 2 else None for messages in expected]


def test_a_bad_row_of_a_dataset_is_named():
    dataset = Dataset.from_list([{"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}])
    with pytest.raises(ConversationError, match="row 1: field 'output' must be a non-empty text"):
        map_conversations(dataset)
