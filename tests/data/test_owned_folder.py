"""An output folder that one run owns: who is kept out, and what a full disk says."""

import errno
import os

import pytest
from safetensors import SafetensorError

from hf_cnllm.data.owned_folder import exclusive, owned_folder


@pytest.mark.parametrize(
    "error",
    [
        *(OSError(number, os.strerror(number)) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),
    ],
    ids=["disk", "quota", "largest file", "safetensors", "tokenizers"],
)
def test_a_full_disk_is_named_with_what_to_do(error, tmp_path):
    with (
        pytest.raises(
            OSError, match=r"into .*out failed, is the disk full\? .* Make room and give the same command again"
        ),
        owned_folder(tmp_path / "out", {}),
    ):
        raise error


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "no such file"), ValueError("no")], ids=["file", "value"])
def test_other_errors_stay_what_they_are(error, tmp_path):
    with pytest.raises(type(error)) as raised, owned_folder(tmp_path / "out", {}):
        raise error
    assert raised.value is error


def test_a_folder_in_use_is_refused_and_then_free(tmp_path):
    with exclusive(tmp_path):
        with pytest.raises(ValueError, match="is in use by another run"), exclusive(tmp_path):
            pass
        with pytest.raises(FileExistsError), owned_folder(tmp_path / ".lock", {}):
            pass
    with owned_folder(tmp_path, {"seed": 0}):
        pass
    with pytest.raises(ValueError, match="with other seed"), owned_folder(tmp_path, {"seed": 1}):
        pass
