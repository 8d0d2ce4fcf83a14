"""Who runs the tasks of a pass: processes on this machine, Slurm, or Ray, each by datatrove's executor."""

import contextlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from copy import deepcopy
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import setup_default_logger
from filelock import FileLock

LOGS, WORKERS = "logs", "workers"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """datatrove's log and progress bars go to standard error: nowhere, meanwhile."""
    before = sys.stderr
    with open(os.devnull, "w") as sys.stderr:
        try:
            yield
        finally:
            sys.stderr = before
            setup_default_logger()  # it holds the stream that was there when it was set up


def _start_worker(locks: str) -> None:
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  for the life of the process
    lock = FileLock(Path(locks, f"{os.getpid()}.lock"))
    lock.acquire()
    parent: Any = multiprocessing.parent_process()

    def end_with_parent(lock: FileLock = lock) -> None:  # holds it as long as the process lives
        parent.join()
        os._exit(1)  # which lets go of the lock

    threading.Thread(target=end_with_parent, daemon=True).start()


def wait_for_workers(work: Path) -> None:
    """Until those that a killed run left behind have ended; that takes a moment, and none writes a file after."""
    for path in (work / WORKERS).glob("*.lock"):
        with FileLock(path):
            pass
        path.unlink(missing_ok=True)


def run_locally(kind: type, passes: Sequence[Any], work: Path, workers: int, **options: Any) -> Iterator[Any]:
    """Runs one pass after another, and gives each that had something left to do. Not by the executor's own `run`, whose workers
    outlive a process that is killed, and which waits forever for one of them that is. A task's log is in its pass's folder.

    Raises:
        ChildProcessError: a worker was killed.
    """
    with contextlib.ExitStack() as stack:
        pool = None
        for each in passes:
            executor = kind(each.pipeline, each.tasks, workers, logging_dir=str(work / LOGS / each.name), **options)
            ranks = executor.get_incomplete_ranks()
            if ranks and workers == 1:
                with _quiet():
                    for rank in ranks:
                        deepcopy(executor)._run_for_rank(rank)
            elif ranks:
                pool = pool or stack.enter_context(_pool(work, workers))
                try:
                    for task in [pool.submit(executor._run_for_rank, rank) for rank in ranks]:
                        task.result()
                except BrokenProcessPool as error:
                    raise ChildProcessError(
                        f"{each.name}: a worker was killed; was there too little memory?"
                    ) from error
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
            if ranks:
                yield each


def _pool(work: Path, workers: int) -> ProcessPoolExecutor:
    (work / WORKERS).mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
    if os.name != "nt":
        context.set_forkserver_preload(["hf_cnllm.data.corpus"])
    count = workers if workers > 0 else os.cpu_count()
    return ProcessPoolExecutor(count, context, _start_worker, (str(work / WORKERS),))


def run_in_turn(kind: type, passes: Sequence[Any], work: Path, workers: int, **options: Any) -> Iterator[Any]:
    """Runs one pass after another by the executor's own `run`, which ends well when tasks did not.

    Raises:
        ChildProcessError: some did not.
    """
    for each in passes:
        executor = kind(each.pipeline, each.tasks, workers, logging_dir=str(work / LOGS / each.name), **options)
        if executor.get_incomplete_ranks():
            executor.run()
            if failed := len(executor.get_incomplete_ranks()):
                raise ChildProcessError(
                    f"{each.name}: {failed} of {each.tasks} tasks failed, see {work / LOGS / each.name}; the same command goes on"
                )
            yield each


class AfterPass(PipelineStep):
    """Refuses to begin before all tasks of a pass have ended well. Slurm's dependencies name the last of a pass's arrays, so when a
    task in another one fails, they are kept; and files that are not there would be read as empty ones.

    Args:
        logs: the pass's folder.
        tasks: how many it has.
    """

    type, name = "⏳ - ORDER", "order/pass before"

    def __init__(self, logs: str, tasks: int) -> None:
        super().__init__()
        self.logs, self.tasks = logs, tasks

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        done = len(list(Path(self.logs, "completions").glob("*")))
        if done < self.tasks:
            raise RuntimeError(
                f"{self.logs}: {done} of {self.tasks} tasks have ended well; give the same command again"
            )
        return data


def submit(kind: type, passes: Sequence[Any], work: Path, workers: int, **options: Any) -> Iterator[Any]:
    """Hands all passes to Slurm, each to begin when the one before has ended well."""
    last = None
    order: list[PipelineStep] = []
    for each in passes:
        logs = str(work / LOGS / each.name)
        names = {"job_name": each.name, "logging_dir": logs}
        last = kind([*order, *each.pipeline], each.tasks, workers=workers, depends=last, **names, **options)
        order = [AfterPass(logs, each.tasks)]
    last.run()
    yield from ()


# Name -> (how passes are run, by which executor, the options that it must be given).
EXECUTORS: dict[str, tuple[Callable[..., Iterator[Any]], type, tuple[str, ...]]] = {
    "local": (run_locally, LocalPipelineExecutor, ()),
    "slurm": (submit, SlurmPipelineExecutor, ("time", "partition")),
    "ray": (run_in_turn, RayPipelineExecutor, ()),
}
