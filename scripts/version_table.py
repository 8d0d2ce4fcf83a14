"""Which tests pass on which transformers: runs the lanes of noxfile.py and prints a table.

python scripts/version_table.py              all minor releases, several minutes each
python scripts/version_table.py --reports    the reports of the last runs, without running anything
"""

import argparse
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from noxfile import LANE, MINORS, REPORTS  # noqa: E402


def outcomes(report: Path) -> dict[str, Counter]:
    """Kind of test -> how many passed, failed and were skipped, from pytest's junit report."""
    counts: dict[str, Counter] = {kind: Counter() for kind in LANE}
    for case in ElementTree.parse(report).iter("testcase"):
        module, _, _ = case.get("classname", "").partition(".Test")  # some tests stand in a class
        path = Path(module.replace(".", "/") + ".py")
        kind = next(kind for kind, patterns in LANE.items() if any(map(path.match, patterns)))
        found = {child.tag for child in case}
        outcome = "failed" if found & {"failure", "error"} else "skipped" if "skipped" in found else "passed"
        counts[kind][outcome] += 1
    return counts


def row(version: str) -> tuple[str, bool]:
    """A line of the table, and whether nothing failed."""
    report = ROOT / REPORTS / f"{version}.xml"
    if not report.is_file():
        return f"| {version} |{' not run |' * len(LANE)}", False
    counts = outcomes(report)
    cells = [
        f"{count['passed']} passed, {count['failed']} failed"
        + (f", {count['skipped']} skipped" if count["skipped"] else "")
        for count in counts.values()
    ]
    return f"| {version} | {' | '.join(cells)} |", not any(count["failed"] for count in counts.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", action="store_true", help="only read the reports of earlier runs")
    if not parser.parse_args().reports:
        subprocess.run([sys.executable, "-m", "nox", "-s", "minors"], cwd=ROOT, check=False)
    rows = [row(version) for version in MINORS]
    print(
        f"| transformers | {' | '.join(LANE)} |", f"|---{'|---' * len(LANE)}|", *(text for text, _ in rows), sep="\n"
    )
    return 0 if all(held for _, held in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
