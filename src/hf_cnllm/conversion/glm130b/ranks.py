"""Model-parallel checkpoints of SwissArmyTransformer: a folder with `latest`, which names one of its folders, in which each
rank has a file `mp_rank_XX_model_states.pt` with its part of the state dict under "module".

Nothing of a file is run, and of its tensors only those that are asked for are read.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

RANK_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
LATEST, SETTINGS = "latest", "model_config.json"
# After so many bytes, of all ranks together, files are opened anew: until they are closed, what was read of them counts as
# this process' memory.
READ_AT_ONCE = 3 * 2**27


def find_ranks(shards: Path) -> list[Path]:
    """The files of the ranks of the one checkpoint in a folder, in order.

    Raises:
        FileNotFoundError: there is none, or a rank is missing.
        ValueError: there are several, or `latest` names none.
    """
    if not shards.is_dir():
        raise FileNotFoundError(f"{shards} is not a folder")
    folders = [shards, *sorted(path for path in shards.iterdir() if path.is_dir())]
    holders = [folder for folder in folders if any(RANK_FILE.fullmatch(file.name) for file in folder.iterdir())]
    if not holders:
        raise FileNotFoundError(f"{shards} holds no mp_rank_XX_model_states.pt, nor does a folder in it")
    if len(holders) > 1:
        names = " and ".join("itself" if folder == shards else folder.name for folder in holders)
        raise ValueError(f"{shards} holds several checkpoints, in {names}: name the folder of the one to convert")
    (folder,) = holders
    latest = shards / LATEST
    if folder != shards and latest.is_file() and (named := latest.read_text(errors="replace").strip()) != folder.name:
        raise ValueError(
            f"{latest} names {named!r}, but the files are in {folder.name}: download the checkpoint again"
        )
    files: dict[int, Path] = {}
    for file in sorted(folder.iterdir()):
        if match := RANK_FILE.fullmatch(file.name):
            if (rank := int(match[1])) in files:
                raise ValueError(f"{folder} holds rank {rank} twice, {files[rank].name} and {file.name}")
            files[rank] = file
    if missing := sorted(set(range(max(files) + 1)) - files.keys()):
        raise FileNotFoundError(
            f"{folder} has ranks up to {max(files)}, but mp_rank_{missing[0]:02}_model_states.pt is missing"
        )
    return [files[rank] for rank in sorted(files)]


def find_settings(file: Path, shards: Path) -> dict[str, Any]:
    """The keys of `model_config.json`, beside the ranks or in one of the two folders above; none if it is not there."""
    for folder in (file.parent, shards, shards.parent):
        if (path := folder / SETTINGS).is_file():
            try:
                settings = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} is damaged: {error}") from error
            if isinstance(settings, dict) and settings.get("model_class") == "GLM130B":
                return settings
    return {}


class Rank:
    """One rank's file.

    Args:
        count: how many ranks there are.

    Attributes:
        tensors: name -> the tensor without its values, on the device "meta".
    """

    def __init__(self, path: Path, count: int):
        self.path, self.budget = path, READ_AT_ONCE // count
        self.tensors = {name: tensor.to("meta") for name, tensor in self._open().items()}
        self._opened: dict[str, torch.Tensor] = {}
        self._read = 0

    def read(self, name: str) -> torch.Tensor:
        """A tensor as it lies in the file; use it and let it go."""
        if not self._opened:
            self._opened, self._read = self._open(), 0
        tensor = self._opened[name]
        self._read += tensor.nbytes
        if self._read > self.budget:
            self._opened = {}
        return tensor

    def _open(self) -> dict[str, torch.Tensor]:
        if not zipfile.is_zipfile(self.path):
            raise ValueError(f"{self.path} is cut or damaged, or not a file of torch.save: download it again")
        try:
            content: Any = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{self.path} holds more than tensors, and nothing of it was run: it is no state dict"
            ) from error
        except (RuntimeError, ValueError, KeyError, EOFError, OSError) as error:
            raise ValueError(f"{self.path} is cut or damaged ({' '.join(str(error).split())[:200]})") from error
        tensors = content.get("module") if isinstance(content, Mapping) else None
        if not isinstance(tensors, Mapping) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
            raise ValueError(f"{self.path} holds no state dict under 'module'")
        return dict(tensors)
