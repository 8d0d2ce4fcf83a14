"""The tokenizers' benchmark on one small vocabulary."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "benchmark_tokenizers.py"


@pytest.mark.slow
def test_one_row_for_each_vocabulary(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("你好，世界 Hello, world\n" * 500, encoding="utf-8")
    options = ["--families", "baichuan2", "qwen", "--documents", str(text), "--rounds", "1", "--longest", "100000"]
    run = subprocess.run(
        [sys.executable, str(SCRIPT), *options],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
        timeout=300,
    )
    rows = [line.split("|")[1:-1] for line in run.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == ["baichuan2", "qwen"]
    assert all(float(row[3]) > 0 and float(row[7]) > 0 and 0 < float(row[8]) < 2 for row in rows)
