"""LoRA adapters of a checkpoint as ones for its export.

A packed projection's update is W + B·A with the rows of queries, keys and values one below the other: each of the target's
projections takes its rows of B (and of what else has a number for each row) and the whole A.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from ..families import family_of
from ..hub.json_files import read_object
from ..hub.saving import staged_folder, write_json
from .checkpoint import ORIGINAL
from .roads import moved, road_of
from .weights import normalized, write_tensors

PREFIX = "base_model.model."
KINDS = re.compile(
    r"(?P<module>.+?)\.(?P<kind>lora_[A-Za-z_]+(?:\.(?:weight|bias))?|base_layer\.(?:weight|bias)|weight|bias)"
)
WITHOUT_ROWS = ("lora_A.weight", "lora_embedding_A", "lora_embedding_B")
# What names modules or numbers of rows in a way of its own.
UNKNOWN = ("rank_pattern", "alpha_pattern", "target_parameters", "layer_replication", "trainable_token_indices")
# What an adapter was trained with; a base of the same shapes takes it, and computes something else.
SAME = (
    *("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "num_key_value_heads"),
    *("head_dim", "intermediate_size", "rms_norm_eps", "rope_parameters"),
)
MERGE = "merge it into its model (`merge_and_unload`) and export that"


def export_adapter(adapter: Path, config: Any, target: str, base: Path, output: Path) -> None:
    """Writes a LoRA adapter for the export of its model.

    Args:
        adapter: its folder.
        config: of the original model that it is for.
        target: as in [`export_checkpoint`].
        base: folder of the exported model.

    Raises:
        ValueError: it is no LoRA, adapts what the target does not have, or `base` is not the export of such a model, or
            is that of another generation.
        OSError: a file is missing or damaged, or `output` holds something.
    """
    road = road_of(config, target)
    _check_base(base, target, config, road.config(config))
    settings = read_object(adapter / "adapter_config.json")
    if settings.get("peft_type") != "LORA":
        raise ValueError(
            f"{adapter} is of the type {settings.get('peft_type')!r}, and only LoRA has a form there: {MERGE}"
        )
    if odd := [name for name in UNKNOWN if settings.get(name)]:
        raise ValueError(f"{adapter} has {', '.join(f'`{name}`' for name in odd)}, which has no form there: {MERGE}")
    normed = road.normed(config)
    tensors: dict[str, torch.Tensor] = {}
    adapted: set[str] = set()
    for name, tensor in _read(adapter).items():
        found = KINDS.fullmatch(name.removeprefix(PREFIX))
        module, kind = (found["module"], found["kind"]) if found else (name, "")
        targets = moved(road.modules, module)
        if not kind or targets is None:
            raise ValueError(f"{adapter} holds {name}, which is no part of the model: {MERGE}")
        if module in normed and kind != "weight":
            raise ValueError(f"{adapter} adapts {module}, whose rows are normalized after that (NormHead): {MERGE}")
        if module in normed:
            tensor = normalized([tensor.clone()])
        is_whole = len(targets) == 1 or kind in WITHOUT_ROWS
        parts = (tensor,) * len(targets) if is_whole else road.rows(config, module).split(tensor)
        tensors |= {f"{PREFIX}{to}.{kind}": part.clone() for to, part in zip(targets, parts, strict=True)}
        if kind.startswith("lora_"):
            adapted.update(targets)
    whole = {name for module in settings.get("modules_to_save") or () for name in _by_last_name(road.modules, module)}
    settings |= {
        "base_model_name_or_path": str(base),
        "target_modules": sorted(adapted),
        "modules_to_save": sorted(whole) or None,
        **dict.fromkeys(("auto_mapping", "exclude_modules", "layers_pattern", "layers_to_transform")),
    }
    with staged_folder(output) as staged:
        write_tensors(staged / "adapter_model.safetensors", tensors)
        write_json(staged / "adapter_config.json", settings)


def _check_base(base: Path, target: str, config: Any, expected: Any) -> None:
    found = AutoConfig.from_pretrained(base) if (base / "config.json").is_file() else None
    others = [
        f"another `{name}`" for name in SAME if not _holds(getattr(found, name, None), getattr(expected, name, None))
    ]
    family, original = family_of(config), base / ORIGINAL
    if not others and family and (original / "config.json").is_file():
        line, of_base = (family.line_of(one) for one in (config, AutoConfig.from_pretrained(original)))
        # ChatGLM2 and ChatGLM3 have the same configuration, and a name on the Hub need not say which it is.
        if line != of_base and (Path(config.name_or_path).is_dir() or line in config.name_or_path.lower()):
            others = [f"{of_base}, not {line}"]
    if others:
        why = "no checkpoint" if found is None else ", ".join(others)
        raise ValueError(
            f"{base} is not the export of the model that the adapter is for ({why}): `hf-cnllm export MODEL {base} --to {target}`"
        )


def _holds(found: Any, expected: Any) -> bool:
    """Of a dictionary, whether it has these entries: readers of `rope_parameters` add the older names."""
    return found | expected == found if isinstance(found, dict) and isinstance(expected, dict) else found == expected


def _read(adapter: Path) -> dict[str, torch.Tensor]:
    if (adapter / "adapter_model.safetensors").is_file():
        return load_file(adapter / "adapter_model.safetensors")
    if (adapter / "adapter_model.bin").is_file():
        return dict(torch.load(adapter / "adapter_model.bin", map_location="cpu", weights_only=True))
    raise FileNotFoundError(f"{adapter} holds no adapter_model.safetensors")


def _by_last_name(modules: Any, name: str) -> list[str]:
    return [to.rpartition(".")[2] for module, names in modules.items() if module.endswith(name) for to in names]
