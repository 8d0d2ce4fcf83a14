"""Folders and files that appear whole or not at all: what is saved over an older checkpoint never mixes with it."""

import errno
import glob
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import distributed

UNFINISHED = ".unfinished"  # what the older index is called while a save goes on
IN_USE, SUFFIX = ".in_use", re.compile(r"[a-z0-9_]{8}")  # in a folder of tempfile's, and at the end of its name


class FullDiskError(OSError):
    """A write failed for want of room, as far as its error tells; `cause` is what that says.

    Args:
        advice: what to do when there is room, where that is not to begin again.
    """

    def __init__(self, output: Path, cause: str, advice: str | None = None) -> None:
        advice = advice or "give the same command again"
        super().__init__(f"writing into {output} failed, is the disk full? ({cause}) Make room and {advice}")
        self.cause = cause


def check_new_folder(output: Path, advice: str = "choose a new folder") -> None:
    """Says before any work starts whether `output` may be written.

    Raises:
        FileExistsError: it is a file, or a folder with something in it.
    """
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise FileExistsError(f"{output} exists and is not a folder; choose another name")
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty; {advice}")


@contextmanager
def staged_folder(output: Path, check: Callable[[Path], None] = check_new_folder) -> Iterator[Path]:
    """Gives an empty folder beside `output`, the same to all processes of a distributed run, that takes its place on success,
    with all it holds on the disk, and is removed otherwise. A process that is killed leaves `output` as it was, and a hidden folder
    beside it, which the next call removes.

    Args:
        check: raises if `output` must not be replaced; called at the end, before it is.

    Raises:
        OSError: something could not be written.
    """
    if not is_first_process():
        yield Path(_of_first_process(""))
        wait_for_others()
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(output)
    with (
        tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch,
        FileLock(Path(scratch) / IN_USE),
    ):
        staged, old = Path(scratch) / "new", Path(scratch) / "old"
        staged.mkdir()
        _of_first_process(str(staged))
        try:
            yield staged
        except Exception as error:
            if (cause := failed_write(error)) is None:
                raise
            raise FullDiskError(output, cause) from error
        wait_for_others()
        write_through(staged)
        check(output)
        if output.exists():
            output.rename(old)
        try:
            staged.rename(output)
        except OSError:
            if old.exists():
                old.rename(output)
            raise
        _write_through(output.parent)


@contextmanager
def index_taken_away(index: Path) -> Iterator[None]:
    """While weights are saved over an older checkpoint: renames its index, if there is one, and removes it at the end. If no
    weights were written, it comes back."""

    def weights() -> list[tuple[str, int, int]]:
        states = ((file.name, file.stat()) for file in index.parent.glob("*.safetensors"))
        return sorted((name, state.st_mtime_ns, state.st_size) for name, state in states)

    aside = Path(f"{index}{UNFINISHED}")
    before = None
    if index.is_file():
        before = weights()
        index.replace(aside)
    done = False
    try:
        yield
        done = True
    finally:
        if before is not None and not index.exists() and weights() == before:
            aside.replace(index)
        elif done:
            aside.unlink(missing_ok=True)


def check_saved(folder: Path) -> None:
    """Refuses a folder that a killed save has left without an index.

    Raises:
        OSError: naming the folder.
    """
    for aside in folder.glob(f"*{UNFINISHED}"):
        weights = (folder / name for name in (aside.name.removesuffix(UNFINISHED), "model.safetensors"))
        if not any(file.exists() for file in weights):
            raise OSError(
                f"A save into {folder} was interrupted: its shards are some of the older and some of the newer checkpoint. "
                "Save again, or take another copy."
            )


def _remove_abandoned(output: Path) -> None:
    """Removes what killed processes left beside `output`: the folders whose lock nobody holds, unless the older contents of an
    `output` that is gone are in them."""
    prefix = f".{output.name}-"
    for scratch in output.parent.glob(glob.escape(prefix) + "*"):
        is_ours = SUFFIX.fullmatch(scratch.name.removeprefix(prefix)) and (scratch / IN_USE).is_file()
        if is_ours and (output.exists() or not (scratch / "old").exists()):
            with suppress(Timeout), FileLock(scratch / IN_USE, timeout=0):
                shutil.rmtree(scratch, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all: what was there before stays until then."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any, **options: Any) -> None:
    """Writes a JSON file whole, as people read it; `options` are of `json.dumps`."""
    write_whole(path, json.dumps(content, ensure_ascii=False, indent=2, **options) + "\n")


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Writes a file of JSON lines whole; half a surrogate pair, which has no form in UTF-8, becomes a question mark."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_whole(path, text.encode("utf-8", "replace").decode())


def failed_write(error: BaseException) -> str | None:
    """What a write failed of, if that is what this error says: of libraries, each has its own."""
    if isinstance(error, FullDiskError):
        return error.cause
    text = str(error)
    is_write = (
        getattr(error, "errno", None) in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        or (isinstance(error, SafetensorError) and text.startswith("Error while serializing"))
        or (type(error) is Exception and "(os error " in text)  # tokenizers
        or ("inline_container" in text and "Reader" not in text)  # torch.save
    )
    return text if is_write else None


def write_through(folder: Path) -> None:
    """Has the operating system put a folder and all in it on the disk."""
    for parent, _, files in os.walk(folder):
        for path in (*(Path(parent, file) for file in files), Path(parent)):
            _write_through(path)


def _write_through(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_first_process() -> bool:
    """Whether this process is the one of a distributed run that writes; always, in one that is not distributed."""
    return not _in_group() or distributed.get_rank() == 0


def _in_group() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _of_first_process(text: str) -> str:
    box = [text]
    if _in_group():
        distributed.broadcast_object_list(box)
    return box[0]


def wait_for_others() -> None:
    if _in_group():
        distributed.barrier()
