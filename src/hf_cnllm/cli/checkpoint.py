"""What a command was given: a folder or a name on the Hub, of a checkpoint or of an adapter. Reads configurations only."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import AutoConfig, PreTrainedConfig

from ..families import FAMILIES, Family, family_of
from ..hub.json_files import read_object
from ..hub.places import ADAPTER_CONFIG, folder_of, is_path, read_config


class Elsewhere(NamedTuple):
    """Checkpoints that look like a family's of this package and are not."""

    applies: Callable[[Mapping[str, Any]], bool]  # to the keys of config.json
    title: str
    served_by: str


OWN_CODE = "their own code, on the release of transformers that it was written for"
ELSEWHERE = (
    Elsewhere(
        lambda c: c.get("model_type") == "chatglm" and c.get("padded_vocab_size") == 151552,
        "GLM-4-9B in its first layout",
        "its converted checkpoints, whose names end in -hf: transformers' GlmForCausalLM loads them",
    ),
    Elsewhere(lambda c: c.get("model_type") == "chatglm" and "image_size" in c, "VisualGLM-6B", OWN_CODE),
    Elsewhere(lambda c: c.get("model_type") == "qwen" and "visual" in c, "Qwen-VL", OWN_CODE),
    Elsewhere(lambda c: c.get("model_type") == "qwen" and "audio" in c, "Qwen-Audio", OWN_CODE),
    Elsewhere(lambda c: c.get("model_type") == "baichuan_m1", "Baichuan-M1", OWN_CODE),
)


class Checkpoint(NamedTuple):
    """A checkpoint of a family of this package, or an adapter for one."""

    name: str  # as the user gave it
    folder: Path | None  # None if it is on the Hub
    config: PreTrainedConfig
    family: Family
    adapter: str | None = None  # folder or name of the adapter; the rest is then of its base model

    @property
    def architecture(self) -> str:
        return self.family.architecture_of(self.config)


class NotOurs(ValueError):
    """A checkpoint that this package does not serve; the message says who does."""


def read_checkpoint(name: str) -> Checkpoint:
    """Finds a checkpoint and reads its configuration, for an adapter that of its base model.

    Raises:
        NotOurs: it is of no family of this package.
        ValueError: its configuration is damaged or contradicts itself.
        OSError: there is no such folder, or it holds no checkpoint; or the name is not to be had from the Hub.
    """
    folder = folder_of(name)
    if folder is not None and not (folder / "config.json").is_file() and (folder / ADAPTER_CONFIG).is_file():
        return read_checkpoint(base_of_adapter(folder))._replace(adapter=str(folder))
    values = read_config(name, folder)
    if other := next((other for other in ELSEWHERE if other.applies(values)), None):
        raise NotOurs(f"{other.title}: not of this package, served by {other.served_by}")
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        families = ", ".join(family.config.model_type for family in FAMILIES)
        raise ValueError(
            f"{name} has the model_type {model_type!r}, which is neither one of this package ({families}) nor one of "
            f"transformers {transformers.__version__}"
        )
    config = AutoConfig.from_pretrained(folder or name)
    if (family := family_of(config)) is None:
        raise NotOurs(f"{model_type}: not of this package, served by {type(config).__name__} of transformers")
    return Checkpoint(name, folder, config, family)


def base_of_adapter(folder: Path) -> str:
    """The checkpoint that an adapter's folder is for.

    Raises:
        ValueError: it does not say, or names a folder that there is not.
    """
    file = folder / ADAPTER_CONFIG
    base = read_object(file).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{file} does not say what the adapter is for (`base_model_name_or_path`). {_NAME_IT}")
    if is_path(base) and not Path(base).is_dir():
        raise ValueError(f"{file} says that the adapter is for {base}, and there is no such folder. {_NAME_IT}")
    return base


_NAME_IT = "Give the checkpoint and, with --adapter, the adapter; or correct the file."
