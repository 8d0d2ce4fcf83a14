"""ChatGLM3's tool calls by token ids, without vLLM."""

import json

import pytest
from transformers import AutoTokenizer

from hf_cnllm.vllm.tool_turns import ToolTurns
from tokenizer_goldens import FIXTURES

CODE = "```python\ntool_call(city='北京', days=2)\n```"
CALL = ("get_weather", {"city": "北京", "days": 2}, "")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FIXTURES / "vocab" / "chatglm3_small")


@pytest.fixture(scope="module")
def ids(tokenizer):
    """Ids of texts and of control tokens, which are in a list of their own."""
    return lambda *parts: [
        index
        for part in parts
        for index in ([tokenizer.get_command(*part)] if isinstance(part, list) else tokenizer.encode_message(part))
    ]


def read(turns, answer):
    call = turns.call(answer)
    return call and (call.name, json.loads(call.arguments), call.before)


def test_call(tokenizer, ids):
    turns = ToolTurns(tokenizer, ["get_weather", "other"])
    assert read(turns, ids("get_weather\n", CODE, ["<|observation|>"])) == CALL
    after_text = ids("\n", "看看。", ["<|assistant|>"], "get_weather\n", CODE, ["<|observation|>"])
    assert read(turns, after_text) == (*CALL[:2], "看看。")


@pytest.mark.parametrize(
    "answer",
    [
        [],
        [["<|observation|>"]],
        ["get_weather\n", CODE],  # cut off
        ["get_weather\n", CODE, ["<|user|>"]],
        ["get_weather\n", CODE, ["</s>"]],
        ["get_weather\n", CODE, "<|observation|>"],  # text
        ["get_weather\n", CODE, "<|observation|>", ["<|user|>"]],
        ["\n", "看看。<|assistant|>get_weather\n" + CODE, ["<|observation|>"]],  # the turn's mark as text
        ["\n", "get_weather\n" + CODE, ["<|observation|>"]],  # no name in the first line
        ["drop_table\n", CODE, ["<|observation|>"]],  # no such tool
        ["get_weather\n", "```python\ntool_call(city=open('x'))\n```", ["<|observation|>"]],
        ["get_weather\n", "```python\ntool_call(city={1, 2})\n```", ["<|observation|>"]],  # JSON has no sets
    ],
)  # fmt: skip
def test_everything_else_is_text(tokenizer, ids, answer):
    assert ToolTurns(tokenizer, ["get_weather"]).call(ids(*answer) if answer else []) is None


def test_no_call_without_tools(tokenizer, ids):
    turns = ToolTurns(tokenizer, [])
    assert turns.call(ids("get_weather\n", CODE, ["<|observation|>"])) is None
    assert not turns.may_become_call(ids("get_weather\n"))


def test_what_may_become_a_call(tokenizer, ids):
    """Each beginning of a call may; text that cannot is let go with its first characters."""
    turns = ToolTurns(tokenizer, ["get_weather"])
    call = ids("get_weather\n", CODE, ["<|observation|>"])
    assert all(turns.may_become_call(call[:length]) for length in range(len(call)))
    assert turns.may_become_call(ids("\n", "看看。", ["<|assistant|>"], "get_w"))
    for text in ("\n你好", "get_weather 是什么", "你好"):
        assert not turns.may_become_call(ids(text))
    assert not turns.may_become_call(ids("get_weather\n", CODE, ["<|user|>"]))
