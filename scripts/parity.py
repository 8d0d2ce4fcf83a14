"""Measures how far the models are from the originals' numbers, and writes the table of docs/parity.md.

    python scripts/parity.py            # a few minutes of one core

Runs the tests on the recordings (tests/fixtures/goldens) and notes every comparison that they make with `assert_close`.
"""

import os
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "parity.md"
MARKS = "<!-- table: python scripts/parity.py -->\n", "\n<!-- end of table -->"
TEST = re.compile(r"[\[-]((?:baichuan|qwen|chatglm|glm)\w*)-.+\]")
FAMILIES = {
    "baichuan_": "Baichuan 1",
    "baichuan2": "Baichuan 2",
    "qwen": "Qwen",
    "chatglm_": "ChatGLM-6B",
    "chatglm2": "ChatGLM2",
    "chatglm3": "ChatGLM3",
    "glm130b": "GLM-130B",
    "glm": "GLM",
}


class Recorder:
    """A pytest plugin that stands in front of `goldens.assert_close`."""

    def __init__(self):
        self.errors: dict[str, list[float]] = defaultdict(list)  # family -> largest error of each comparison
        self.values: dict[str, int] = defaultdict(int)
        self.cases: dict[str, set[str]] = defaultdict(set)

    def pytest_configure(self):
        import goldens

        check = goldens.assert_close

        def assert_close(actual, expected, real=None, atol=goldens.TOLERANCE):
            check(actual, expected, real, atol)
            match = TEST.search(os.environ["PYTEST_CURRENT_TEST"])
            if match and actual.dtype == torch.float32:
                self.note(match[1], match[0], actual, expected, real)

        goldens.assert_close = assert_close

    def note(self, golden, case, actual, expected, real):
        family = next(title for start, title in FAMILIES.items() if golden.startswith(start))
        difference = (actual.detach() - expected.float()).abs()
        if real is not None:
            difference = difference[real != 0]
        if difference.numel():
            self.errors[family].append(difference.max().item())
            self.values[family] += difference.numel()
            self.cases[family].add(case)

    def table(self) -> str:
        lines = [
            "| family | cases × backends | numbers compared | median of the cases' largest errors | largest of all |"
        ]
        lines.append("|---|---:|---:|---:|---:|")
        for family in FAMILIES.values():
            errors, count = self.errors[family], len(self.cases[family])
            middle, most = statistics.median(errors), max(errors)
            lines.append(f"| {family} | {count} | {self.values[family]:,} | {middle:.1e} | {most:.1e} |")
        return "\n".join(lines)


def main() -> int:
    recorder = Recorder()
    files = sorted(map(str, (ROOT / "tests" / "models").glob("*/test_modeling_*.py")))
    code = pytest.main(["-q", "-m", "not slow", "-k", "golden and (eager or sdpa)", *files], plugins=[recorder])
    if code != 0:
        return int(code)
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    PAGE.write_text(before + MARKS[0] + recorder.table() + MARKS[1] + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "tests")]
    sys.exit(main())
