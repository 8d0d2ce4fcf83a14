"""Two processes that share the matrices compute what one does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from goldens import GOLDENS


@pytest.mark.slow
def test_two_processes_give_the_logits_of_one():
    worker = Path(__file__).with_name("tensor_parallel.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", worker]
    done = subprocess.run([*command, GOLDENS / "glm130b"], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows, difference = re.search(r"rows (\d+) difference (\S+)", done.stdout).groups()
    assert int(rows) == 88 and float(difference) < 1e-4  # half of dense_h_to_4h's
