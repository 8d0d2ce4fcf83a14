"""Slurm's commands as far as datatrove uses them: `sbatch` checks and queues a script and returns at once, and `run_jobs` runs what is
queued as the scheduler would, by dependencies and arrays. What sbatch's manual does not allow is refused.

python slurm_stand_in.py sbatch|srun|scontrol WORDS…      # the queue is the folder $SLURM_STAND_IN
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

DIRECTIVES = {
    "array": r"\d+-\d+(%[1-9]\d*)?",
    "time": r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}",
    "mem-per-cpu": r"\d+[KMGT]?",
    "dependency": r"(afterok|afterany):\d+(,(afterok|afterany):\d+)*",
    "requeue": "",
    **dict.fromkeys(("cpus-per-task", "nodes"), r"[1-9]\d*"),
    **dict.fromkeys(("partition", "job-name", "output", "error", "qos", "account"), r"\S+"),
}


def sbatch(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--export")
    parser.add_argument("--dependency")
    parser.add_argument("file", type=Path)
    given = parser.parse_args(words)
    script = given.file.read_text()
    if not script.startswith("#!"):
        sys.exit("sbatch: error: This does not look like a batch script.")
    directives = {}
    for line in script.splitlines()[1:]:
        if not line.startswith("#SBATCH "):
            break  # sbatch stops at the first command
        name, _, value = line.removeprefix("#SBATCH --").partition("=")
        if name not in DIRECTIVES or not re.fullmatch(DIRECTIVES[name], value):
            sys.exit(f"sbatch: error: invalid directive {line}")
        directives[name] = value
    if script.count("#SBATCH ") != len(directives):
        sys.exit("sbatch: error: a directive behind a command, or twice")
    everything, *variables = (given.export or "ALL").split(",")
    assert everything == "ALL"
    queue = Path(os.environ["SLURM_STAND_IN"])
    number = len(list(queue.iterdir())) + 100
    job = {
        "script": script,
        "name": directives["job-name"],
        "array": [int(border) for border in directives.get("array", "0-0").partition("%")[0].split("-")],
        "dependency": given.dependency or directives.get("dependency", ""),
        "environment": {**os.environ, **dict(variable.split("=", 1) for variable in variables)},
        "folder": os.getcwd(),
        "output": directives["output"],
    }
    (queue / f"{number}.json").write_text(json.dumps(job))
    print(f"Submitted batch job {number}")


def srun(words: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-l", action="store_true")
    parser.add_argument("-n", type=int)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    command = parser.parse_args(words).command
    os.execvp(command[0], command)


def run_jobs(queue: Path, fails: tuple[str, int] | None = None) -> dict[str, str]:
    """Runs the queue until nothing is left that may start, and empties it.

    Args:
        fails: the first job of this name that has a task of this number (of the array) loses that task to a signal.

    Returns:
        Job and its name -> `ok`, `failed`, or `never` if what it depends on did not end as it must.
    """
    ends: dict[str, str] = {}
    names: dict[str, str] = {}
    for path in sorted(queue.glob("*.json")):
        number, job = path.stem, json.loads(path.read_text())
        path.rename(path.with_suffix(".done"))
        names[number] = f"{number} {job['name']}"
        conditions = [condition.split(":") for condition in job["dependency"].split(",") if condition]
        if any(ends[other] != "ok" and (kind == "afterok" or ends[other] == "never") for kind, other in conditions):
            ends[number] = "never"
            continue
        codes = []
        for task in range(job["array"][0], job["array"][1] + 1):
            slurm = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_JOB_ID": number, "SLURM_JOB_ID": number}
            environment = job["environment"] | {name: str(value) for name, value in slurm.items()}
            environment |= {"SLURM_NODELIST": "node", "SLURM_JOB_NODELIST": "node", "SLURM_NODEID": "0"}
            if fails == (job["name"], task):
                fails = None
                codes.append(-9)
                continue
            with open(job["output"].replace("%A", number).replace("%a", str(task)), "w") as log:
                command = ["bash", "-c", job["script"]]
                codes.append(
                    subprocess.run(
                        command, env=environment, cwd=job["folder"], stdout=log, stderr=log, check=False
                    ).returncode
                )
        ends[number] = "ok" if not any(codes) else "failed"
    return {names[number]: end for number, end in ends.items()}


if __name__ == "__main__":
    {"sbatch": sbatch, "srun": srun, "scontrol": lambda words: print("node")}[sys.argv[1]](sys.argv[2:])
