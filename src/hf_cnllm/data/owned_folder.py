"""An output folder that belongs to one run, which the same command goes on with."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..hub.saving import FullDiskError, failed_write, write_json

LOCK_FILE, RUN_FILE = ".lock", "run.json"


@contextmanager
def full_disk_named(output: Path) -> Iterator[None]:
    """Says where the disk is full, and that the same command can be given again."""
    try:
        yield
    except Exception as error:
        if (cause := failed_write(error)) is None:
            raise
        raise FullDiskError(output, cause) from error


@contextmanager
def exclusive(output: Path) -> Iterator[None]:
    """Keeps other runs out of a folder that is there.

    Raises:
        ValueError: one is in it.
    """
    try:
        lock = FileLock(output / LOCK_FILE).acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"--output {output} is in use by another run") from error
    with lock:
        yield


def _read_record(path: Path) -> dict[str, Any]:
    try:
        before = json.loads(path.read_bytes())
    except ValueError:
        before = None
    if not isinstance(before, dict):
        raise ValueError(f"{path} is damaged, and with it what run the folder is of: choose a new folder")
    return before


@contextmanager
def owned_folder(output: Path, identity: Mapping[str, Any]) -> Iterator[None]:
    """Takes the folder for a run, and keeps others out while it lasts.

    Args:
        identity: what must be the same for a run to be gone on with, as JSON has it; kept in `run.json`.

    Raises:
        FileExistsError: the folder is a file, or has something else in it.
        ValueError: it is another run's, or in use.
        OSError: the disk was full.
    """
    record = output / RUN_FILE
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"--output {output} exists and is not a folder")
    ours = {LOCK_FILE, f".{RUN_FILE}.partial"}
    if not record.exists() and output.exists() and {path.name for path in output.iterdir()} - ours:
        raise FileExistsError(
            f"--output {output} is not empty, and no run of this program began there: choose a new folder"
        )
    output.mkdir(parents=True, exist_ok=True)
    with full_disk_named(output), exclusive(output):
        if record.exists():
            before = _read_record(record)
            changed = [name for name in sorted(identity) if before.get(name) != identity[name]]
            if changed:
                raise ValueError(
                    f"--output {output} is the folder of a run with other {', '.join(changed)}: choose a new folder"
                )
        else:
            write_json(record, identity)
        yield
