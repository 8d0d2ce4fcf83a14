"""ShareGPT's conversations made fit for fine-tuning, as for Vicuna: HTML becomes Markdown, broken conversations and other languages go,
and long ones are split between turns. Needs the extra `data`."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..hub.saving import check_new_folder, staged_folder, write_json
from .conversations import as_template_takes, read_json_rows
from .formats import ROLES, Conversation, ConversationError
from .languages import LanguageRule
from .owned_folder import full_disk_named
from .records import MAX_LINE_BYTES, is_utf8, parse_object, read_lines, text_of

ROWS_FILE, DISCARDED_FILE, STATISTICS_FILE = "conversations.jsonl", "discarded.jsonl", "statistics.json"
SENDERS = {"system": "system", "user": "human", "assistant": "gpt"}
# An answer as ChatGPT's page had it begins with a tag, at times behind "1 / 2", which of its versions was shown. Markdown may hold HTML
# further inside, in examples of code, and stays as it is.
HTML = re.compile(r"\s*(?:\d+ / \d+\s*)?(?=<(?:div|p|pre|ol|ul|h[1-6]|table|blockquote|span)\b[^>]*>)", re.I)


class Discarded(Exception):
    """A conversation is not taken; the message is the reason, a word for statistics."""


@dataclasses.dataclass
class Settings:
    """What is cleaned, and how."""

    input: Sequence[Path]  # JSON lines, or one JSON list: `{"id", "conversations": [{"from", "value"}]}`
    output: Path
    languages: Sequence[str] = ("zh", "en")
    language_model: str | None = None
    language_threshold: float = 0.5
    max_length: int = 2048  # tokens of a conversation, where there is a tokenizer to count them


# --- cleaning ---------------------------------------------------------------------------------------------------------


def html_to_markdown(text: str) -> str:
    """The Markdown of an answer that is HTML; other texts as they are.

    Raises:
        RecursionError: it is nested too deeply.
    """
    found = HTML.match(text)
    return text if found is None else _converter().convert(text[found.end() :]).strip()


@lru_cache(maxsize=1)
def _converter() -> Any:
    from markdownify import ATX, MarkdownConverter

    class Converter(MarkdownConverter):
        """With code as ChatGPT's page has it: a bar with the language and a button, and the code itself."""

        def convert_pre(self, el: Any, text: str, parent_tags: Any) -> str:
            code = el.find("code")
            if code is None:
                return super().convert_pre(el, text, parent_tags)
            names = [name.removeprefix("language-") for name in code.get("class", ()) if name.startswith("language-")]
            content = code.get_text().strip("\n")
            fence = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", content))])
            return f"\n\n{fence}{''.join(names[:1])}\n{content}\n{fence}\n\n"

        def convert_button(self, el: Any, text: str, parent_tags: Any) -> str:
            return ""

    return Converter(heading_style=ATX, bullets="-", escape_asterisks=False, escape_underscores=False)


def clean(row: Any, rule: LanguageRule, changes: Counter[str]) -> Conversation:
    """The messages of a row, an optional one of the system and then user and assistant in turn.

    Args:
        changes: is told how many answers were HTML, and how many last questions without an answer were left out.

    Raises:
        Discarded: the row is no such conversation, or in another language.
    """
    messages = list(_messages(row))
    if messages[-1]["role"] == "user":
        messages.pop()
        changes["unanswered_questions"] += 1
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns:
        raise Discarded("no_answer")
    if [message["role"] for message in turns] != ["user", "assistant"] * (len(turns) // 2):
        raise Discarded("wrong_order")
    for message in messages:
        if message["role"] == "assistant":
            try:
                content = html_to_markdown(message["content"])
            except (RecursionError, AssertionError) as error:  # the latter: of html.parser, at unfinished declarations
                raise Discarded("broken_html") from error
            changes["html_answers"] += content is not message["content"]
            message["content"] = content
        if not message["content"].strip():
            raise Discarded("empty_message")
    if reason := rule.reason_against("\n".join(message["content"] for message in turns)):
        raise Discarded(f"language_{reason}")
    return messages


def _messages(row: Any) -> Iterator[dict[str, str]]:
    turns = row.get("conversations") if isinstance(row, Mapping) else None
    if not isinstance(turns, list) or not turns:
        raise Discarded("no_conversation")
    for turn in turns:
        sender, text = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
        role = ROLES.get(sender) if isinstance(sender, str) else None
        if role not in SENDERS:
            raise Discarded("unknown_sender")
        if not isinstance(text, str):
            raise Discarded("no_text")
        if len(text) > MAX_LINE_BYTES:  # in a list, whose rows are no lines
            raise Discarded("too_long")
        if not is_utf8(text):
            raise Discarded("undecodable")
        yield {"role": role, "content": text}


# --- splitting --------------------------------------------------------------------------------------------------------


def split(messages: Conversation, count_tokens: Callable[[Conversation], int], max_length: int) -> list[Conversation]:
    """Cuts a conversation between its rounds of question and answer into pieces of at most `max_length` tokens, as long as they can
    be; each begins with the system message, if there is one. A round that is longer by itself is a piece: fine-tuning shortens it.
    """
    first = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(first) :]
    pieces, start = [], 0
    for end in range(2, len(turns) + 1, 2):
        if end - start > 2 and count_tokens([*first, *turns[start:end]]) > max_length:
            pieces.append([*first, *turns[start : end - 2]])
            start = end - 2
    return [*pieces, [*first, *turns[start:]]]


def token_counter(tokenizer: Any) -> Callable[[Conversation], int]:
    """Tells the tokens that a conversation has in the tokenizer's chat template."""

    def count(messages: Conversation) -> int:
        taken = as_template_takes(tokenizer, messages)
        return len(tokenizer.apply_chat_template(taken, return_dict=False))

    return count


# --- files ------------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, object) of a file of JSON lines, or of one list; a text in the place of an object is why there is none.

    Raises:
        ConversationError: a list is no JSON.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        if file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            for number, (_, row) in enumerate(read_json_rows(path), start=1):
                yield number, row if isinstance(row, dict) else "not_an_object"
            return
        file.seek(0)
        for number, (offset, line) in enumerate(read_lines(file, 0, None, MAX_LINE_BYTES), start=1):
            if line is None:
                yield number, "too_long"
                continue
            text = text_of(line, offset)
            if text is None:
                yield number, "undecodable"
            elif text.strip():
                yield number, parse_object(text)


def run(settings: Settings, count_tokens: Callable[[Conversation], int] | None = None) -> dict[str, Any]:
    """Cleans the conversations of all files: `conversations.jsonl` for fine-tuning, `discarded.jsonl` with the reasons, and
    `statistics.json`, whose contents it returns. The output folder is there when all of it is.

    Args:
        count_tokens: of `token_counter`; without it, nothing is split.

    Raises:
        ConversationError: an input is a list that is no JSON; or no conversation is left.
        ValueError: a setting is not as it must be.
        OSError: a file cannot be read, or the output folder is not empty.
    """
    rule = LanguageRule(settings.languages, settings.language_model, settings.language_threshold)
    if settings.max_length < 1:
        raise ValueError(f"--max-length must be at least 1, got {settings.max_length}")
    if not 0 <= settings.language_threshold <= 1:
        raise ValueError(f"--language-threshold must be from 0 to 1, got {settings.language_threshold}")
    check_new_folder(settings.output)
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("input", "discarded", "changed", "output")}
    seen: set[str] = set()
    with full_disk_named(settings.output), staged_folder(settings.output) as folder:
        with (
            open(folder / ROWS_FILE, "w", encoding="utf-8") as taken,
            open(folder / DISCARDED_FILE, "w", encoding="utf-8") as discarded,
        ):
            for name, place, row in _named_rows(settings.input):
                counts["input"]["rows"] += 1
                changes: Counter[str] = Counter()
                try:
                    if isinstance(row, str):
                        raise Discarded(row)
                    if not is_utf8(name):
                        raise Discarded("undecodable")
                    messages = clean(row, rule, changes)
                    if name in seen:
                        raise Discarded("double_id")
                except Discarded as reason:
                    counts["discarded"][str(reason)] += 1
                    discarded.write(json.dumps({"id": name, "place": place, "reason": str(reason)}) + "\n")
                    continue
                seen.add(name)
                for piece_name, piece in _pieces(name, messages, count_tokens, settings.max_length, changes):
                    listed = [{"from": SENDERS[one["role"]], "value": one["content"]} for one in piece]
                    line = json.dumps({"id": piece_name, "conversations": listed}, ensure_ascii=False)
                    taken.write(line + "\n")
                    counts["output"].update({"rows": 1, "answers": sum(one["from"] == "gpt" for one in listed)})
                counts["changed"].update(changes)
        counts["output"]["conversations"] = len(seen)
        statistics = {name: dict(sorted(found.items())) for name, found in counts.items()}
        if not seen:
            raise ConversationError(f"no conversation is left of the input: {json.dumps(statistics)}")
        write_json(folder / STATISTICS_FILE, statistics)
    return statistics


def _named_rows(paths: Sequence[Path]) -> Iterator[tuple[str, str, Any]]:
    """(id, place, row) of all files by [`read_rows`]; what has no id is named by its place."""
    files = Counter(path.name for path in paths)
    for path in paths:
        for number, row in read_rows(path):
            place = f"{path.name if files[path.name] == 1 else path}:{number}"
            name = row.get("id") if isinstance(row, Mapping) else None
            yield place if name in (None, "") else str(name), place, row


def _pieces(
    name: str, messages: Conversation, count_tokens: Any, max_length: int, changes: Counter[str]
) -> Iterator[tuple[str, Conversation]]:
    """(id, messages) of each piece; where there are several, the id has the number of the first turn, as FastChat's."""
    if count_tokens is None:
        yield name, messages
        return
    pieces = split(messages, count_tokens, max_length)
    changes["split"] += len(pieces) > 1
    turn = 0
    for piece in pieces:
        changes["longer_than_max_length"] += count_tokens(piece) > max_length
        yield (f"{name}_{turn}" if len(pieces) > 1 else name), piece
        turn += sum(message["role"] != "system" for message in piece)
