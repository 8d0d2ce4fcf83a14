"""The corpus pipeline on Slurm and Ray: the same bytes as on one machine. Slurm's commands are stood in for by scripts that run at
once what they are handed."""

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="needs the extra data")

from hf_cnllm.data.corpus import Settings, run

from .corpora import planted, write_records

SBATCH = """#!/bin/bash
# sbatch --export=ALL,RUN_OFFSET=0 [--dependency=afterok:…] FILE
for word in "$@"; do
  case "$word" in --export=*) export "${word##*,}" ;; esac
done
file="${@: -1}"
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$file")
echo "$@" >> "$SLURM_STAND_IN_LOG"
for task in $(seq 0 "${last:-0}"); do
  SLURM_ARRAY_TASK_ID=$task SLURM_JOB_ID=7 SLURM_NODELIST=node bash "$file" > "$SLURM_STAND_IN_LOG.$$.$task" 2>&1 || exit 1
done
echo "Submitted batch job $$"
"""
SRUN = """#!/bin/bash
while [[ "$1" == -* ]]; do
  [[ "$1" == -n ]] && shift
  shift
done
exec "$@"
"""


def contents(folder):
    names = ("statistics.json", "funnel.png", "documents/00000.jsonl", "documents/00001.jsonl")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture
def whole(tmp_path):
    records, _ = planted(originals=20, pairs=5, near_misses=0, length=60)
    path = write_records(tmp_path / "in.jsonl", records + records[:3])
    settings = {"input": [path], "stages": ("exact", "pii"), "shard_bytes": path.stat().st_size // 2 + 1}
    run(Settings(**settings, output=tmp_path / "whole"))
    return settings


@pytest.mark.slow
def test_slurm_is_handed_passes_that_depend_on_each_other(whole, tmp_path, monkeypatch):
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", "#!/bin/bash\necho node\n")):
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STAND_IN_LOG", str(tmp_path / "log"))
    options = {"time": "1:00:00", "partition": "cpu"}
    settings = Settings(**whole, output=tmp_path / "out", executor="slurm", executor_options=options)
    run(settings)  # submits; the stand-in is done before it returns
    jobs = [line for line in (tmp_path / "log").read_text().splitlines() if "afterok" in line]
    assert len(jobs) >= 3, "every pass but the first waits for another"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_ray(whole, tmp_path):
    ray = pytest.importorskip("ray", reason="needs ray")
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        options = {"mem_per_cpu_gb": 0.2}
        run(Settings(**whole, output=tmp_path / "out", executor="ray", executor_options=options, workers=2))
    finally:
        ray.shutdown()
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
