"""Where a checkpoint is that somebody named: in a folder, in the cache of the Hub's files, or on the Hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from transformers import PreTrainedConfig

from .json_files import read_object

ADAPTER_CONFIG = "adapter_config.json"
CONFIGS = ("config.json", ADAPTER_CONFIG)
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def check_is_checkpoint(name: str, option: str, tokenizer_alone: bool = False) -> None:
    """That a recipe's `option` names a checkpoint, or, `tokenizer_alone`, a folder or what may be a name on the Hub.

    Raises:
        FileNotFoundError: it does not, with the option and what is there instead.
        ValueError: its config.json is damaged.
    """
    try:
        folder = folder_of(name)
        if not tokenizer_alone and (folder is None or not (folder / ADAPTER_CONFIG).is_file()):
            read_config(name, folder)
    except OSError as error:
        raise FileNotFoundError(f"{option}: {error}") from error


def is_adapter_alone(name: str) -> bool:
    """Whether it is a folder of an adapter without a model."""
    folder = Path(name).expanduser()
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def refuse_classifier(name: str, option: str) -> None:
    """Raises ValueError for a checkpoint whose head is a classifier's: as a language model it would have a random one."""
    kinds = read_config(name, folder_of(name)).get("architectures") or []
    if found := next((kind for kind in kinds if str(kind).endswith(CLASSIFIERS)), None):
        raise ValueError(f"{option}: {name} is a {found}, as reward models are, and no language model: give one")


def find_folder(name: str) -> Path:
    """The folder of that name, or the snapshot of that name in the cache of the Hub's files; nothing is downloaded.

    Raises:
        OSError: there is neither.
    """
    if (folder := folder_of(name)) is not None:
        return folder
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"there is no folder {name}, and a checkpoint of that name is not in the cache of the Hub's files"
        ) from error


def folder_of(name: str) -> Path | None:
    """The folder that a name is; None if it may be one on the Hub.

    Raises:
        OSError: it is a file, or a path that leads nowhere.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{name} is a file: give the folder of the checkpoint")
    if is_path(name):
        raise FileNotFoundError(f"there is no folder {name}")
    return None


def is_path(name: str) -> bool:
    """Whether it can be no name on the Hub, which is `name` or `owner/name`."""
    return name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or "\\" in name


def read_config(name: str, folder: Path | None) -> Mapping[str, Any]:
    """The keys of config.json, in the folder or on the Hub.

    Raises:
        ValueError: it is damaged.
        OSError: the folder holds none, or the name is not to be had from the Hub.
    """
    if folder is not None:
        if not (folder / "config.json").is_file():
            inside = sorted(str(file.parent) for file in folder.glob("*/*config.json") if file.name in CONFIGS)
            hint = f"; these are: {', '.join(dict.fromkeys(inside))}" if inside else ""
            raise FileNotFoundError(f"{name} is no checkpoint: it has neither {' nor '.join(CONFIGS)}{hint}")
        return read_object(folder / "config.json")
    try:
        return PreTrainedConfig.get_config_dict(name)[0]
    except OSError as error:
        if constants.HF_HUB_OFFLINE:
            why = "is not in the cache of the Hub's files; HF_HUB_OFFLINE is set, so that it cannot be downloaded"
        else:
            why = f"could not be had from the Hub ({' '.join(str(error).split())[:300]})"
        raise FileNotFoundError(f"there is no folder {name}, and a checkpoint of that name {why}") from error
