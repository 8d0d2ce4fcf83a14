"""Folders that appear whole or not at all, in one process and in several."""

import errno
import os
import signal

import pytest
import torch.multiprocessing as processes
from torch import distributed

from hf_cnllm.hub.saving import IN_USE, check_new_folder, staged_folder


def write(folder, text):
    (folder / "weights").mkdir()
    (folder / "weights" / "file").write_text(text)


def test_the_folder_appears_at_the_end_and_alone(tmp_path):
    output = tmp_path / "runs" / "out"
    with staged_folder(output) as folder:
        write(folder, "new")
        assert not output.exists()
    assert (output / "weights" / "file").read_text() == "new"
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "out") as folder:
        write(folder, "new")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_with_what_to_do(tmp_path):
    with (
        pytest.raises(
            OSError, match=r"writing into .*out failed, is the disk full\? .* Make room and give the same command"
        ),
        staged_folder(tmp_path / "out"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_when_the_check_lets_it(tmp_path):
    output = tmp_path / "out"
    with staged_folder(output) as folder:
        write(folder, "old")
    with pytest.raises(FileExistsError, match="not empty; choose a new folder"), staged_folder(output) as folder:
        write(folder, "new")
    assert (output / "weights" / "file").read_text() == "old"
    with staged_folder(output, check=lambda output: None) as folder:
        write(folder, "new")
    assert (output / "weights" / "file").read_text() == "new"


def test_files_links_and_full_folders_are_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(FileExistsError, match="is not a folder"):
            check_new_folder(tmp_path / name)
    with pytest.raises(FileExistsError, match="is not empty; leave"):
        check_new_folder(tmp_path, "leave")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_process_leaves_the_older_folder(tmp_path):
    output = tmp_path / "out"
    with staged_folder(output) as folder:
        write(folder, "old")
    child = os.fork()
    if child == 0:
        try:
            with staged_folder(output, check=lambda output: None) as folder:
                write(folder, "new")
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert (output / "weights" / "file").read_text() == "old"
    (left,) = tmp_path.glob(".out-*")

    # The next one removes what was left, but neither what is in use, nor an older folder without its successor, nor others'.
    (tmp_path / ".out-of-users").mkdir()
    with staged_folder(output, check=lambda output: None) as in_use:
        assert not left.exists()
        with staged_folder(output, check=lambda output: None) as folder:
            assert in_use.exists()
            write(folder, "new")
        write(in_use, "newer")
    rescued = tmp_path / ".out-12345678" / "old"
    rescued.parent.mkdir()
    (rescued.parent / IN_USE).touch()
    output.rename(rescued)
    with staged_folder(output) as folder:
        write(folder, "newest")
    assert (rescued / "weights" / "file").read_text() == "newer" and (tmp_path / ".out-of-users").exists()


def _save(rank: int, output, port_file):
    distributed.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=2)
    with staged_folder(output) as folder:
        (folder / str(rank)).write_text(str(folder))
    distributed.destroy_process_group()


def test_all_processes_write_into_the_same_folder(tmp_path):
    output = tmp_path / "out"
    processes.spawn(_save, args=(output, tmp_path / "group"), nprocs=2)
    assert {path.name for path in output.iterdir()} == {"0", "1"}
    assert (output / "0").read_text() == (output / "1").read_text()
