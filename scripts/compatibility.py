"""Tries every door of transformers' native models on every family (tests/test_doors.py) and writes docs/compatibility.md.

    python scripts/compatibility.py               # all: about five minutes of one core
    python scripts/compatibility.py -k chatglm3   # those alone, like any options of pytest: the other cells stay as they were

Ends with an error, and with the table written, if a cell is not what the test expects; such a cell says so.
"""

import argparse
import html
import json
import sys
from importlib.metadata import version

from pytest_runs import ROOT, run_tests

sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from noxfile import REPORTS  # noqa: E402

from test_doors import DOORS, FAMILIES  # noqa: E402

PAGE = ROOT / "docs" / "compatibility.md"
OUTCOMES = ROOT / REPORTS / "compatibility.json"  # of all runs so far: the newest of each cell

HEAD = """# What opens in which family

Written by `python scripts/compatibility.py` with {versions}.

The doors of transformers' native models, and of the libraries that build on it, each tried on a tiny checkpoint in the Hub's
layout. A cell *works*: its test asserts what comes out, such as the same tokens with and without a static cache, not only that
nothing is raised. Or it is *refused* with the sentence below that has its number. *Failed* is neither, and *not tried* says that
no run has come there. GLM is loaded with the ids of its control tokens, which its config.json lacks. The test of a cell is
`tests/test_doors.py::test_door[DOOR-FAMILY]`, and its function stands in `tests/doors`;
`pytest "tests/test_doors.py::test_door[model.chat-qwen]"` runs one.

"""
SENTENCES = "\n## The sentences\n\n"
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate")


def try_doors(arguments: list[str]) -> int:
    """How many tests failed; what came out joins `OUTCOMES`."""
    outcomes = json.loads(OUTCOMES.read_text()) if OUTCOMES.is_file() else {}
    tried, failed = run_tests("-m", "", "tests/test_doors.py", *arguments)
    for door, family, *outcome in map(json.loads, tried):
        outcomes.setdefault(door, {})[family] = outcome
    OUTCOMES.parent.mkdir(parents=True, exist_ok=True)
    OUTCOMES.write_text(json.dumps(outcomes, indent=1, ensure_ascii=False))
    return failed


def page() -> str:
    outcomes, numbers = json.loads(OUTCOMES.read_text()), {}
    lines = [f"| door | {' | '.join(FAMILIES)} |", "|---|" + "---|" * len(FAMILIES)]
    for door in DOORS:
        cells = []
        for family in FAMILIES:
            outcome, sentence = outcomes.get(door, {}).get(family, ["not tried", ""])
            number = numbers.setdefault(sentence, len(numbers) + 1) if sentence else None
            cells.append(f"{outcome} ({number})" if number else outcome)
        lines.append(f"| `{door}` | {' | '.join(cells)} |")
    sentences = [f"{number}. {html.escape(sentence, quote=False)}" for sentence, number in numbers.items()]
    versions = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
    return HEAD.format(versions=versions) + "\n".join(lines) + "\n" + SENTENCES + "\n".join(sentences) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _, arguments = parser.parse_known_args()
    failed = try_doors(arguments)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}; {failed} tests failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
