"""`hf-cnllm verify PATH`: whether a checkpoint's files are whole, of one save, and what its configuration says."""

import argparse
from pathlib import Path

from ..hub.places import find_folder, is_adapter_alone
from . import bar_of_bytes
from .checkpoint import read_checkpoint


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "path", metavar="PATH", help="folder of a checkpoint or of an adapter, or a name in the Hub's cache"
    )
    parser.add_argument(
        "--checksums", metavar="FILE", type=Path, help="SHA-256 of the files, as sha256sum writes them; "
        "without it, those that the Hub's client noted when it downloaded"
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Print what was found; 1 if something does not hold."""
    from ..hub.verification import read_sums, verify

    folder = find_folder(args.path)
    config = None if is_adapter_alone(str(folder)) else read_checkpoint(str(folder)).config
    sums = None if args.checksums is None else read_sums(args.checksums)
    total_problems = 0
    with bar_of_bytes("read") as bar:
        for finding in verify(folder, config, sums, bar.update):
            total_problems += len(finding.problems)
            state = "FAIL" if finding.problems else "ok"
            said = "; ".join([*finding.notes, *finding.problems] if finding.problems else finding.notes)
            rows = [f"{state:<5} {finding.what:<18} {said}".rstrip()]
            rows += [f"note  {finding.what:<18} {hint}" for hint in finding.hints]
            bar.write("\n".join(rows))
    print(f"{folder}: {f'{total_problems} problems' if total_problems else 'no problem found'}")
    return 1 if total_problems else 0
