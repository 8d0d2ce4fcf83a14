"""ChatGLM3's tool calls: what the model reads and writes, to and from the messages and tools of today's chats.

ChatGLM3 calls a tool in an assistant's turn whose metadata is the tool's name and whose content is Python:

    <|assistant|>get_weather
     ```python
    tool_call(city='北京')
    ```<|observation|>

The original runs `eval` on it. Here it is parsed, and only literals are values: nothing that a model writes is run.
"""

import ast
import json
import keyword
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

from ..._compat import get_json_schema
from ...tokenization.chat_sections import plain_messages

ASSISTANT = "<|assistant|>"
TRAINING_TIME = ("[[训练时间]]", "2023年")  # the models' own placeholder for it, and what the originals put there


class ToolCallError(ValueError):
    """A model's output is no well-formed tool call; `text` is the output."""

    def __init__(self, problem: str, text: str):
        shown = text if len(text) <= 200 else f"{text[:200]}…"
        super().__init__(f"{problem}: {shown!r}. Expected tool_call(name=value, …) with literal values.")
        self.text = text


def parse_tool_call(code: str) -> dict[str, Any]:
    """The arguments of `tool_call(name=value, …)`; names that are no identifiers come as `**{"name": value}`.

    Values are Python literals: strings, bytes, numbers, booleans, None, and tuples, lists, dicts and sets of those.

    Raises:
        ToolCallError: anything else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd escapes in the model's strings
            call = ast.parse(code.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ToolCallError(f"the tool call is not valid Python ({str(error) or 'too deep'})", code) from None
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "tool_call"):
        raise ToolCallError("the tool call is something other than a call of tool_call", code)
    if call.args:
        raise ToolCallError("the tool call has an argument without a name", code)
    arguments: dict[str, Any] = {}
    for given in call.keywords:
        try:
            value = ast.literal_eval(given.value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            raise ToolCallError(f"the argument {given.arg or '**'} of the tool call is no literal", code) from None
        named = {given.arg: value} if given.arg is not None else value
        if not isinstance(named, dict) or not all(isinstance(name, str) for name in named):
            raise ToolCallError("the tool call unpacks something that has no names", code)
        if twice := arguments.keys() & named.keys():
            raise ToolCallError(f"the tool call gives the argument {min(twice)} twice", code)
        arguments |= named
    return arguments


def parse_fenced_call(content: str) -> dict[str, Any]:
    """The same, of the content of a turn: the code between the fences."""
    return parse_tool_call("\n".join(content.split("\n")[1:-1]))


def format_tool_call(arguments: Mapping[str, Any]) -> str:
    """The content of a turn that calls a tool with `arguments`, as ChatGLM3 writes it: `parse_tool_call`'s inverse.

    Raises:
        ValueError: the values are no literals.
    """
    given, others = [], {}
    for name, value in arguments.items():
        # Python reads identifiers in their NFKC form.
        if name.isidentifier() and not keyword.iskeyword(name) and unicodedata.is_normalized("NFKC", name):
            given.append(f"{name}={value!r}")
        else:
            others[name] = value
    if others:
        given.append(f"**{others!r}")
    code = f"tool_call({', '.join(given)})"
    if parse_tool_call(code) != arguments:
        raise ValueError(f"the arguments of a tool call must be literals, but are {arguments!r}.")
    return f"```python\n{code}\n```"


class Answer(str):
    """Decoded text of ChatGLM3 that knows its turns: they are parted by `<|assistant|>` where that was a token, not where
    the model wrote its name. Stripped it still does; what else is made of it (a slice, a sum) is an ordinary string."""

    turns: tuple[str, ...]

    @classmethod
    def of(cls, turns: Iterable[str]) -> "Answer":
        turns = tuple(turns)
        answer = cls(ASSISTANT.join(turns))
        answer.turns = turns
        return answer

    def lstrip(self, chars: str | None = None, /) -> "Answer":
        first, *others = self.turns
        return Answer.of([first.lstrip(chars), *others])

    def rstrip(self, chars: str | None = None, /) -> "Answer":
        *others, last = self.turns
        return Answer.of([*others, last.rstrip(chars)])

    def strip(self, chars: str | None = None, /) -> "Answer":
        return self.lstrip(chars).rstrip(chars)


def read_answer(
    output: str | Sequence[str], history: Sequence[Mapping[str, Any]]
) -> tuple[str | dict[str, Any], list[dict[str, Any]]]:
    """What ChatGLM3 generated after `<|assistant|>`, as (response, history with the turns in it added).

    The response is the last turn: its text or, for a tool call, `{"name": …, "parameters": {…}}` if `history` begins
    with a system message that has tools, else `{"name": …, "content": …}`.

    Args:
        output: what the tokenizer decoded, which knows where `<|assistant|>` was generated; or its turns, one by one. A
            string from elsewhere tells no token from its name and is parted at every `<|assistant|>`, as in the original:
            pass `[output]` if it comes from a server and may quote one.

    Raises:
        ToolCallError: the history has tools, and the last turn is a malformed call of one.
        ValueError: the output is neither.
    """
    texts: Sequence[str] = output
    if isinstance(output, str):
        texts = output.turns if isinstance(output, Answer) else output.split(ASSISTANT)
    if not (isinstance(texts, (list, tuple)) and texts and all(isinstance(text, str) for text in texts)):
        raise ValueError(
            f"output must be a text that the tokenizer decoded, or a list of its turns, but is {output!r}."
        )
    turns = [dict(deepcopy(message)) for message in history]
    for text in texts:
        metadata, _, content = text.partition("\n") if "\n" in text else ("", "", text)
        name = metadata.strip()
        content = content if name else content.strip()
        turns.append({"role": "assistant", "metadata": metadata, "content": content})
    if not name:
        return content.replace(*TRAINING_TIME), turns
    if turns[0]["role"] == "system" and "tools" in turns[0]:
        return {"name": name, "parameters": parse_fenced_call(content)}, turns
    return {"name": name, "content": content}, turns


def as_chatglm3_messages(conversation: Any) -> list[dict[str, Any]]:
    """Messages in the usual form as ChatGLM3's: `tool_calls` become turns of their own, the role tool observation.

    ChatGLM3's own keys `metadata` (of any message) and `tools` (of a system message) stay.

    Raises:
        ValueError: a tool call without name or arguments, or `tools` that are not JSON-serializable.
    """
    messages: list[dict[str, Any]] = []
    for message in plain_messages(conversation):
        calls = message.pop("tool_calls", None) or []
        if message.get("role") == "tool":
            message["role"] = "observation"
        if message.get("role") == "observation" and isinstance(message.get("content"), (Mapping, list)):
            message["content"] = json.dumps(message["content"], ensure_ascii=False)
        if "tools" in message:
            _check_json(message["tools"])
        if message.get("content") or not calls:
            messages.append(message)
        messages += [
            {"role": message["role"], "metadata": name, "content": format_tool_call(arguments)}
            for name, arguments in map(_call, calls)
        ]
    return messages


def _call(call: Any) -> tuple[str, dict[str, Any]]:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    name, arguments = function.get("name"), function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise ValueError(f"a tool call has the keys name and arguments (an object), but here is {call!r}.")
    return name, dict(arguments)


def as_chatglm3_tools(tools: Sequence[Mapping[str, Any] | Callable] | None) -> list[Mapping[str, Any]] | None:
    """Tools as ChatGLM3 knows them, `{"name", "description", "parameters"}`, from those, JSON schemas or functions.

    Raises:
        ValueError: one of them is not JSON-serializable.
    """
    if not tools:
        return None
    schemas = [get_json_schema(tool) if callable(tool) else tool for tool in tools]
    schemas = [schema.get("function", schema) if isinstance(schema, Mapping) else schema for schema in schemas]
    _check_json(schemas)
    return schemas


def _check_json(tools: Any) -> None:
    for index, tool in enumerate(tools if isinstance(tools, (list, tuple)) else [tools]):
        try:
            json.dumps(tool)
        except (TypeError, ValueError) as error:
            raise ValueError(f"tools[{index}] is not JSON-serializable: {error}. The tool is {tool!r}.") from error
