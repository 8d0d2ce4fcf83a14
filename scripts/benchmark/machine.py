"""What the machine can do: its measured matmul rate and memory bandwidth, and on known GPUs the data sheet's."""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Dense bf16/fp16 FLOP/s and bytes/s by a part of the device's name, most specific first.
DATA_SHEETS = {
    "H200": (989e12, 4.8e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100": (989e12, 3.35e12),
    "A100-SXM4-80GB": (312e12, 2.04e12),
    "A100": (312e12, 1.56e12),
    "L40S": (362e12, 0.86e12),
    "RTX 4090": (165e12, 1.01e12),
}


@dataclass(frozen=True)
class Machine:
    """Rates against which work is set.

    Attributes:
        flops: dtype name -> FLOP/s of a large square matmul, measured.
        bandwidth: bytes/s read and written by a large copy, measured.
        peak_flops, peak_bandwidth: the data sheet's, for half precision; None if the device is not in the table.
    """

    name: str
    device: str
    threads: int
    torch: str
    flops: dict[str, float]
    bandwidth: float
    peak_flops: float | None = None
    peak_bandwidth: float | None = None

    def flop_share(self, flops_per_second: float, dtype: str) -> float:
        """Of the data sheet's rate (MFU) for half precision on a known GPU, else of the measured one."""
        rate = self.peak_flops if self.peak_flops and dtype != "float32" else self.flops[dtype]
        return flops_per_second / rate

    def bandwidth_share(self, bytes_per_second: float) -> float:
        """Of the data sheet's bandwidth on a known GPU, else of the measured one."""
        return bytes_per_second / (self.peak_bandwidth or self.bandwidth)


def measure_machine(device: torch.device, dtypes: list[str], clock: Callable[[], float]) -> Machine:
    """Takes a few seconds."""
    on_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_cuda else _processor_name()
    peak_flops, peak_bandwidth = next((peak for part, peak in DATA_SHEETS.items() if part in name), (None, None))
    return Machine(
        name=name,
        device=str(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        flops={dtype: _matmul_rate(device, getattr(torch, dtype), clock) for dtype in dtypes},
        bandwidth=_copy_rate(device, clock),
        peak_flops=peak_flops,
        peak_bandwidth=peak_bandwidth,
    )


def busy_with() -> str:
    """How busy the machine is with everything that runs on it, where the system tells."""
    if not hasattr(os, "getloadavg"):
        return "unknown"
    return f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best_seconds(work, device: torch.device, clock: Callable[[], float], rounds: int = 10) -> float:
    best = float("inf")
    for _ in range(rounds):
        synchronize(device)
        start = clock()
        work()
        synchronize(device)
        best = min(best, clock() - start)
    return best


def _matmul_rate(device: torch.device, dtype: torch.dtype, clock: Callable[[], float]) -> float:
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    result = torch.empty_like(left)
    return 2 * size**3 / _best_seconds(lambda: torch.mm(left, right, out=result), device, clock)


def _copy_rate(device: torch.device, clock: Callable[[], float]) -> float:
    megabytes = 4096 if device.type == "cuda" else 256
    source = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.numel() / _best_seconds(lambda: target.copy_(source), device, clock)


def _processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
