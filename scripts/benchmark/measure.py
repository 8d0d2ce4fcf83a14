"""Time, taken in turns, and peak memory."""

import contextlib
import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .machine import synchronize

MIB = 2**20
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Times:
    """Seconds of each round, by name; all of one round ran one after the other."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, reference: str) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of the rounds' own ratios."""
        ratios = [a / b for a, b in zip(self.seconds[name], self.seconds[reference], strict=True)]
        if len(ratios) == 1:
            return ratios[0], ratios[0], ratios[0]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, median, high


def take_turns(
    work: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Runs all of `work` once to warm up, then `rounds` times in turns.

    A callable may return the seconds it wants counted, a float (decoding counts its steps alone); otherwise all of it
    counts.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    names = list(work)
    for round_index in range(rounds + 1):
        for name in names:
            synchronize(device)
            start = clock()
            counted = work[name]()
            synchronize(device)
            elapsed = clock() - start
            if round_index:
                seconds[name].append(counted if isinstance(counted, float) else elapsed)
        names.reverse()  # who comes first may find a colder cache
    return Times(seconds)


def peak_growth(work: Callable[[], object], device: torch.device) -> float | None:
    """MiB by which memory grows, at its peak, while `work` runs. None where the system does not tell (not Linux)."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - allocated) / MIB
    if not _reset_resident_peak():
        return None
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _reset_resident_peak() -> bool:
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed but not given back would hide growth
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    except OSError:
        return False
    return True


def _resident(field: str) -> float:
    """MiB from /proc/self/status."""
    return int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
