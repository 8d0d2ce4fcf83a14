"""An output folder that appears whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SUMMARY_FILE = "summary.json"  # written last; it marks a folder as one of ours


def check_output(output: Path, overwrite: bool) -> None:
    """Say before any work starts whether `output` may be written.

    Raises:
        FileExistsError: it is a file, or a folder with something in it that must not be replaced.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise FileExistsError(f"--output {output} exists and is not a folder; choose another name")
    if not output.exists() or not any(output.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"--output {output} is not empty; choose another folder or add --overwrite")
    if not (output / SUMMARY_FILE).is_file():
        raise FileExistsError(
            f"--output {output} holds no {SUMMARY_FILE}, so no earlier run wrote it; it is not replaced"
        )


@contextmanager
def staged_folder(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `output` that takes its place on success and is removed otherwise."""
    check_output(output, overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        staged = Path(scratch) / "new"
        staged.mkdir()
        yield staged
        check_output(output, overwrite)
        old = Path(scratch) / "old"
        if output.exists():
            output.rename(old)
        try:
            staged.rename(output)
        except OSError:
            if old.exists():
                old.rename(output)
            raise
