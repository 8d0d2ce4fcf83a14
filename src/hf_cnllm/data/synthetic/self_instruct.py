"""Self-Instruct (Wang et al., arXiv 2212.10560) and Alpaca: a chat model continues lists of tasks, and makes instances of them.

    with closing(Endpoint("qwen", "http://localhost:8000/v1")) as model:
        run(Settings(output=Path("out"), tasks=1000), model)

A run is a function of its settings and of the model's replies, which are in a journal; so one that was killed goes on where it
was, and one with more `tasks` behind its end. Whatever is read of a reply is taken, or discarded for one reason, and both are
counted.
"""

import dataclasses
import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...hub.saving import write_json, write_json_lines
from ..languages import language_of
from .chat_models import ChatModel, Failure, Outcome, Reply, Request
from .heuristics import Instance, against_instances, against_instruction
from .journal import STATISTICS_FILE, Asker, asking
from .prompts import (
    MOST_INSTANCES,
    Draft,
    ask_for_instances,
    ask_for_kind,
    ask_for_list,
    ask_for_whole_tasks,
    read_input_first,
    read_kind,
    read_list,
    read_output_first,
    read_whole_tasks,
)
from .seeds import Task, own_seeds, read_seeds
from .similarity import Pool

TASKS_FILE, ROWS_FILE, DISCARDED_FILE = "tasks.jsonl", "instructions.jsonl", "discarded.jsonl"
MAY_DIFFER = {"output", "seeds", "tasks", "max_requests"}  # between a run and the one that goes on with it
ANSWER_TOKENS = 16  # for yes or no
CUT_SHORT = "cut_short"
KINDS = {True: "classification", False: "other", None: "unclear"}  # what is unclear is taken for no classification


class Style(NamedTuple):
    """How tasks are asked for."""

    human: int  # seed tasks in a prompt
    machine: int  # tasks of the model's own; seeds stand in while there are none
    ask: Callable[[str, Sequence[Task]], str]
    read: Callable[[str], list[Draft]]
    is_whole: bool  # the instances come with the tasks


STYLES = {
    "self-instruct": Style(6, 2, ask_for_list, read_list, is_whole=False),
    "alpaca": Style(3, 0, ask_for_whole_tasks, read_whole_tasks, is_whole=True),
}


@dataclasses.dataclass
class Settings:
    """What is made, and how."""

    output: Path
    seeds: Path = dataclasses.field(default_factory=own_seeds)
    tasks: int = 100  # wanted; the batch of requests that reaches it is taken whole
    style: str = "self-instruct"
    languages: Sequence[str] = ("zh", "en")  # of the prompts, in turn
    batch: int = 4  # requests that are made of the same pool
    max_requests: int = 1000  # for tasks
    rouge: float = 0.7
    max_tokens: int = 2048  # of a reply
    temperature: float = 1.0  # of tasks; kinds and instances are the most probable ones, as in the paper
    top_p: float = 1.0
    attempts: int = 3
    seed: int = 0


class Ledger:
    """What became of all that was read."""

    def __init__(self) -> None:
        self.kept: Counter[str] = Counter()
        self.discarded: list[dict[str, Any]] = []

    def decide(self, stage: str, key: str, content: Any, reason: str | None) -> bool:
        """Enters the content of a reply, with the reason not to take it if there is one; returns whether it is taken."""
        if reason is None:
            self.kept[stage] += 1
        else:
            self.discarded.append({"stage": stage, "key": key, "reason": reason, "content": content})
        return reason is None

    def counts(self, stage: str) -> dict[str, Any]:
        reasons = Counter(row["reason"] for row in self.discarded if row["stage"] == stage)
        found = self.kept[stage] + sum(reasons.values())
        return {"found": found, "kept": self.kept[stage], "discarded": dict(sorted(reasons.items()))}


def run(settings: Settings, model: ChatModel, most_failures: int = 16) -> dict[str, Any]:
    """Makes the data, or goes on with making it: `instructions.jsonl` for fine-tuning, `tasks.jsonl`, `discarded.jsonl` and
    `statistics.json`, whose contents it returns.

    Args:
        model: of `chat_models`.
        most_failures: requests in a row without an answer after which the run ends.

    Raises:
        ConversationError: the seed tasks are not as they must be.
        ValueError: a setting is not; or the folder is another run's.
        OSError: the model does not answer any more, or the disk is full. The next run goes on from there.
    """
    seeds = _check(settings)
    with asking(model, settings.output, _identity(settings), settings.attempts, most_failures) as asker:
        ledger = Ledger()
        drafts = _make_tasks(settings, seeds, asker, ledger)
        kinds: Counter[str] = Counter()
        if STYLES[settings.style].is_whole:
            tasks = [
                Task(draft.instruction, _taken(ledger, f"tasks/{number}", draft.instances), None)
                for number, draft in enumerate(drafts)
            ]
        else:
            tasks = _make_instances(settings, seeds, drafts, asker, ledger, kinds)
        reasons = [None if task.instances else "no_instance" for task in tasks]
        whole = [
            task
            for number, (task, reason) in enumerate(zip(tasks, reasons, strict=True))
            if ledger.decide("tasks", f"tasks/{number}", task.instruction, reason)
        ]
        statistics = {
            "requests": asker.statistics(),
            "enough": len(drafts) >= settings.tasks,
            **{stage: ledger.counts(stage) for stage in ("replies", "instructions", "instances", "tasks")},
            **({"kinds": dict(sorted(kinds.items()))} if kinds else {}),
        }
        _write(settings.output, whole, ledger, statistics)
    return statistics


def _check(settings: Settings) -> list[Task]:
    if settings.style not in STYLES:
        raise ValueError(f"--style {settings.style}: choose from {', '.join(STYLES)}")
    if unknown := sorted(set(settings.languages) - {"zh", "en"}):
        raise ValueError(f"--languages {' '.join(unknown)}: choose from zh, en")
    for name in ("tasks", "batch", "max_requests", "max_tokens", "attempts", "languages"):
        value = getattr(settings, name)
        if (len(value) if name == "languages" else value) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not (0 <= settings.temperature < math.inf and 0 < settings.top_p <= 1 and 0 < settings.rouge <= 1):
        raise ValueError("--temperature must be a number of at least 0, --top-p and --rouge above 0 and at most 1")
    return read_seeds(settings.seeds, settings.languages)


def _identity(settings: Settings) -> dict[str, Any]:
    told = {name: value for name, value in dataclasses.asdict(settings).items() if name not in MAY_DIFFER}
    told["seed tasks"] = hashlib.sha256(settings.seeds.read_bytes()).hexdigest()
    return json.loads(json.dumps({"recipe": "self_instruct", **told}))


# --- tasks ------------------------------------------------------------------------------------------------------------


def _make_tasks(settings: Settings, seeds: list[Task], asker: Asker, ledger: Ledger) -> list[Draft]:
    """The tasks that are new."""
    pool = Pool(task.instruction for task in seeds)
    drafts: list[Draft] = []
    machine: dict[str, list[Task]] = {"zh": [], "en": []}
    number = 0
    while len(drafts) < settings.tasks and number < settings.max_requests:
        batch = range(number, min(number + settings.batch, settings.max_requests))
        requests = [_request_for_tasks(settings, index, seeds, machine) for index in batch]
        for request, outcome in zip(requests, asker.ask(requests), strict=True):
            found, is_cut = _read(ledger, request, outcome, STYLES[settings.style].read)
            for place, draft in enumerate(found, start=1):
                reason = CUT_SHORT if is_cut and place == len(found) else against_instruction(draft.instruction)
                if reason is None and pool.has_similar(draft.instruction, settings.rouge):
                    reason = "similar"
                if ledger.decide("instructions", request.key, draft.instruction, reason):
                    pool.add(draft.instruction)
                    drafts.append(draft)
                    machine[language_of(draft.instruction)].append(Task(draft.instruction, tuple(draft.instances)))
        number = batch.stop
        print(f"{len(drafts)} of {settings.tasks} tasks after {number} requests", flush=True)
    return drafts


def _request_for_tasks(settings: Settings, number: int, seeds: list[Task], machine: dict[str, list[Task]]) -> Request:
    style, language = STYLES[settings.style], settings.languages[number % len(settings.languages)]
    chance = random.Random(f"{settings.seed} {number}")
    human = [task for task in seeds if task.language == language]
    shown = chance.sample(machine[language], min(style.machine, len(machine[language])))
    shown += chance.sample(human, min(style.human + style.machine - len(shown), len(human)))
    chance.shuffle(shown)
    prompt = style.ask(language, shown)
    return Request(f"instructions/{number}", prompt, settings.max_tokens, settings.temperature, settings.top_p)


def _read(
    ledger: Ledger, request: Request, outcome: Outcome, read: Callable[[str], list[Any]]
) -> tuple[list[Any], bool]:
    """What there is in a reply, and whether it ended in the last of it. One that holds nothing is discarded itself."""
    if isinstance(outcome, Failure):
        ledger.decide("replies", request.key, "", f"no_answer_{outcome.reason}")
        return [], False
    found = read(outcome.text.replace("\r\n", "\n"))
    ledger.decide("replies", request.key, outcome.text, None if found else "nothing_in_it")
    return found, not outcome.is_whole


# --- instances --------------------------------------------------------------------------------------------------------


def _make_instances(
    settings: Settings, seeds: list[Task], drafts: list[Draft], asker: Asker, ledger: Ledger, kinds: Counter[str]
) -> list[Task]:
    """Asks whether each task is a classification, and for its instances accordingly."""
    of_language = {language: [task for task in seeds if task.language == language] for language in settings.languages}
    # A model that was asked in one language may have written in the other one.
    languages = [language_of(draft.instruction) for draft in drafts]
    languages = [language if language in of_language else settings.languages[0] for language in languages]
    questions = [
        Request(
            f"classification/{number}", ask_for_kind(language, of_language[language], draft.instruction), ANSWER_TOKENS
        )
        for number, (draft, language) in enumerate(zip(drafts, languages, strict=True))
    ]
    answers = [read_kind(one.text) if isinstance(one, Reply) else None for one in asker.ask(questions)]
    kinds.update(KINDS[answer] for answer in answers)
    requests = [
        Request(
            f"instances/{number}",
            ask_for_instances(language, of_language[language], draft.instruction, bool(kind)),
            settings.max_tokens,
        )
        for number, (draft, language, kind) in enumerate(zip(drafts, languages, answers, strict=True))
    ]
    tasks = []
    for request, outcome, draft, kind in zip(requests, asker.ask(requests), drafts, answers, strict=True):
        pairs, is_cut = _read(ledger, request, outcome, read_output_first if kind else read_input_first)
        tasks.append(Task(draft.instruction, _taken(ledger, request.key, pairs, is_cut), bool(kind)))
    return tasks


def _taken(ledger: Ledger, key: str, pairs: Sequence[Instance], is_cut: bool = False) -> tuple[Instance, ...]:
    """The instances of a task that there is no reason against.

    Args:
        is_cut: the reply ended in the last one.
    """
    reasons = against_instances(pairs[: len(pairs) - is_cut], MOST_INSTANCES) + [CUT_SHORT] * (is_cut and bool(pairs))
    return tuple(
        pair
        for pair, reason in zip(pairs, reasons, strict=True)
        if ledger.decide("instances", key, {"input": pair[0], "output": pair[1]}, reason)
    )


# --- results ----------------------------------------------------------------------------------------------------------


def _write(output: Path, tasks: Sequence[Task], ledger: Ledger, statistics: dict[str, Any]) -> None:
    rows, listed = [], []
    for number, task in enumerate(tasks):
        name = f"machine_{number}"
        instances = [{"input": given, "output": answer} for given, answer in task.instances]
        kind = {} if task.is_classification is None else {"is_classification": task.is_classification}
        listed.append({"id": name, "instruction": task.instruction, "instances": instances, **kind})
        for place, one in enumerate(instances):
            rows.append({"id": f"{name}_{place}", "language": task.language, "instruction": task.instruction, **one})
    for name, content in ((ROWS_FILE, rows), (TASKS_FILE, listed), (DISCARDED_FILE, ledger.discarded)):
        write_json_lines(output / name, content)
    write_json(output / STATISTICS_FILE, statistics)
