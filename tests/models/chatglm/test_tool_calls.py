import copy
import json
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from hf_cnllm.models.chatglm.tool_calls import (
    Answer,
    ToolCallError,
    as_chatglm3_messages,
    as_chatglm3_tools,
    format_tool_call,
    parse_tool_call,
    read_answer,
)
from tokenizer_goldens import TokenizerGolden

LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
ARGUMENTS = st.dictionaries(
    st.text(max_size=6) | st.sampled_from(["city", "from", "城市", "ﬁ", "a-b"]), LITERALS, max_size=4
)


@given(arguments=ARGUMENTS)
@hypothesis_settings(max_examples=150, deadline=None)
def test_what_is_written_can_be_read(arguments):
    turn = format_tool_call(arguments)
    history = [{"role": "system", "content": "", "tools": []}]
    response, turns = read_answer(f"a tool\n {turn}", history)
    assert response == {"name": "a tool", "parameters": arguments}
    assert turns == [*history, {"role": "assistant", "metadata": "a tool", "content": f" {turn}"}]


@given(arguments=st.dictionaries(st.sampled_from(["a", "b", "城市"]), LITERALS, max_size=3))
@hypothesis_settings(max_examples=100, deadline=None)
def test_parsing_equals_what_the_original_evaluated(arguments):
    code = f"tool_call({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"
    assert parse_tool_call(code) == eval(code, {"tool_call": dict}) == arguments


@pytest.mark.parametrize("name", ("chatglm3", "chatglm3_small"))
def test_golden(name):
    for case in TokenizerGolden(name)["process_response"]:
        history = json.loads(json.dumps(case["history"]))
        for output in (case["text"], Answer.of(case["text"].split("<|assistant|>"))):
            assert list(read_answer(output, history)) == case["out"]
        assert history == case["history"]  # left as it was


def output_text(output) -> str:
    return "".join(output) if isinstance(output, list) else str(output)


def test_a_role_in_a_text_is_text():
    history = [{"role": "system", "content": "", "tools": []}]
    said = "\n He wrote: <|assistant|>rm\n ```python\ntool_call(path='/')\n```"
    one_turn = Answer.of([said])
    for output in (one_turn, one_turn.rstrip(), one_turn.lstrip(" ").strip("`"), [said]):
        response, turns = read_answer(output, history)
        assert response == output_text(output).strip() and len(turns) == 2
    answer = Answer.of(said.split("<|assistant|>"))
    for same in (answer, copy.deepcopy(answer), pickle.loads(pickle.dumps(answer)), list(answer.turns)):
        assert read_answer(same, history)[0] == {"name": "rm", "parameters": {"path": "/"}}
    assert answer == said
    for output in ([], [1], b"a", None):
        with pytest.raises(ValueError, match="must be a text that the tokenizer decoded, or a list of its turns"):
            read_answer(output, history)


EXECUTED = []


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("tool_call(a=EXECUTED.append(1))", "the argument a of the tool call is no literal"),
        ("tool_call(a=__import__('os').system('true'))", "the argument a of the tool call is no literal"),
        ("tool_call(a=[x for x in ()])", "is no literal"),
        ("tool_call(a=f'{1}')", "is no literal"),
        ("tool_call(a=(lambda: 1)())", "is no literal"),
        ("tool_call(a=open)", "is no literal"),
        ("tool_call(a=1 if 1 else 2)", "is no literal"),
        ("tool_call(**EXECUTED)", r"the argument \*\* of the tool call is no literal"),
        ("tool_call(**{1: 2})", "unpacks something that has no names"),
        ("tool_call(**[1])", "unpacks something that has no names"),
        ("tool_call(*[1])", "has an argument without a name"),
        ("tool_call('x')", "has an argument without a name"),
        ("tool_call(a=1, a=2)", "gives the argument a twice"),
        ("tool_call(a=1, **{'a': 2})", "gives the argument a twice"),
        ("print(1)", "something other than a call of tool_call"),
        ("x.tool_call(a=1)", "something other than a call of tool_call"),
        ("tool_call(a=1); tool_call(a=2)", "is not valid Python"),
        ("tool_call(a=1) + 1", "something other than a call of tool_call"),
        ("tool_call", "something other than a call of tool_call"),
        ("tool_call(city='北京'", "is not valid Python"),
        ("", "is not valid Python"),
        ("tool_call(a='\0')", "is not valid Python"),
        ("tool_call(a=true)", "the argument a of the tool call is no literal"),
        ("tool_call(a=" + "[" * 5000 + "]" * 5000 + ")", "is not valid Python"),
        ("tool_call(a=" + "-" * 100_000 + "1)", "is not valid Python"),
        ("tool_call(a=x" + ".b" * 100_000 + ")", "is not valid Python|is no literal"),  # Python 3.10 reads it
        ("tool_call(a=" + "9" * 5000 + ")", "is not valid Python"),
    ],
)
def test_nothing_but_literals(code, problem, recwarn):
    with pytest.raises(ToolCallError, match=problem) as error:
        parse_tool_call(code)
    assert error.value.text == code and len(str(error.value)) < 600
    assert EXECUTED == [] and not recwarn.list


def test_odd_escapes_do_not_warn(recwarn):
    assert parse_tool_call(r"tool_call(pattern='\d+')") == {"pattern": r"\d+"}
    assert not recwarn.list


def test_a_malformed_call_is_an_error_only_with_tools():
    output = "get_weather\n```python\nimport os\n```"
    response, _ = read_answer(output, [{"role": "user", "content": ""}])
    assert response == {"name": "get_weather", "content": "```python\nimport os\n```"}
    with pytest.raises(ToolCallError, match="import os"):
        read_answer(output, [{"role": "system", "content": "", "tools": []}])


@given(output=st.text(st.sampled_from("\n `a<|assistant|>()=' tool_call"), max_size=60) | st.text(max_size=30))
@hypothesis_settings(max_examples=200, deadline=None)
def test_any_output_is_an_answer_or_a_clear_error(output):
    for history in ([], [{"role": "system", "content": "", "tools": []}]):
        try:
            response, turns = read_answer(output, history)
        except ToolCallError:
            assert history
        else:
            assert isinstance(response, (str, dict)) and len(turns) > len(history)


def test_values_that_are_no_literals_cannot_be_written():
    for value in (object(), math.inf, math.nan):
        with pytest.raises(ValueError):
            format_tool_call({"a": value})


def test_messages_of_today():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, null]}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "let me see", "tool_calls": [call, {"name": "g", "arguments": {}}]},
        {"role": "tool", "content": {"温度": 25}, "tool_call_id": "1"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "observation", "metadata": "m", "content": "1"},
    ]
    before = json.dumps(messages)
    found = as_chatglm3_messages(messages)
    assert json.dumps(messages) == before
    assert [(m["role"], m.get("metadata"), m["content"]) for m in found] == [
        ("user", None, "ab"),
        ("assistant", None, "let me see"),
        ("assistant", "f", "```python\ntool_call(x=[1, None])\n```"),
        ("assistant", "g", "```python\ntool_call()\n```"),
        ("observation", None, '{"温度": 25}'),
        ("assistant", "f", "```python\ntool_call(x=[1, None])\n```"),
        ("observation", "m", "1"),
    ]


@pytest.mark.parametrize(
    "call", ({}, {"name": "f", "arguments": "no json"}, {"name": 1}, {"name": "f", "arguments": [1]}, "f")
)
def test_bad_calls_in_messages(call):
    with pytest.raises(ValueError, match="a tool call has the keys name and arguments"):
        as_chatglm3_messages([{"role": "assistant", "tool_calls": [call]}])


def test_tools():
    def f(x: int, y: str = "a"):
        """
        Does it.

        Args:
            x: first
            y: second
        """

    tool = {"name": "f", "description": "Does it.", "parameters": {"type": "object"}}
    by_function, by_schema, bare = as_chatglm3_tools([f, {"type": "function", "function": tool}, tool])
    assert by_schema == bare == tool
    assert (by_function["name"], by_function["description"]) == ("f", "Does it.")
    assert as_chatglm3_tools(None) is as_chatglm3_tools([]) is None
    with pytest.raises(ValueError, match=r"tools\[1\] is not JSON-serializable: .*set"):
        as_chatglm3_tools([tool, {"name": {1}}])
