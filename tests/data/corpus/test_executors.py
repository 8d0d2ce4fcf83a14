"""The corpus pipeline on Slurm and Ray: the same bytes as on one machine, also after a task that failed."""

import json
import os
import sys
from copy import deepcopy
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="needs the extra data")

from datatrove.executor import LocalPipelineExecutor

from hf_cnllm.data.corpus import Settings, run
from hf_cnllm.data.corpus.executors import EXECUTORS, run_in_turn

from . import slurm_stand_in
from .corpora import planted, write_records
from .slurm_stand_in import run_jobs


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


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Slurm's commands on the path; gives the folder of their queue."""
    binaries, queue = tmp_path / "bin", tmp_path / "queue"
    binaries.mkdir()
    queue.mkdir()
    for name in ("sbatch", "srun", "scontrol"):
        (binaries / name).write_text(f'#!/bin/bash\nexec {sys.executable} {slurm_stand_in.__file__} {name} "$@"\n')
        (binaries / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STAND_IN", str(queue))
    return queue


SLURM = {"time": "1:00:00", "partition": "cpu"}


@pytest.mark.slow
def test_slurm_is_handed_passes_that_depend_on_each_other(whole, tmp_path, slurm):
    settings = Settings(**whole, output=tmp_path / "out", executor="slurm", executor_options=SLURM)
    assert run(settings) is None and not (tmp_path / "out" / "documents").exists(), "submitted, and no more"
    assert set(run_jobs(slurm).values()) == {"ok"}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert run(settings) == json.loads((tmp_path / "whole" / "statistics.json").read_text())
    assert not list(slurm.glob("*.json")), "nothing is submitted again"


@pytest.mark.slow
def test_a_task_that_slurm_lost_loses_nothing(whole, tmp_path, slurm):
    """With an array for each task, of which Slurm's dependencies name the last: the next pass begins, and must see for itself."""
    options = {**SLURM, "max_array_size": 1}
    settings = Settings(**whole, output=tmp_path / "out", executor="slurm", executor_options=options)
    run(settings)
    passes = sorted({json.loads(path.read_text())["name"] for path in slurm.glob("*.json")})
    ends = run_jobs(slurm, fails=(passes[0], 0))
    of_pass = {name: [end for job, end in ends.items() if job.endswith(name)] for name in passes}
    assert of_pass[passes[0]][:2] == ["failed", "ok"] and of_pass[passes[1]][0] == "failed"
    assert set(of_pass[passes[2]]) == {"never"} and not (tmp_path / "out" / "statistics.json").exists()
    run(settings)
    again = [json.loads(path.read_text())["name"] for path in sorted(slurm.glob("*.json"))]
    assert again.count(passes[0]) == 2, "the task that was lost, and the sum of the pass's counts"
    assert set(run_jobs(slurm).values()) == {"ok"}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


class Swallowing(LocalPipelineExecutor):
    """Like Ray's, whose `run` ends well when tasks did not."""

    fails = True

    def run(self):
        for rank in self.get_incomplete_ranks():
            if rank == 1 and "publish" not in str(self.logging_dir) and self.fails:
                continue
            deepcopy(self)._run_for_rank(rank)


def test_tasks_that_failed_unheard_end_the_run(whole, tmp_path, monkeypatch):
    monkeypatch.setitem(EXECUTORS, "ray", (run_in_turn, Swallowing, ()))
    settings = Settings(**whole, output=tmp_path / "out", executor="ray")
    with pytest.raises(ChildProcessError, match="1 of 2 tasks failed"):
        run(settings)
    monkeypatch.setattr(Swallowing, "fails", False)
    run(settings)
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
