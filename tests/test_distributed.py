"""Two processes that share a training run (DDP, FSDP1, FSDP2) learn what one process learns, NormHead included."""

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "distributed_training.py"


@pytest.mark.slow
def test_shared_training_equals_one_process(tmp_path):
    commands = [[sys.executable, WORKER, str(rank), tmp_path / "store"] for rank in range(2)]
    workers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands
    ]
    try:
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output
        assert output.count("passed") == 5
