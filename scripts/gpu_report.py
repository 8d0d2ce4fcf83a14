"""All that wants a GPU, in one call within ten minutes: its tests, and the figures of docs/performance.md.

    python scripts/gpu_report.py --output FOLDER            # FOLDER/report.md, and a log a section
    python scripts/gpu_report.py --output FOLDER --quick    # every section on a shape that takes seconds, on any device

A section that fails, or is not done when its time is up, says so in the report; the others go on, and the exit code is 1.
"""

import argparse
import importlib.util
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
BUSY_CPU = 600  # seconds for a section that takes a few, on a machine with other work
LAYERS = "--hidden-size 64 --layers 1 --heads 4 --ffn-size 96 --vocab-size 256 --rounds 1"


@dataclass(frozen=True)
class Section:
    """One command of the repository.

    Args:
        full, quick: its options, for the report and to see that it runs.
        seconds: what it may take of the ten minutes.
    """

    title: str
    command: str
    full: str
    quick: str
    seconds: int

    def words(self, device: str, backends: str, quick: bool) -> list[str]:
        options = (self.quick if quick else self.full).format(device=device, backends=backends)
        return [sys.executable, *self.command.split(), *options.split()]


SECTIONS = (
    Section("Tests", "-m pytest -q -p no:cacheprovider tests/attention tests/models/chatglm",
            "-m gpu", "-m gpu --collect-only", 150),
    Section("Models beside Llama: MFU of prefill, share of bandwidth in decoding, memory", "scripts/benchmark",
            "--device {device} --dtypes bfloat16 --backends {backends} --tasks prefill memory decode --lengths 2048 8192",
            "--device {device} --dtypes float32 --tasks prefill decode --lengths 32 --new-tokens 2 --prompt 8 " + LAYERS, 200),
    Section("A training step beside Llama's", "scripts/benchmark",
            "--device {device} --dtypes bfloat16 --backends sdpa --tasks train --layers 4 --rounds 3",
            "--device {device} --tasks train --train-tokens 32 --train-vocab 512 " + LAYERS, 70),
    Section("ALiBi beside plain causal attention", "scripts/benchmark_alibi.py",
            "--device {device} --heads 40 --dtype bfloat16 --lengths 2048 8192 16384",
            "--device {device} --heads 4 --head-dim 16 --lengths 64 128 --rounds 1", 50),
    Section("Prefix-LM in two calls beside a dense mask", "scripts/benchmark_prefix_lm.py",
            "--device {device} --heads 32 --head-dim 128 --dtype bfloat16 --lengths 2048 8192 --prefix 0.25 0.75",
            "--device {device} --heads 2 --head-dim 16 --lengths 64 --prefix 0.5 --rounds 1", 60),
    Section("Error of folded ALiBi", "scripts/alibi_precision.py",
            "--device {device} --heads 40 --lengths 4096 32768",
            "--device {device} --heads 4 --lengths 64 --head-dim 16 --rows 8", 30),
    Section("INT8 and INT4 linear layers", "scripts/benchmark_int4.py",
            "--device {device} --dtype bfloat16",
            "--device {device} --in-features 64 --out-features 96 --tokens 1 --rounds 1", 30),
)  # fmt: skip


def run(section: Section, words: list[str], seconds: int, log: Path) -> tuple[str, str]:
    """How the section ended, and what it printed."""
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        try:
            done = subprocess.run(words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=seconds)
            ended = "done" if done.returncode == 0 else f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"not done in {seconds} s"
    print(f"{section.title}: {ended}, {time.monotonic() - started:.0f} s", flush=True)
    return ended, log.read_text(encoding="utf-8", errors="replace")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="new or empty folder")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes, to see that all of it runs")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.quick:
        parser.error("this machine has no CUDA device; --quick shows that the sections run")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        parser.error(f"--output {args.output} is not empty; choose a new folder")
    args.output.mkdir(parents=True, exist_ok=True)
    backends = "sdpa flash_attention_2" if importlib.util.find_spec("flash_attn") else "sdpa"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    report, failed = [f"# {name}, torch {torch.__version__}, {backends}", ""], 0
    for number, section in enumerate(SECTIONS, 1):
        words = section.words(device, backends, args.quick)
        seconds = BUSY_CPU if args.quick else section.seconds
        ended, printed = run(section, words, seconds, args.output / f"{number}.log")
        failed += ended != "done"
        lines = [line for line in printed.splitlines() if "|" in line or not line.startswith(" ")][-80:]
        shown = " ".join(words[1:])
        report += [f"## {section.title}", "", f"`python {shown}`: {ended}", "", "```", *lines, "```", ""]
        (args.output / "report.md").write_text("\n".join(report), encoding="utf-8")
    print(f"Wrote {args.output / 'report.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
