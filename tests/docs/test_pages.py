"""Pages that a command makes are up to date, and the numbers that stand in several places agree."""

import re
import tomllib
from pathlib import Path

import paper_index

import hf_cnllm

ROOT = Path(__file__).parents[2]


def test_lines_of_the_paper_index_are_those_of_the_code():
    page = paper_index.PAGE.read_text(encoding="utf-8")
    assert len(paper_index.ENTRY.findall(page)) == len(re.findall(r"\.py:\d+", page)) >= 20
    assert paper_index.with_lines(page) == page, "run python scripts/paper_index.py"
