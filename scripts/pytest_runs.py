"""Runs of pytest whose records the pages of docs are written from."""

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]


def run_tests(*words: str) -> tuple[list[str], int]:
    """What the tests recorded as properties (`record_property`), and how many of them failed."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        subprocess.run([sys.executable, "-m", "pytest", f"--junitxml={results}", *words], cwd=ROOT, check=False)
        tests = list(ElementTree.parse(results).iter("testcase"))
    failed = sum(test.find("failure") is not None or test.find("error") is not None for test in tests)
    return [found.get("value", "") for test in tests for found in test.iter("property")], failed
