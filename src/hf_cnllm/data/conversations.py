"""Conversations for fine-tuning: the embedded instruction set, files of the user's own, and their tokenized form.

A conversation is a list of messages `{"role": ..., "content": ...}` as `apply_chat_template` takes it: an optional system
message, then user and assistant in turn, ending with the assistant.
"""

import json
from collections.abc import Sequence
from importlib.resources import files
from itertools import chain, cycle, pairwise
from pathlib import Path
from typing import Any

Message = dict[str, str]
Conversation = list[Message]

IGNORE_INDEX = -100


class ConversationError(ValueError):
    """A line of a data file that is not a conversation; the message names the file, the line and the field."""


def load_instructions(language: str | None = None) -> list[Conversation]:
    """The Chinese and English instruction set that comes with the package (about half and half).

    Args:
        language: `"zh"` or `"en"` for one half, None for both.
    """
    if language not in (None, "zh", "en"):
        raise ValueError(f"language must be 'zh', 'en' or None, got {language!r}")
    text = files("hf_cnllm.data").joinpath("instructions.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return [row["messages"] for row in rows if language in (None, row["language"])]


def read_conversations(path: str | Path) -> list[Conversation]:
    """Read a JSON Lines file with one conversation a line; blank lines are skipped.

    A line is either `{"messages": [{"role": ..., "content": ...}, ...]}` or
    `{"instruction": ..., "input": ..., "output": ...}` with `input` optional. Other keys are ignored.

    Raises:
        ConversationError: a line is not of this form, or the file holds none.
        OSError: the file cannot be read.
    """
    conversations = []
    where = "line 0"
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"line {number}"
                if line.strip():
                    conversations.append(_conversation(json.loads(line)))
    except json.JSONDecodeError as error:
        problem = f"not valid JSON ({error.msg} at column {error.colno})"
        raise ConversationError(f"{path}, {where}: {problem}") from None
    except ConversationError as error:
        raise ConversationError(f"{path}, {where}: {error}") from None
    except UnicodeDecodeError:
        raise ConversationError(f"{path}, after {where}: the file is not UTF-8 text") from None
    if not conversations:
        raise ConversationError(f"{path}: the file holds no conversation")
    return conversations


def _conversation(row: Any) -> Conversation:
    if not isinstance(row, dict):
        raise ConversationError(f"expected an object, got {type(row).__name__}")
    if "messages" in row:
        return _from_messages(row["messages"])
    if "instruction" in row:
        question = _text(row, "instruction") + ("\n" + _text(row, "input") if row.get("input") else "")
        return [{"role": "user", "content": question}, {"role": "assistant", "content": _text(row, "output")}]
    raise ConversationError(f"needs the field 'messages', or 'instruction' and 'output'; has {sorted(row)}")


def _from_messages(messages: Any) -> Conversation:
    if not isinstance(messages, list) or not messages:
        raise ConversationError("field 'messages' must be a list with at least one message")
    has_system = isinstance(messages[0], dict) and messages[0].get("role") == "system"
    roles = chain(["system"] * has_system, cycle(["user", "assistant"]))
    conversation = []
    for index, (message, role) in enumerate(zip(messages, roles, strict=False)):
        field = f"messages[{index}]"
        if not isinstance(message, dict):
            raise ConversationError(f"field '{field}' must be an object, got {type(message).__name__}")
        if message.get("role") != role:
            raise ConversationError(f"field '{field}.role' must be '{role}', got {message.get('role')!r}")
        conversation.append({"role": role, "content": _text(message, "content", f"{field}.")})
    if role != "assistant":
        raise ConversationError("field 'messages' must end with a message of the assistant")
    return conversation


def _text(row: dict[str, Any], key: str, place: str = "") -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        found = "nothing" if key not in row else json.dumps(value, ensure_ascii=False)[:60]
        raise ConversationError(f"field '{place}{key}' must be a non-empty text, got {found}")
    return value


def reply_end_ids(tokenizer: Any, generation_config: Any) -> list[int]:
    """The ids that end a reply: those that the chat template writes behind one, then those of the generation config.

    The two do not always agree: Qwen's chats end a reply with `<|im_end|>`, but its published configurations stop at
    `<|endoftext|>` only; ChatGLM3's replies end with the role of whoever is next. A model fine-tuned on chats should
    stop at all of them.

    Raises:
        ValueError: neither of the two names such a token.
    """
    probe = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}] * 2
    ids, _, is_ended = _encode(tokenizer, probe)
    ends = [ids[last] for last in reversed(is_ended) if is_ended[last]]
    configured = generation_config.eos_token_id
    ends += configured if isinstance(configured, list | tuple) else [configured]
    ends = [end for end in dict.fromkeys(ends) if end is not None]
    if not ends:
        raise ValueError("nothing says what ends a reply: set eos_token_id in generation_config.json")
    return ends


def encode_conversation(
    tokenizer: Any, messages: Sequence[Message], end_token_ids: Sequence[int], max_length: int | None = None
) -> dict[str, list[int]]:
    """Tokenize a conversation with the chat template and label the assistant's replies only.

    A reply has to end in a token that stops generation. Templates that write one inside the reply (ChatML's
    `<|im_end|>`) need nothing. For the others the position after the reply, which the next turn's marker takes or
    which is appended at the end, gets the label `end_token_ids[0]`, as in Baichuan 2's own fine-tuning script.

    Args:
        tokenizer: a fast tokenizer whose chat template marks replies with `{% generation %}`.
        messages: a conversation, ending with the assistant.
        end_token_ids: see `reply_end_ids`.
        max_length: tokens to keep, cut off at the end.

    Returns:
        `input_ids`, `attention_mask` and `labels` of equal length; labels are -100 outside the replies.
    """
    ids, is_reply, is_ended = _encode(tokenizer, messages)
    labels = [token if mine else IGNORE_INDEX for token, mine in zip(ids, is_reply, strict=True)]
    for last in [last for last, ended in is_ended.items() if not ended]:
        if last + 1 == len(ids):
            ids.append(end_token_ids[0])
            labels.append(IGNORE_INDEX)
        labels[last + 1] = end_token_ids[0]
    ids, labels = ids[:max_length], labels[:max_length]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def with_system_in_question(conversation: Conversation) -> Conversation:
    """The conversation with its system message in front of the first question, for chats that have no such role."""
    if conversation[0]["role"] != "system":
        return conversation
    system, question, *others = conversation
    return [{**question, "content": f"{system['content']}\n{question['content']}"}, *others]


def _encode(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[int], dict[int, bool]]:
    """The ids, 1 for those in replies, and where replies end: with a special token, which no reply's own text has, or not."""
    encoded = tokenizer.apply_chat_template(
        list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, is_reply = list(encoded["input_ids"]), list(encoded["assistant_masks"])
    if not any(is_reply):
        raise ValueError(f"the chat template of {type(tokenizer).__name__} marks no reply with {{% generation %}}")
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    lasts = [last for last, pair in enumerate(pairwise([*is_reply, 0])) if pair == (1, 0)]
    return ids, is_reply, {last: ids[last] in special for last in lasts}
