"""Two models' answers compared by a third one, as Vicuna was, with both orders of the answers (Zheng et al., arXiv 2306.05685,
section 3.4: a win must be one in both orders)."""

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...hub.saving import write_json, write_json_lines, write_whole
from ..conversations import read_each, rows_of_file
from ..formats import ConversationError, read_text
from ..languages import language_of
from .chat_models import ChatModel, Failure, Outcome, Request
from .journal import STATISTICS_FILE, asking

VERDICTS_FILE, TABLE_FILE = "verdicts.jsonl", "table.md"
PROMPTS = {
    "en": "Two assistants have answered the question below. Compare the answers: are they right, do they help with what was "
    "asked, are they complete and clear? Neither their order nor their length counts. Give your reasons in a few sentences. "
    "Then write one of these as the last line, and nowhere else: [[A]] if answer A is better, [[B]] if answer B is better, [[C]] "
    "if they are equally good.\n\n[Question]\n{question}\n\n[Answer A]\n{first}\n[End of answer A]\n\n[Answer B]\n{second}\n"
    "[End of answer B]",
    "zh": "两个助手回答了下面的问题。请比较两个回答：是否正确，是否切合所问，是否完整清楚。不要受先后顺序和长短的影响。先用几句话说明"
    "理由，再在最后一行写出结论，且只写一次：回答 A 更好写 [[A]]，回答 B 更好写 [[B]]，不相上下写 [[C]]。\n\n【问题】\n{question}\n\n"
    "【回答 A】\n{first}\n【回答 A 结束】\n\n【回答 B】\n{second}\n【回答 B 结束】",
}
ORDERS = ("as given", "swapped")
WINNERS = ({"A": "a", "B": "b", "C": "tie"}, {"A": "b", "B": "a", "C": "tie"})  # by order
VERDICT = re.compile(r"\[\[\s*([ABC])\s*\]\]")
ALL = "all"  # categories together
COLUMNS = {  # of the table -> what is counted
    "questions": "questions",
    "A wins": "a",
    "B wins": "b",
    "ties": "tie",
    "of them orders disagree": "orders_disagree",
    "not judged": "not_judged",
    "without answer": "without_answer",
}


def own_questions() -> Path:
    """The Chinese and English questions that come with the package: four in each of Vicuna's eight categories."""
    return Path(__file__).with_name("judge_questions.jsonl")


@dataclasses.dataclass
class Settings:
    """What is compared, and where the result goes."""

    answers: Sequence[Path]  # A and B: `{"question_id", "text"}` a line
    output: Path
    questions: Path = dataclasses.field(default_factory=own_questions)  # `{"question_id", "category", "text"}`
    max_tokens: int = 1024  # of a verdict with its reasons
    attempts: int = 3


def run(settings: Settings, model: ChatModel, most_failures: int = 16) -> dict[str, Any]:
    """Has every pair of answers judged in both orders: `verdicts.jsonl`, `table.md` and `statistics.json`, whose contents it
    returns. A run that was interrupted goes on when it is started again.

    Args:
        model: the judge, of `chat_models`.
        most_failures: requests in a row without an answer after which the run ends.

    Raises:
        ConversationError: a row of a file is not as it must be.
        ValueError: nothing is answered by both; or the folder is another run's.
        OSError: a file cannot be read, the model does not answer any more, or the disk is full.
    """
    if len(settings.answers) != 2:
        raise ValueError("--answers takes two files, of A and of B")
    if settings.max_tokens < 1 or settings.attempts < 1:
        raise ValueError("--max-tokens and --attempts must be at least 1")
    questions = _read(settings.questions, ("text", "category"))
    answers = [_read(path, ("text",)) for path in settings.answers]
    pairs = {
        name: [each[name]["text"] for each in answers] for name in questions if all(name in each for each in answers)
    }
    if not pairs:
        raise ValueError(f"{settings.questions} has no question that is answered in both files of --answers")
    with asking(model, settings.output, _identity(settings), settings.attempts, most_failures) as asker:
        requests = [
            Request(f"verdicts/{name}/{order}", _prompt(questions[name]["text"], pair, order), settings.max_tokens)
            for name, pair in pairs.items()
            for order in ORDERS
        ]
        outcomes = iter(asker.ask(requests))
        verdicts = {name: _judged([next(outcomes), next(outcomes)]) for name in pairs}
        rows = [
            {"question_id": name, "category": row["category"], **verdicts.get(name, {"winner": "without_answer"})}
            for name, row in questions.items()
        ]
        statistics = {
            "answers": dict(zip("AB", map(str, settings.answers), strict=True)),
            "requests": asker.statistics(),
            "not_judged": _reasons(rows),
            "answers_without_question": [len(each.keys() - questions.keys()) for each in answers],
            "categories": _count(rows),
        }
        write_json_lines(settings.output / VERDICTS_FILE, rows)
        write_whole(settings.output / TABLE_FILE, table(statistics))
        write_json(settings.output / STATISTICS_FILE, statistics)
    return statistics


def _read(path: Path, fields: Sequence[str]) -> dict[str, dict[str, str]]:
    """The rows of a file by their `question_id`."""
    found: dict[str, dict[str, str]] = {}

    def read(row: Any) -> tuple[str, dict[str, str]]:
        if not isinstance(row, Mapping):
            raise ConversationError(f"expected an object, got {type(row).__name__}")
        name = row.get("question_id")
        name = str(name) if isinstance(name, int) else read_text(row, "question_id")
        texts = {field: read_text(row, field, may_be_blank=field == "text") for field in fields}
        if name in found:
            raise ConversationError(f"field 'question_id' {name!r} is there twice")
        if texts.get("category") == ALL:
            raise ConversationError(f"field 'category' must not be {ALL!r}, which is the line of the sums")
        return name, texts

    for name, texts in read_each(path, rows_of_file(path), read):
        found[name] = texts
    if not found:
        raise ConversationError(f"{path}: there is no row in the file")
    return found


def _identity(settings: Settings) -> dict[str, Any]:
    paths = {"questions": settings.questions, "answers of A": settings.answers[0], "answers of B": settings.answers[1]}
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}
    told = {"max_tokens": settings.max_tokens, "attempts": settings.attempts}
    return {"recipe": "judge", **told, **digests}


def _prompt(question: str, pair: Sequence[str], order: str) -> str:
    first, second = pair if order == ORDERS[0] else reversed(pair)
    return PROMPTS[language_of(question)].format(question=question, first=first, second=second)


def read_verdict(reply: str) -> str | None:
    """`A`, `B` or `C`; None where there is no verdict, or more than one."""
    found = set(VERDICT.findall(reply))
    return found.pop() if len(found) == 1 else None


def _judged(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The winner of two orders (`a`, `b`, `tie`, or `not_judged`), with both verdicts, or the reasons why there is none."""
    verdicts, reasons = [], []
    for outcome in outcomes:
        verdict = None if isinstance(outcome, Failure) else read_verdict(outcome.text)
        verdicts.append(verdict)
        if isinstance(outcome, Failure):
            reasons.append(f"no_answer_{outcome.reason}")
        elif verdict is None:
            reasons.append("no_verdict" if outcome.is_whole else "no_verdict_cut_short")
    if reasons:
        return {"winner": "not_judged", "verdicts": verdicts, "reasons": reasons}
    winners = {names[verdict] for names, verdict in zip(WINNERS, verdicts, strict=True)}
    return {"winner": winners.pop() if len(winners) == 1 else "tie", "verdicts": verdicts}


def _reasons(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return dict(sorted(Counter(reason for row in rows for reason in row.get("reasons", ())).items()))


def _count(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Category -> what is in the table, and how often both orders had the first or the second answer for the better one."""
    found: dict[str, Counter[str]] = {}
    for row in rows:
        counts = found.setdefault(row["category"], Counter())
        verdicts = row.get("verdicts")
        counts.update(["questions", row["winner"]])
        counts["first_twice"] += verdicts == ["A", "A"]
        counts["second_twice"] += verdicts == ["B", "B"]
        counts["orders_disagree"] += row["winner"] == "tie" and verdicts != ["C", "C"]
    names = [*COLUMNS.values(), "first_twice", "second_twice"]
    totals = sum(found.values(), Counter())
    return {name: {one: counts[one] for one in names} for name, counts in {**found, ALL: totals}.items()}


def table(statistics: Mapping[str, Any]) -> str:
    """The counts as Markdown, a line a category; a win of A is 1, a tie half of one in `A's share`."""
    lines = [f"{letter}: {path}  " for letter, path in statistics["answers"].items()]
    lines += ["", f"| category | {' | '.join(COLUMNS)} | A's share |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, counts in statistics["categories"].items():
        judged = counts["a"] + counts["b"] + counts["tie"]
        share = f"{(counts['a'] + counts['tie'] / 2) / judged:.0%}" if judged else "–"
        cell = " ".join(name.split()).replace("|", "\\|")
        lines.append(f"| {cell} | {' | '.join(str(counts[one]) for one in COLUMNS.values())} | {share} |")
    return "\n".join(lines) + "\n"
