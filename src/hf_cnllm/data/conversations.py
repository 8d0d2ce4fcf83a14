"""Conversations for fine-tuning: the embedded instruction set, files of the user's own, and their tokenized form.

A conversation is a list of messages `{"role": ..., "content": ...}` as `apply_chat_template` takes it: an optional system
message, then user and assistant in turn, ending with the assistant. Rows of data are `{"messages": conversation, "tools":
[...] or None}`; `formats.py` has what they may look like in files.
"""

import json
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import TemplateError

from .formats import DECODER, NOT_UTF8, Conversation, ConversationError, Message, parse_json, to_messages

Row = dict[str, Any]
T = TypeVar("T")

IGNORE_INDEX = -100


def load_instructions(language: str | None = None) -> list[Conversation]:
    """The Chinese and English instruction set that comes with the package (about half and half).

    Args:
        language: `"zh"` or `"en"` for one half, None for both.
    """
    if language not in (None, "zh", "en"):
        raise ValueError(f"language must be 'zh', 'en' or None, got {language!r}")
    text = Path(__file__).with_name("instructions.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return [row["messages"] for row in rows if language in (None, row["language"])]


def read_conversations(path: str | Path, **options: Any) -> list[Row]:
    """The rows of a file, one JSON object a line, one JSON list of them or Parquet, in any of the formats of [`to_messages`].

    Args:
        options: as of `to_messages`.

    Raises:
        ConversationError: a row is of none of the formats, or the file holds none; file, line and field are named.
        OSError: the file cannot be read.
    """
    rows = list(read_each(path, rows_of_file(path), partial(to_messages, **options)))
    if not rows:
        raise ConversationError(f"{path}: the file holds no conversation")
    return rows


def read_rows(names: Iterable[str], read: Callable[[Any], Row], split: str = "train") -> list[Row]:
    """What `read` makes of the rows of files, and of `datasets` by their name or folder.

    Raises:
        ConversationError: `read` refuses a row, or there is none; file and line, or data set and row, are named.
        OSError: there is no such file or data set.
    """
    rows: list[Row] = []
    for name in names:
        count = len(rows)
        rows += read_each(name, _rows_of(name, split), read)
        if len(rows) == count:
            raise ConversationError(f"{name} holds no conversation: there is no row")
    return rows


def _rows_of(name: str, split: str) -> Iterable[tuple[str, Any]]:
    if Path(name).is_file() or Path(name).suffix in (".json", ".jsonl", ".parquet"):
        return rows_of_file(name)
    return data_set_rows(name, split)


def data_set_rows(name: str, split: str, streaming: bool = False) -> Iterator[tuple[str, Any]]:
    """(number of the row, value) of each row of one of `datasets`, by its name or folder.

    Raises:
        ConversationError: `datasets` cannot make rows of the files.
        OSError: there is no such data set, or no file in the folder.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetBuildError
    from datasets.table import CastError
    from pyarrow import ArrowInvalid

    try:
        for number, value in enumerate(load_dataset(name, split=split, streaming=streaming)):
            yield f"row {number}", value
    except (DatasetBuildError, CastError, ArrowInvalid) as error:  # streaming raises what loading gives as the cause
        cause = " ".join(str(error.__cause__ or error).split())[:300]
        raise ConversationError(
            f"{name}: `datasets` makes no rows of it: give files of rows, or a folder with nothing else ({cause})"
        ) from error


def rows_of_file(path: str | Path) -> Iterator[tuple[str, Any]]:
    """("line N", value) of each row of a file of JSON by [`read_json_rows`], or ("row N", value) of a Parquet file."""
    if Path(path).suffix == ".parquet":
        return _rows_of_parquet(path)
    return ((f"line {number}", value) for number, value in read_json_rows(path))


def _rows_of_parquet(path: str | Path) -> Iterator[tuple[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with open(path, "rb") as file:  # pyarrow's error would not name it
            for batch in ParquetFile(file).iter_batches(1024):
                for row in batch.to_pylist():
                    yield f"row {number}", row
                    number += 1
    except ArrowException as error:
        raise ConversationError(f"{path}, after {number} rows: the file is damaged ({error})") from None


def read_each(source: object, rows: Iterable[tuple[str, Any]], read: Callable[[Any], T]) -> Iterator[T]:
    """What `read` makes of each of (place, value); where it raises ConversationError, source and place are put in front."""
    for place, value in rows:
        try:
            yield read(value)
        except ConversationError as error:
            raise ConversationError(f"{source}, {place}: {error}") from None


def read_json_rows(path: str | Path) -> Iterator[tuple[int, Any]]:
    """(number of the line, value) of each row of a file of JSON lines, or of one list; blank lines are skipped.

    Raises:
        ConversationError: something in the file is no JSON.
        OSError: the file cannot be read.
    """
    number, is_first = 0, True
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if is_first and line.lstrip().startswith("["):
                    yield from _items(line + file.read(), number)
                elif line.strip():
                    yield number, parse_json(line.rstrip())
                    is_first = False
    except UnicodeDecodeError:
        raise ConversationError(f"{path}, after line {number}: {NOT_UTF8}") from None
    except json.JSONDecodeError as error:
        problem = f"not valid JSON ({error.msg} at column {error.colno}): rows are one object a line, or one list"
        raise ConversationError(f"{path}, line {number + error.lineno - 1}: {problem}") from None
    except (ValueError, RecursionError) as error:  # a name that occurs twice, thousands of digits or brackets
        raise ConversationError(f"{path}, line {number}: not valid JSON ({error})") from None


def _items(text: str, number: int) -> Iterator[tuple[int, Any]]:
    """(number of the line, value) of each item of the list that `text`, which begins on line `number`, is."""
    space = re.compile(r"\s*")
    start = space.match(text, space.match(text).end() + 1).end()
    end, closing = 0, text[start : start + 1]
    while closing != "]":
        number += text.count("\n", end, start)
        value, end = DECODER.raw_decode(text, start)
        yield number, value
        place = space.match(text, end).end()
        closing = text[place : place + 1]
        if closing not in ("]", ","):
            raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
        start = place if closing == "]" else space.match(text, place + 1).end()
    rest = space.match(text, start + 1).end()
    if rest < len(text):
        raise json.JSONDecodeError("More behind the end of the list", text, rest)


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


def encode_conversations(
    tokenizer: Any,
    rows: Iterable[Row],
    end_token_ids: Sequence[int],
    max_length: int | None = None,
    system_in_question: bool = False,
) -> tuple[list[dict[str, list[int]]], Counter[str]]:
    """The rows by [`encode_conversation`], and how many of them were cut in which way.

    Args:
        system_in_question: put the system message in front of the first question that is kept, also where the template has
            a place of its own for it (ghost attention).

    Raises:
        ConversationError: as there, with the number of the row.
    """
    examples, cuts = [], Counter[str]()
    for number, row in enumerate(rows, start=1):
        try:
            messages, tools = row["messages"], row.get("tools")
            example, cut = _encode_row(tokenizer, messages, end_token_ids, max_length, tools, system_in_question)
        except ConversationError as error:
            raise ConversationError(f"conversation {number}: {error}") from None
        examples.append(example)
        cuts.update(cut)
    return examples, cuts


def labels_of_whole(ids: Sequence[int]) -> list[int]:
    """The labels of a text that is learned whole. Nothing predicts its first token: padding on the left would be asked to."""
    return [IGNORE_INDEX, *ids[1:]]


def encode_conversation(
    tokenizer: Any,
    messages: Conversation,
    end_token_ids: Sequence[int],
    max_length: int | None = None,
    tools: Sequence[Any] | None = None,
) -> dict[str, list[int]]:
    """Tokenize a conversation with the chat template and label the assistant's replies only.

    A reply has to end in a token that stops generation. Templates that write one inside the reply (ChatML's
    `<|im_end|>`) need nothing. For the others the position after the reply, which the next turn's marker takes or
    which is appended at the end, gets the label `end_token_ids[0]`, as in Baichuan 2's own fine-tuning script. The
    templates of ChatGLM-6B and ChatGLM2-6B mark the last reply only, as their scripts learn it; the system message goes
    into the first question there.

    Args:
        tokenizer: a fast tokenizer whose chat template marks replies with `{% generation %}`.
        messages: a conversation, ending with the assistant; nothing is learned from those with `"loss": False`.
        end_token_ids: see `reply_end_ids`.
        max_length: tokens to keep. The last answer is kept: the earliest rounds are left out first, then the end of the
            longest question or tool's result of the last round. An answer that does not fit by itself loses its end, and
            the rest keeps half of the tokens.

    Returns:
        `input_ids`, `attention_mask` and `labels` of equal length; labels are -100 outside the replies.

    Raises:
        ConversationError: nothing would be learned, or the chat template has no place for something in the conversation.
    """
    return _encode_row(tokenizer, messages, end_token_ids, max_length, tools)[0]


def with_system_in_question(conversation: Conversation) -> Conversation:
    """The conversation with its system message in front of the first question, for chats that have no such role."""
    if conversation[0]["role"] != "system":
        return conversation
    system, question, *others = conversation
    return [{**question, "content": f"{system['content']}\n{question['content']}"}, *others]


def as_template_takes(tokenizer: Any, messages: Conversation, tools: Sequence[Any] | None = None) -> Conversation:
    """The conversation as it is or, where the chat template has no system role, with the system message in the question.

    Raises:
        ConversationError: the template has no place for something else in it.
    """
    return _form_that_is_taken(tokenizer, messages, tools)(messages)


# --- cutting ----------------------------------------------------------------------------------------------------------

ROUNDS, QUESTION, ANSWER = "earlier rounds left out", "question shortened", "answer shortened"


def shorten_conversation(
    messages: Conversation, count_tokens: Callable[[Conversation], int], max_length: int
) -> tuple[Conversation, list[str]]:
    """A conversation that is too long in at most `max_length` tokens, as far as that is possible without cutting the last
    answer, and what was cut to get there; `count_tokens` tells the tokens of a conversation."""
    first = messages[:1] if messages[0]["role"] == "system" else []
    starts = [index for index, message in enumerate(messages) if message["role"] == "user"]

    def last_rounds(number: int) -> Conversation:
        return [*first, *messages[starts[-number] :]]

    fitting = _most(lambda number: count_tokens(last_rounds(number)) <= max_length, len(starts), first=1)
    kept = max(fitting, 1)
    cuts, messages = [ROUNDS] * (kept < len(starts)), last_rounds(kept)
    if fitting:
        return messages, cuts

    context = [index for index, message in enumerate(messages) if message["role"] in ("user", "tool")]
    place = max(context, key=lambda index: len(messages[index]["content"]))
    content = messages[place]["content"]

    def beginning(length: int) -> Conversation:
        return [*messages[:place], {**messages[place], "content": content[:length]}, *messages[place + 1 :]]

    room, end = max_length, len(messages)
    if count_tokens(beginning(1)) > max_length:  # the answer alone is too long
        room, end = max_length // 2, max(len(messages) - 1, place + 1)
        cuts.append(ANSWER)
    fitting = _most(lambda length: count_tokens(beginning(length)[:end]) <= room, len(content), first=room)
    return beginning(max(fitting, 1)), cuts + [QUESTION] * (fitting < len(content))


def _most(fits: Callable[[int], bool], most: int, first: int) -> int:
    """The largest number up to `most` that fits, if those up to some number do; 0 if none. Large numbers, which take long,
    are tried only where `first`, doubled again and again, fits."""
    low, high = 0, min(first, most)
    while low < high and fits(high):
        low, high = high, min(2 * high, most)
    return low + bisect_left(range(low + 1, high), True, key=lambda number: not fits(number))


# --- encoding ---------------------------------------------------------------------------------------------------------


def _encode_row(
    tokenizer: Any,
    messages: Conversation,
    end_token_ids: Sequence[int],
    max_length: int | None,
    tools: Sequence[Any] | None,
    system_in_question: bool = False,
) -> tuple[dict[str, list[int]], list[str]]:
    # Questions and answers alone have one form; a template that does not take them says so when they are encoded.
    has_forms = (
        tools or messages[0]["role"] == "system" or any(message.keys() != {"role", "content"} for message in messages)
    )
    taken = _form_that_is_taken(tokenizer, messages, tools, system_in_question) if has_forms else list
    ids, is_reply, is_ended = _encode(tokenizer, taken(messages), tools)
    cuts: list[str] = []
    lacking = int(is_ended.get(len(ids) - 1) is False)  # an end behind the last reply, which is appended below
    if max_length is not None and len(ids) + lacking > max_length:

        def count_tokens(conversation: Conversation) -> int:
            return len(tokenizer.apply_chat_template(taken(conversation), tools=tools, return_dict=False)) + lacking

        messages, cuts = shorten_conversation(messages, count_tokens, max_length)
        ids, is_reply, is_ended = _encode(tokenizer, taken(messages), tools)
    labels = [token if mine else IGNORE_INDEX for token, mine in zip(ids, is_reply, strict=True)]
    for last in [last for last, ended in is_ended.items() if not ended]:
        if last + 1 == len(ids):
            ids.append(end_token_ids[0])
            labels.append(IGNORE_INDEX)
        labels[last + 1] = end_token_ids[0]
    ids, labels = ids[:max_length], labels[:max_length]
    # A label is learned from the token before it, so the first one is never.
    if all(label == IGNORE_INDEX for label in labels[1:]):
        short = f"of the first {max_length} tokens none is an answer's: raise max_length"
        why = short if cuts else "every answer has `loss` False"
        raise ConversationError(f"nothing of it would be learned: {why}")
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}, cuts


def _form_that_is_taken(
    tokenizer: Any, messages: Conversation, tools: Sequence[Any] | None, system_in_question: bool = False
) -> Callable[[Conversation], Conversation]:
    """What makes of the conversation one that the chat template, which need not be one of ours, takes whole."""
    # Where a template has no place for something, that does not depend on what the messages say.
    probe = [{**message, "content": message["content"][:9]} for message in messages]

    def render(
        form: Callable[[Conversation], Conversation], conversation: Conversation, tools: Any
    ) -> str | Exception:
        try:
            return str(tokenizer.apply_chat_template(form(conversation), tools=tools, tokenize=False))
        except (TemplateError, ValueError) as error:
            return error

    form: Callable[[Conversation], Conversation] = with_system_in_question if system_in_question else list
    rendered = first = render(form, probe, tools)
    if isinstance(first, Exception):
        form = with_system_in_question
        rendered = render(form, probe, tools)
    if isinstance(rendered, Exception):
        raise ConversationError(str(first))
    uncalled = [{name: value for name, value in message.items() if name != "tool_calls"} for message in probe]
    silent = [{**message, "loss": False} for message in probe]
    dropped = {
        "tools": tools and render(form, probe, None) == rendered,
        "tool_calls": uncalled != probe and render(form, uncalled, tools) == rendered,
        "loss": any("loss" in message for message in probe) and any(_encode(tokenizer, form(silent), tools)[1]),
    }
    for name in filter(dropped.get, dropped):
        raise ConversationError(
            f"the chat template of {type(tokenizer).__name__} has no place for `{name}`, and would drop it"
        )
    return form


def _encode(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Any] | None = None
) -> tuple[list[int], list[int], dict[int, bool]]:
    """The ids, 1 for those in replies, and where replies end: with a special token, which no reply's own text has, or not."""
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except (TemplateError, ValueError) as error:
        raise ConversationError(str(error)) from error
    ids, is_reply = list(encoded["input_ids"]), list(encoded["assistant_masks"])
    if not any(is_reply) and all(message.get("loss", True) for message in messages):
        raise ValueError(
            f"the chat template of {type(tokenizer).__name__} marks no reply with {{% generation %}}: give it one that does (recipes take --template)"
        )
    is_special = getattr(tokenizer, "is_control_token", None)  # ChatGLM3's `<|user|>` is a piece of its vocabulary
    if is_special is None:
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        is_special = special.union(tokenizer.all_special_ids).__contains__
    lasts = [last for last, pair in enumerate(pairwise([*is_reply, 0])) if pair == (1, 0)]
    return ids, is_reply, {last: is_special(ids[last]) for last in lasts}
