"""Published formats of conversations, each read whole into messages or refused by field.

| fields                                                | as in                                                           |
|-------------------------------------------------------|-----------------------------------------------------------------|
| `messages`                                            | OpenAI, TRL, transformers; with `tool_calls`, `loss`, `weight`  |
| `conversations`, each with `from`/`value`             | ShareGPT, Vicuna, Baichuan 2, Qwen, LLaMA-Factory               |
| `conversations`, each with `role`/`content`           | ChatGLM3, whose tool steps have `name`, `parameters`, `observation` |
| `instruction`, `input`, `output`, `system`, `history` | Alpaca, LLaMA-Factory                                           |
| `prompt`, `response` or `completion`, `history`       | ChatGLM3, TRL                                                   |
| `content`, `summary`                                  | AdvertiseGen, as ChatGLM-6B and ChatGLM2-6B are tuned on it     |
| any names of columns                                  | ChatGLM-6B's and ChatGLM2-6B's `main.py`                        |

What comes out is `{"messages": [...], "tools": [...] or None}` as `apply_chat_template` takes it. A message has `role`
(system, user, assistant, tool) and `content`; an assistant's may have `tool_calls` and `"loss": False`, which says that
nothing is learned from it; a tool's may have `name` and `tool_call_id`.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

Message = dict[str, Any]
Conversation = list[Message]

# Fields of a row or a message that say nothing to the model. Whatever else is not read is refused.
METADATA = frozenset(
    {
        *("id", "idx", "index", "uid", "uuid", "hash", "conversation_id", "num_turns", "split", "type", "tags"),
        *("prompt_id", "source", "dataset", "data_source", "origin", "url", "license", "author", "model"),
        *("language", "lang", "category", "domain", "topic", "task", "task_type"),
        *("created", "created_at", "updated_at", "timestamp", "date"),
    }
)
ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response"), "tool"),
}
# Role -> what its messages may have besides role, content, LOSS_FIELDS and metadata.
MESSAGE_FIELDS = {
    "system": {"tools"},
    "user": set(),
    "assistant": {"tool_calls", "function_call"},
    "tool": {"name", "tool_call_id"},
}
STEP_FIELDS = {"name", "parameters", "observation"}  # of ChatGLM3's tool steps: a call and its result in one
LOSS_FIELDS = ("loss", "weight")  # ChatGLM3's and OpenAI's word for whether a message is learned
# Role -> those that may come next.
FOLLOWERS = {
    "": ("user", "system"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
Placed = tuple[str, Message]  # and the field that it comes from
NOT_UTF8 = "the file is not UTF-8 text: convert it first, for example by iconv -f GB18030 -t UTF-8"
NOTHING: tuple[Any, ...] = (None, "", [], {})


class ConversationError(ValueError):
    """A row of a data set that is not a conversation; the message names the field, and the reader adds file and line."""


class Format(NamedTuple):
    """How a row with these fields is read."""

    required: tuple[str, ...]  # the first of them names the format where others are missing
    optional: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Iterator[Placed]]


def to_messages(
    row: Mapping[str, Any],
    prompt_column: str | None = None,
    response_column: str | None = None,
    history_column: str | None = None,
    ignore: Collection[str] = (),
) -> dict[str, Any]:
    """One row of a data set, in any of the formats above, as `{"messages": [...], "tools": [...] or None}`.

    Args:
        prompt_column: with `response_column`, the fields of a question and its answer; by default the format tells.
        history_column: the field of earlier rounds, `[[question, answer], ...]`; `history` by default.
        ignore: fields to leave out. Those in `METADATA` and empty ones always are.

    Raises:
        ConversationError: a field is missing, holds something else, or is not read.
        ValueError: one of the two columns is given without the other.
    """
    if (prompt_column is None) != (response_column is None):
        raise ValueError("prompt_column and response_column name a question and its answer: give both")
    if not isinstance(row, Mapping):
        raise ConversationError(f"expected an object, got {type(row).__name__}")
    row = {name: value for name, value in row.items() if value is not None and name not in ignore}
    history = history_column or "history"
    if prompt_column is not None and response_column is not None:
        found = _pair(prompt_column, response_column, history)
        if missing := [name for name in found.required if name not in row]:
            raise ConversationError(f"needs the field {missing[0]!r}; has {sorted(row)}")
    else:
        found = _format_of(row, _formats(history))
    given = {name for name, value in row.items() if value not in NOTHING}
    for name in sorted(given - METADATA - {*found.required, *found.optional}):
        raise not_read(name, f"beside '{found.required[0]}'")
    placed = list(_merged(found.read(row)))
    messages = [message for _, message in placed]
    tools = [_tools(row["tools"], "tools")] if row.get("tools") not in NOTHING and "tools" in found.optional else []
    tools += [_tools(message.pop("tools"), "tools") for message in messages if "tools" in message]
    if len(tools) > 1:
        raise ConversationError("field 'tools' is there twice: leave it out of the row or of the system message")
    _check_turns(placed)
    return {"messages": messages, "tools": tools[0] if tools else None}


def map_conversations(dataset: Any, **options: Any) -> Any:
    """A `datasets` object (`Dataset`, `IterableDataset`, or a dict of them) with the columns `messages` and `tools` alone.

    Args:
        options: as of [`to_messages`].

    Raises:
        ConversationError: as `to_messages`, with the number of the row.
    """
    from datasets import Features, Json, List

    # Arrow's structs would give every call the arguments of all others, as None.
    features = Features({"messages": List(Json()), "tools": Json()})
    names = dataset.column_names
    names = next(iter(names.values())) if isinstance(names, dict) else names
    read = partial(_numbered_row, options=options)
    return dataset.map(read, with_indices=True, remove_columns=names, features=features)


def _numbered_row(row: Mapping[str, Any], number: int, options: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return to_messages(row, **options)
    except ConversationError as error:
        raise ConversationError(f"row {number}: {error}") from None


# --- formats ----------------------------------------------------------------------------------------------------------


def _read_turns(field: str, row: Mapping[str, Any]) -> Iterator[Placed]:
    """The messages of a list, each with `role` and `content` or with `from` and `value`."""
    turns = row[field]
    if not isinstance(turns, list) or not turns:
        raise ConversationError(f"field '{field}' must be a list with at least one message")
    if row.get("system") not in NOTHING:
        yield "system", {"role": "system", "content": read_text(row, "system")}
    for index, turn in enumerate(turns):
        place = f"{field}[{index}]"
        if not isinstance(turn, Mapping):
            raise ConversationError(f"field '{place}' must be an object, got {type(turn).__name__}")
        turn = {name: value for name, value in turn.items() if value is not None}
        for message in _read_turn(turn, f"{place}."):
            yield place, message


def _read_pair(
    row: Mapping[str, Any], prompt: str, response: str, query: str | None, text: str | None, history: str
) -> Iterator[Placed]:
    """A question, with its `query` on a line of its own, and its answer, after the rounds in `history`. Stanford's file has
    both once more, in its prompt, as `text`."""
    if row.get("system") not in NOTHING:
        yield "system", {"role": "system", "content": read_text(row, "system")}
    rounds = row.get(history) or []
    if not isinstance(rounds, list):
        raise ConversationError(f"field '{history}' must be a list of [question, answer], got {shown(rounds)}")
    for index, pair in enumerate(rounds):
        place = f"{history}[{index}]"
        if not (isinstance(pair, list | tuple) and len(pair) == 2):
            raise ConversationError(f"field '{place}' must be [question, answer], got {shown(pair)}")
        sides = {f"{place}[{side}]": value for side, value in enumerate(pair)}
        for role, side in zip(("user", "assistant"), sides, strict=True):
            yield side, {"role": role, "content": read_text(sides, side)}
    question = read_text(row, prompt)
    if query is not None and row.get(query) not in NOTHING:
        question += "\n" + read_text(row, query)
    answer = read_text(row, response)
    if text in row and not all(part in str(row[text]) for part in (row[prompt], answer)):
        raise ConversationError(f"field '{text}' must hold '{prompt}' and '{response}' if it is there")
    yield prompt, {"role": "user", "content": question}
    yield response, {"role": "assistant", "content": answer}


def _pair(prompt: str, response: str, history: str, query: str | None = None, text: str | None = None) -> Format:
    read = partial(_read_pair, prompt=prompt, response=response, query=query, text=text, history=history)
    return Format((prompt, response), tuple(filter(None, ("system", history, query, text))), read)


@cache
def _formats(history: str) -> list[Format]:
    return [
        Format(("messages",), ("system", "tools"), partial(_read_turns, "messages")),
        Format(("conversations",), ("system", "tools"), partial(_read_turns, "conversations")),
        _pair("instruction", "output", history, "input", "text"),
        _pair("prompt", "response", history),
        _pair("prompt", "completion", history),
        _pair("content", "summary", history),
    ]


def _format_of(row: Mapping[str, Any], formats: list[Format]) -> Format:
    found = [known for known in formats if row.keys() >= set(known.required)]
    found = found or [known for known in formats if known.required[0] in row][:1]
    if len(found) > 1:
        names = " and ".join(f"'{known.required[-1]}'" for known in found)
        raise ConversationError(f"fields {names} are two conversations: leave one out")
    if not found:
        pairs = ", ".join(" and ".join(map(repr, known.required)) for known in formats[2:])
        raise ConversationError(f"needs the field 'messages', or 'conversations', {pairs}; has {sorted(row)}")
    return found[0]


# --- messages ---------------------------------------------------------------------------------------------------------


def _read_turn(turn: Mapping[str, Any], place: str) -> Iterator[Message]:
    """One element of a list as a message; ChatGLM3's tool steps are two."""
    role_field = next((name for name in ("role", "from") if name in turn), "role")
    named = turn.get(role_field)
    role = ROLES.get(named) if isinstance(named, str) else None
    if role is None:
        known = ", ".join(ROLES)
        raise ConversationError(f"field '{place}{role_field}' must be one of {known}, got {shown(named)}")
    text_field = next((name for name in ("content", "value") if name in turn), "content")
    is_step = role == "tool" and "parameters" in turn
    read = STEP_FIELDS if is_step else MESSAGE_FIELDS[role] | {text_field}
    for name in sorted(turn.keys() - METADATA - read - {role_field, *LOSS_FIELDS}):
        if turn[name] not in NOTHING:
            raise not_read(f"{place}{name}", f"in a message of the role {named!r}")
    loss = _loss(turn, place, is_learned=role == "assistant" or is_step)
    if is_step:
        call = _call({"name": turn.get("name"), "arguments": turn["parameters"]}, place)
        yield {"role": "assistant", "content": "", "tool_calls": [call], **loss}
        yield {"role": "tool", "content": _data_as_text(turn, "observation", place)}
    elif role == "tool":
        links = {
            name: read_text(turn, name, place) for name in ("name", "tool_call_id") if turn.get(name) not in NOTHING
        }
        yield {"role": role, "content": _data_as_text(turn, text_field, place), **links}
    elif role == "assistant":
        calls = _calls(turn, text_field if named == "function_call" else "tool_calls", place)
        is_empty = named == "function_call" or (calls and turn.get(text_field) in NOTHING)
        content = "" if is_empty else _content(turn, text_field, place)
        yield {"role": role, "content": content, **({"tool_calls": calls} if calls else {}), **loss}
    else:
        tools = {"tools": turn["tools"]} if turn.get("tools") not in NOTHING else {}
        yield {"role": role, "content": _content(turn, text_field, place), **tools}


def _merged(messages: Iterator[Placed]) -> Iterator[Placed]:
    """A thought and the call that follows it, where formats have two messages, as one."""
    thought: Placed | None = None
    for place, message in messages:
        if thought is not None:
            is_call = "tool_calls" in message and not message["content"]
            if is_call and thought[1].get("loss") == message.get("loss"):
                message = {**message, "content": thought[1]["content"]}
            else:
                yield thought
            thought = None
        if message["role"] == "assistant" and "tool_calls" not in message:
            thought = place, message
        else:
            yield place, message
    if thought is not None:
        yield thought


def _check_turns(messages: list[Placed]) -> None:
    before: Message = {"role": ""}
    for place, message in messages:
        expected = FOLLOWERS[before["role"]]
        if "tool_calls" in before:
            expected = ("tool",)
        elif before["role"] == "assistant" and "tool_calls" in message:
            expected = ("assistant", *expected)  # a thought, which is learned where the call is not, or the other way
        if message["role"] not in expected:
            wanted = " or ".join(map(repr, expected))
            raise ConversationError(f"field '{place}.role' must be {wanted}, got {message['role']!r}")
        before = message
    if before["role"] != "assistant":
        raise ConversationError(
            f"field '{place}' is the last: a conversation must end with a message of the assistant"
        )


def _loss(turn: Mapping[str, Any], place: str, is_learned: bool) -> dict[str, bool]:
    for name in LOSS_FIELDS:
        if name in turn and (not isinstance(turn[name], bool | int) or turn[name] not in (0, 1)):
            raise ConversationError(f"field '{place}{name}' must say yes or no, got {shown(turn[name])}")
        if turn.get(name) and not is_learned:
            raise ConversationError(
                f"field '{place}{name}' asks for what is not learned: the assistant's messages are"
            )
    return {} if not is_learned or all(turn.get(name, True) for name in LOSS_FIELDS) else {"loss": False}


def _calls(turn: Mapping[str, Any], field: str, place: str) -> list[dict[str, Any]]:
    """The tool calls of an assistant's message: a list, one object, or either as JSON."""
    if field == "tool_calls" and "function_call" in turn:
        field = "function_call"
    calls = turn.get(field) or []
    if isinstance(calls, str):
        calls = _from_json(turn, field, place)
    if isinstance(calls, Mapping):
        return [_call(calls, f"{place}{field}.")]
    if not isinstance(calls, list):
        raise ConversationError(f"field '{place}{field}' must be a list, got {shown(calls)}")
    return [_call(call, f"{place}{field}[{index}].") for index, call in enumerate(calls)]


def _call(call: Any, place: str) -> dict[str, Any]:
    """A tool call as OpenAI has it, with the arguments as an object."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ConversationError(
            f"field '{place}function' must be an object with name and arguments, got {shown(call)}"
        )
    known = {"name", "arguments"} | ({"id", "type"} if function is call else set())
    for name in sorted(
        {*function.keys() - known, *(call.keys() - {"function", "id", "type"} if function is not call else ())}
    ):
        raise not_read(f"{place}{name}", "in a tool call")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _from_json(function, "arguments", place)
    if not isinstance(arguments, Mapping):
        raise ConversationError(f"field '{place}arguments' must be an object, got {shown(arguments)}")
    link = {"id": read_text(call, "id", place)} if call.get("id") not in NOTHING else {}
    return {
        **link,
        "type": "function",
        "function": {"name": read_text(function, "name", place), "arguments": dict(arguments)},
    }


def _tools(tools: Any, place: str) -> list[Any]:
    tools = _from_json({place: tools}, place) if isinstance(tools, str) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ConversationError(f"field '{place}' must be a list of objects, one for each tool, got {shown(tools)}")
    return tools or []


def _content(turn: Mapping[str, Any], name: str, place: str) -> str:
    """A text, or the texts of a list of `{"type": "text", "text": ...}`."""
    content = turn.get(name)
    if not isinstance(content, list):
        return read_text(turn, name, place)
    for index, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise ConversationError(f"field '{place}{name}[{index}]' must be of the type text, got {shown(part)}")
    return read_text({name: "".join(read_text(part, "text", f"{place}{name}.") for part in content)}, name, place)


def _data_as_text(turn: Mapping[str, Any], name: str, place: str) -> str:
    """What a tool gave back: a text, which may be empty, or data, as JSON."""
    if name not in turn:
        raise ConversationError(f"field '{place}{name}' is missing: what the tool gave back")
    if isinstance(turn[name], str):
        return turn[name] and read_text(turn, name, place, may_be_blank=True)
    return json.dumps(turn[name], ensure_ascii=False)


def _from_json(row: Mapping[str, Any], name: str, place: str = "") -> Any:
    try:
        return parse_json(read_text(row, name, place))
    except ValueError as error:
        raise ConversationError(f"field '{place}{name}' must be JSON, got {shown(row[name])} ({error})") from None


def read_text(row: Mapping[str, Any], name: str, place: str = "", may_be_blank: bool = False) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not (may_be_blank or value.strip()):
        raise ConversationError(
            f"field '{place}{name}' must be a non-empty text, got {shown(value) if name in row else 'nothing'}"
        )
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ConversationError(
            f"field '{place}{name}' holds half a surrogate pair, which is no character: cut it out"
        )
    return value


def not_read(field: str, where: str) -> ConversationError:
    return ConversationError(
        f"field '{field}' is not read {where}: remove it, or name it in `ignore` (--ignore_fields) if nothing of it is to be learned"
    )


def shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:60]


# --- JSON -------------------------------------------------------------------------------------------------------------


def parse_json(text: str) -> Any:
    """The value that `text` holds. Raises ValueError for what is no JSON, and for a name that occurs twice in one object."""
    try:
        return DECODER.decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) < len(pairs):
        seen: set[str] = set()
        double = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {double!r} occurs twice in one object")
    return names


DECODER = json.JSONDecoder(object_pairs_hook=_without_doubles)
