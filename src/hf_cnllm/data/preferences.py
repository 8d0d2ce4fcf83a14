"""Preference data in the published formats, each read whole or refused by field.

| fields                                                      | what is read | as in                          |
|-------------------------------------------------------------|--------------|--------------------------------|
| `prompt`, `chosen`, `rejected`                              | a pair       | TRL                            |
| `chosen`, `rejected`, conversations but for the last answer alike | a pair | UltraFeedback                  |
| a conversation's fields without the answer, `chosen`, `rejected` | a pair  | LLaMA-Factory                  |
| `prompt`, `completion`, `label`                             | a judgment   | TRL                            |
| a conversation, `label` or `kto_tag`                        | a judgment   | LLaMA-Factory                  |
| `prompt`, or a conversation, whose last answer is left out  | a question   | TRL, everything in `formats.py` |

An answer is a text, one message, or a list of messages. What comes out is what TRL's trainers take: `prompt`, a list of
messages, and `chosen` and `rejected`, or `completion` and `label`, each answer a list of one message; with `tools`.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from .conversations import Row, read_rows
from .formats import NOTHING, ROLES, ConversationError, not_read, shown, to_messages

SIDES = ("chosen", "rejected")
LABELS = ("label", "kto_tag")
# What published sets say of a pair that these objectives do not read.
IGNORED = (
    "score_chosen",
    "score_rejected",
    "chosen_score",
    "rejected_score",
    "chosen_model",
    "rejected_model",
    "margin",
)
TURNS = ("messages", "conversations")
# What errors call a message of the conversation that is joined of a question and its answer.
JOINED = re.compile(r"^field '(?:messages|conversations)\[(\d+)\](\.content\b)?")

Reader = Callable[[Mapping[str, Any]], Row]


def read_pair(row: Mapping[str, Any], ignore: Collection[str] = ()) -> Row:
    """`{"prompt", "chosen", "rejected", "tools"}` of a row: two answers to the same conversation.

    Raises:
        ConversationError: a field is missing, is not read, or the two answer different questions.
    """
    rest = _rest(row, SIDES)
    chosen, rejected = (_answered(rest, row[side], side, [*IGNORED, *ignore]) for side in SIDES)
    if chosen["messages"][:-1] != rejected["messages"][:-1]:
        raise ConversationError("fields 'chosen' and 'rejected' must answer the same conversation")
    answers = {side: one["messages"][-1:] for side, one in zip(SIDES, (chosen, rejected), strict=True)}
    return {"prompt": chosen["messages"][:-1], **answers, "tools": chosen["tools"]}


def read_judgment(row: Mapping[str, Any], ignore: Collection[str] = ()) -> Row:
    """`{"prompt", "completion", "label", "tools"}` of a row: an answer, and whether it is a good one.

    Raises:
        ConversationError: a field is missing or not read, or the label says neither yes nor no.
    """
    name = next((name for name in LABELS if isinstance(row, Mapping) and name in row), LABELS[0])
    rest = _rest(row, (name,))
    if not isinstance(row[name], bool | int) or row[name] not in (0, 1):
        raise ConversationError(f"field {name!r} must say yes or no, got {row[name]!r}")
    answer = rest.pop("completion", None)
    found = to_messages(rest, ignore=ignore) if answer is None else _answered(rest, answer, "completion", ignore)
    *prompt, completion = found["messages"]
    return {"prompt": prompt, "completion": [completion], "label": bool(row[name]), "tools": found["tools"]}


def read_question(row: Mapping[str, Any], ignore: Collection[str] = ()) -> Row:
    """`{"prompt", "tools"}` of a row and, beside a `prompt`, its other fields, which reward functions are given.

    Raises:
        ConversationError: there is no conversation, or no question in it.
    """
    if isinstance(row, Mapping) and "prompt" in row and not {"response", "completion"} & row.keys():
        given = {name: value for name, value in row.items() if name not in ignore}
        others = {name: value for name, value in given.items() if name not in ("prompt", "tools", "system")}
        asked = {name: given.get(name) for name in ("prompt", "tools", "system", "history")}
        return {**_question(_answered(asked, "?", "prompt", ())), **others}
    name = next((name for name in TURNS if isinstance(row, Mapping) and isinstance(row.get(name), list)), None)
    if name is not None and row[name] and _role(row[name][-1]) != "assistant":
        return _question(_answered({**row}, "?", name, ignore))
    return _question(to_messages(row, ignore=ignore))


def read_preferences(names: Iterable[str], read: Reader, split: str = "train") -> list[Row]:
    """The rows of files, and of `datasets` by their name or folder, by one of the readers above; raises as [`read_rows`]."""
    return read_rows(names, read, split)


def _rest(row: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """The row without these fields, all of which it must have."""
    if not isinstance(row, Mapping):
        raise ConversationError(f"expected an object, got {type(row).__name__}")
    if missing := [name for name in names if row.get(name) is None]:
        filled = sorted(name for name, value in row.items() if value is not None)
        raise ConversationError(f"needs the field {missing[0]!r}; has {filled}")
    return {name: value for name, value in row.items() if name not in names and value is not None}


def _answered(rest: dict[str, Any], answer: Any, field: str, ignore: Collection[str]) -> Row:
    """The conversation that is the rest of a row and this answer."""
    turns = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    turns = [turns] if isinstance(turns, Mapping) else turns
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise ConversationError(f"field {field!r} must be a text, a message or a list of messages")
    asked = rest.get("prompt")
    names, joined = _names(field, answer), JOINED
    if _role(turns[0]) in ("system", "user"):  # the whole conversation
        rest = {name: value for name, value in rest.items() if name not in ("prompt", *TURNS)} | {"messages": turns}
    elif isinstance(asked, str | list):
        _refuse(rest, TURNS, "prompt", ignore)
        names = _names("prompt", asked) + names
        asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        rest = {name: value for name, value in rest.items() if name != "prompt"} | {"messages": [*asked, *turns]}
    elif asked is not None:
        raise ConversationError(f"field 'prompt' must be a text or a list of messages, got {shown(asked)}")
    elif name := next((name for name in TURNS if isinstance(rest.get(name), list)), None):
        names = _names(name, rest[name]) + names
        rest = {**rest, name: [*rest[name], *turns]}
    elif "instruction" in rest and len(turns) == 1:
        _refuse(rest, ("output",), field, ignore)
        joined = re.compile("^field 'output()()")
        rest = {**rest, "output": turns[0].get("content", turns[0].get("value"))}
    else:
        raise ConversationError(
            f"needs the question: the field 'prompt', or a conversation in {field!r}; has {sorted(rest)}"
        )
    try:
        return to_messages(rest, ignore=ignore)
    except ConversationError as error:
        said = joined.sub(lambda found: f"field '{names[int(found[1] or 0)].format(found[2] or '')}", str(error))
        raise ConversationError(said.replace("beside 'messages'", f"beside {field!r}")) from None


def _refuse(rest: Mapping[str, Any], names: Collection[str], beside: str, ignore: Collection[str]) -> None:
    """Raises ConversationError for a field that would be passed over without a word."""
    if name := next((name for name in names if rest.get(name) not in NOTHING and name not in ignore), None):
        raise not_read(name, f"beside {beside!r}")


def _names(field: str, value: Any) -> list[str]:
    """What errors call the messages of a field, with a place for the part of the message."""
    if isinstance(value, str):
        return [field]
    return [f"{field}[{index}]{{}}" for index in range(len(value))] if isinstance(value, list) else [f"{field}{{}}"]


def _role(turn: Any) -> str | None:
    named = (turn.get("role") or turn.get("from")) if isinstance(turn, Mapping) else None
    return ROLES.get(named) if isinstance(named, str) else None


def _question(row: Row) -> Row:
    messages = row["messages"]
    while messages[-1]["role"] == "assistant":  # a call may stand behind a thought
        messages = messages[:-1]
    return {"prompt": messages, "tools": row["tools"]}
