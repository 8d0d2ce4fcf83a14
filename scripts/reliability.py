"""Runs the robustness tests (tests/robustness) and writes what they count into docs/reliability.md.

    python scripts/reliability.py            # every case: about half an hour of one core
    python scripts/reliability.py --sample   # the cases of a plain `pytest`: a few minutes

Ends with an error, and with the table written, if a case was silently wrong.
"""

import argparse
import json
import sys
from collections import Counter
from typing import Any

from pytest_runs import ROOT, run_tests

REPORT = ROOT / "docs" / "reliability.md"
OUTCOMES = ("tried", "refused", "warned", "right", "listed", "silent")

HEAD = """# What was broken on purpose, and what came of it

Written by `python scripts/reliability.py{options}`; the cases are in `tests/robustness`.

Each case damages a folder, attacks a chat, gives a model an odd input, or kills a process while it saves. It is *refused* (an
error), *warned* of (a warning that the undamaged case does not give), or *right* (the answer of the undamaged case). What
no reader of the files can know is *listed* with its reason below. Anything else is *silent*, and there must be none.

| part | cases | {titles} |
|---|---|{rule}|
"""
REASONS = """
## What no reader can know

| cases | reason |
|---|---|
"""
SAVING = """
## Saving over an older checkpoint

A `save_pretrained` of these models that is killed while it replaces older shards leaves a folder that does not load and says
why; [security.md](security.md) has what each way of saving leaves. A folder that is always whole is a new one, renamed when it
is complete, which is what `hf_cnllm.hub.saving.staged_folder` does.
"""


def report(records: list[dict[str, Any]], options: str) -> str:
    rows: dict[tuple[str, str], Counter[str]] = {}
    reasons: Counter[str] = Counter()
    for record in records:
        rows.setdefault((record["part"], record["name"]), Counter()).update({o: record[o] for o in OUTCOMES})
        reasons.update(record["reasons"])
    titles, rule = " | ".join(OUTCOMES), "---:|" * (len(OUTCOMES) - 1) + "---:"
    lines = [_row(part, name, counts) for (part, name), counts in sorted(rows.items(), key=lambda row: row[0])]
    total = sum(rows.values(), Counter())
    lines.append(_row("**all**", "", total))
    text = HEAD.format(options=options, titles=titles, rule=rule) + "\n".join(lines) + "\n"
    if reasons:
        shown = [f"| {count:,} | {reason} |" for reason, count in reasons.most_common()]
        text += REASONS + "\n".join(shown) + "\n"
    return text + SAVING


def _row(part: str, name: str, counts: Counter[str]) -> str:
    return f"| {part} | {name} | " + " | ".join(f"{counts[outcome]:,}" for outcome in OUTCOMES) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", action="store_true", help="only the cases that are not marked slow")
    arguments, others = parser.parse_known_args()
    tallies, failed = run_tests("tests/robustness", *others, "-m", "not slow" if arguments.sample else "")
    REPORT.write_text(
        report(list(map(json.loads, tallies)), " --sample" if arguments.sample else ""), encoding="utf-8"
    )
    print(f"wrote {REPORT.relative_to(ROOT)}; {failed} tests failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
