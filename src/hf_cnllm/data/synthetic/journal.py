"""A journal of replies. It is all that a run must not lose: everything else follows from it and is computed anew.

    {"key": "instructions/7", "prompt": "5d41402a", "reply": "1. …", "is_whole": true}
    {"key": "instructions/8", "prompt": "7d793037", "failed": "timeout"}

A run asks its questions in the same order whenever it is started, and what the journal answers is not asked again.
"""

import hashlib
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from ...hub.saving import write_through
from ..owned_folder import owned_folder
from .chat_models import ChatModel, Failure, Outcome, Reply, Request

JOURNAL_FILE, STATISTICS_FILE = "journal.jsonl", "statistics.json"  # of every run that asks a model


class Journal:
    """The file, read at the start, with half a line at its end, which a killed process leaves, cut off; one line is appended
    for each outcome, and is on the disk when `add` returns.

    Raises:
        ValueError: a line is none of a journal's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.prompts: dict[str, str] = {}  # key -> digest
        self.replies: dict[str, Reply] = {}
        self.failures: defaultdict[str, list[str]] = defaultdict(list)
        size = 0
        if path.exists():
            with open(path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.endswith(b"\n"):
                        size += len(line)
                        self._read(line, number)
        self._file = open(path, "ab")  # noqa: SIM115  closed by `close`
        self._file.truncate(size)
        write_through(path.parent)

    def _read(self, line: bytes, number: int) -> None:
        try:
            entry = json.loads(line)
            key, digest = entry["key"], entry["prompt"]
            outcome = Failure(entry["failed"]) if "failed" in entry else Reply(entry["reply"], entry["is_whole"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{self.path}, line {number}: no entry of a journal ({error!r}); remove the line"
            ) from None
        self._keep(key, digest, outcome)

    def _keep(self, key: str, digest: str, outcome: Outcome) -> None:
        self.prompts[key] = digest
        if isinstance(outcome, Reply):
            self.replies[key] = outcome
        else:
            self.failures[key].append(outcome.reason)

    def add(self, request: Request, outcome: Outcome) -> None:
        entry: dict[str, object] = {"key": request.key, "prompt": _digest(request)}
        if isinstance(outcome, Reply):
            entry |= {"reply": outcome.text, "is_whole": outcome.is_whole}
        else:
            entry["failed"] = outcome.reason
        self._file.write(json.dumps(entry).encode() + b"\n")  # ASCII: a reply may hold half a surrogate pair
        self._file.flush()
        os.fsync(self._file.fileno())
        self._keep(request.key, str(entry["prompt"]), outcome)

    def outcome(self, request: Request, attempts: int) -> Outcome | None:
        """The reply; a failure after so many `attempts`; None where the model is still to be asked.

        Raises:
            ValueError: the entry of that key answers another prompt.
        """
        if self.prompts.get(request.key, _digest(request)) != _digest(request):
            raise ValueError(
                f"{self.path}: {request.key} answers another prompt than this version of the program asks: choose a new folder"
            )
        if request.key in self.replies:
            return self.replies[request.key]
        failures = self.failures.get(request.key, [])
        return Failure(failures[-1]) if len(failures) >= attempts else None

    def close(self) -> None:
        self._file.close()


def _digest(request: Request) -> str:
    return hashlib.sha256(repr(tuple(request)).encode("utf-8", "surrogatepass")).hexdigest()[:16]


@contextmanager
def asking(
    model: ChatModel, output: Path, identity: Mapping[str, Any], attempts: int, most_failures: int
) -> "Iterator[Asker]":
    """An [`Asker`] whose journal is in the folder of this run, which is kept from others meanwhile; raises as `owned_folder`.

    Args:
        identity: of the run, besides the model.
    """
    with (
        owned_folder(output, {"model": model.name, **identity}),
        closing(Journal(output / JOURNAL_FILE)) as journal,
    ):
        yield Asker(model, journal, attempts, most_failures)


class ModelGone(OSError):
    """The model does not answer any more."""


class Asker:
    """Asks a model what the journal does not answer, and writes what it says there.

    Args:
        attempts: failures of a request, over all runs, after which it is given up.
        most_failures: failures in a row after which the run ends.
    """

    def __init__(self, model: ChatModel, journal: Journal, attempts: int, most_failures: int) -> None:
        self.model, self.journal = model, journal
        self.attempts, self.most_failures = attempts, most_failures
        self.counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._in_a_row = 0

    def ask(self, requests: Sequence[Request]) -> list[Outcome]:
        """The outcomes in the order of the requests.

        Raises:
            ModelGone: it did not answer `most_failures` times in a row.
        """
        while missing := [one for one in requests if self.journal.outcome(one, self.attempts) is None]:
            for request, outcome in self.model.answer(missing):
                self.journal.add(request, outcome)
                self._watch(request, outcome)
        outcomes = [self.journal.outcome(request, self.attempts) for request in requests]
        for request, outcome in zip(requests, outcomes, strict=True):
            self._count(request, outcome)
        return outcomes

    def _watch(self, request: Request, outcome: Outcome) -> None:
        if isinstance(outcome, Reply):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        print(f"{request.key}: no answer, {outcome.reason} ({outcome.detail})", file=sys.stderr)
        if self._in_a_row >= self.most_failures:
            raise ModelGone(
                f"the model gave no answer {self._in_a_row} times in a row, at last: {outcome.reason} ({outcome.detail}); "
                "what it said is kept, give the same command again to go on"
            )

    def _count(self, request: Request, outcome: Outcome) -> None:
        counts = self.counts[request.key.partition("/")[0]]
        counts["asked"] += 1
        counts["answered"] += isinstance(outcome, Reply)
        for reason in self.journal.failures.get(request.key, ()):
            counts[f"failed_{reason}"] += 1
        if isinstance(outcome, Failure):
            counts[f"given_up_{outcome.reason}"] += 1

    def statistics(self) -> Mapping[str, dict[str, int]]:
        """Stage -> requests asked and answered, failures by reason, and requests given up by the last of theirs."""
        return {stage: dict(sorted(counts.items())) for stage, counts in self.counts.items()}
