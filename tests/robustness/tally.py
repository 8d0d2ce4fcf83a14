"""What the sweeps of this folder count, and how: tried, refused, warned, right, listed, silent.

Every case is a damage, an attack or an odd input. It may end in an error (refused), in a warning that the undamaged case
does not give (warned), or in the right answer. Anything else is silent, and no sweep may have one; but what no reader
can know, such as a flipped bit of a weight without a checksum, is listed with its reason.
"""

import json
import logging
import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import transformers

SEED = 20240217
OUTCOMES = ("refused", "warned", "right", "listed", "silent")

# A sweep runs as a sample of fixed seed, and as a whole behind `slow` and `sweep`.
WHOLE = pytest.param(True, id="whole", marks=[pytest.mark.slow, pytest.mark.sweep])
sample_or_whole = pytest.mark.parametrize("whole", [pytest.param(False, id="sample"), WHOLE])


def sample(cases: Sequence[Any], count: int, whole: bool) -> list[Any]:
    """`count` of the cases, or all; the same ones in every run."""
    if whole or len(cases) <= count:
        return list(cases)
    return random.Random(SEED).sample(list(cases), count)


class Tally:
    """The counts of one sweep. `part` and `name` are its place in the table of docs/reliability.md."""

    def __init__(self, part: str = "", name: str = ""):
        self.part, self.name = part, name
        self.counts: Counter[str] = Counter()
        self.silent: list[str] = []
        self.listed: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.expected_warnings: set[str] = set()

    def count(self, outcome: str, case: str, reason: str = "") -> None:
        self.counts[outcome] += 1
        if outcome == "silent":
            self.silent.append(f"{case}: {reason}" if reason else case)
        elif outcome == "listed":
            self.listed[reason] += 1

    def judge(
        self,
        case: str,
        answer: Callable[[], Any],
        is_right: Callable[[Any], bool] = bool,
        unknowable: str | None = None,
    ) -> None:
        """Runs one case. `unknowable` says why a wrong answer to it is not to be known from what is there."""
        with heard_warnings() as heard:
            try:
                result = answer()
            except Exception as error:
                self.errors[f"{type(error).__name__}: {str(error)[:90]!r}"] += 1
                return self.count("refused", case)
        if is_right(result):
            return self.count("right", case)
        if set(heard) - self.expected_warnings:
            return self.count("warned", case)
        return self.count("listed", case, unknowable) if unknowable else self.count("silent", case)

    def check(self) -> None:
        """Fails the test that has silent cases."""
        if self.silent:
            shown = "\n".join(self.silent[:200])
            pytest.fail(f"{self}. The silent ones:\n{shown}", pytrace=False)

    def undamaged(self, answer: Callable[[], Any]) -> Any:
        """The answer to the case that nothing was done to; its warnings count for nothing afterwards."""
        with heard_warnings() as heard:
            result = answer()
        self.expected_warnings |= set(heard)
        return result

    @property
    def tried(self) -> int:
        return self.counts.total()

    def __str__(self) -> str:
        counts = ", ".join(f"{self.counts[outcome]} {outcome}" for outcome in OUTCOMES)
        return f"{self.part}, {self.name}: {self.tried} tried, {counts}"

    def record(self) -> str:
        """For docs/reliability.md, see scripts/reliability.py."""
        return json.dumps(
            {"part": self.part, "name": self.name, "tried": self.tried, **{o: self.counts[o] for o in OUTCOMES}}
            | {"reasons": dict(self.listed)}
        )


@contextmanager
def heard_warnings() -> Iterator[list[str]]:
    """The warnings of transformers' and this package's loggers and of Python while the block runs."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    ear = Ear(level=logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("transformers", "hf_cnllm")]
    before = [(list(logger.handlers), logger.level) for logger in loggers]
    transformers.logging.get_logger("transformers").warning_once.__func__.cache_clear()  # it speaks once a process
    for logger in loggers:  # an earlier test or command may have silenced them
        logger.handlers = [ear]
        _set_level(logger, logging.WARNING)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield heard
        heard += [str(w.message) for w in caught if not issubclass(w.category, (DeprecationWarning, FutureWarning))]
    finally:
        for logger, (handlers, level) in zip(loggers, before, strict=True):
            logger.handlers = handlers
            _set_level(logger, level)


def _set_level(logger: logging.Logger, level: int) -> None:
    if logger.level != level:  # setting it goes through all loggers there are
        logger.setLevel(level)
