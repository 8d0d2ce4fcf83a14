"""`hf-cnllm info PATH`: what the package decides about a checkpoint. Reads its config.json and nothing else."""

import argparse
from collections.abc import Callable
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("path", metavar="PATH", help="folder of a checkpoint, or its name on the Hub")


def run(args: argparse.Namespace) -> int:
    """Print one decision a line."""
    from transformers import AutoConfig

    rows = describe(AutoConfig.from_pretrained(args.path))
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))
    return 0


def describe(config: Any) -> dict[str, str]:
    """What was decided about a checkpoint, name and value, from its loaded configuration."""
    if not type(config).__module__.startswith("hf_cnllm."):
        return {
            "family": f"{config.model_type}: not of this package, served by {type(config).__name__} of transformers"
        }
    return {
        "family": family_of(config),
        **{name: str(tell(config)) for name, tell in _DECISIONS[config.model_type].items()},
    }


def family_of(config: Any) -> str:
    """The family as the model cards and the demo name it: `baichuan2`, `qwen`, `chatglm3` …

    ChatGLM2 and ChatGLM3 share their architecture; the name the checkpoint was loaded from tells them apart, and
    `chatglm2` is the answer if it does not.
    """
    if config.model_type == "baichuan":
        return "baichuan2" if config.norm_head else "baichuan"
    if config.model_type == "chatglm" and config.architecture == "chatglm2":
        return "chatglm3" if "chatglm3" in config.name_or_path.lower() else "chatglm2"
    return config.model_type


def _trained_length(config: Any) -> str:
    return f"{config.max_position_embeddings} tokens"


def _vocabulary(config: Any) -> str:
    return f"{config.vocab_size} tokens"


def _control_tokens(config: Any) -> str:
    fields = ("mask_token_id", "smask_token_id", "gmask_token_id", "sop_token_id", "eop_token_id")
    unknown = [field for field in fields if getattr(config, field) is None]
    return f"unknown: set {', '.join(unknown)}" if unknown else "known"


def _quantisation(config: Any) -> str:
    return f"{config.quantization_bit}-bit weights" if config.quantization_bit else "none"


def _prefix(config: Any) -> str:
    if not config.pre_seq_len:
        return "none"
    return (
        f"{config.pre_seq_len} positions, {'projected by an MLP' if config.prefix_projection else 'learned directly'}"
    )


def _rope_ratio(config: Any) -> str:
    if config.architecture == "chatglm":
        return "not used by this architecture"
    effect = {"base": "multiplies the rotary base", "linear": "divides the positions"}[config.rope_ratio_type]
    return f"{config.rope_ratio} ({effect}; set rope_ratio_type to change that)"


Decisions = dict[str, Callable[[Any], Any]]

_DECISIONS: dict[str, Decisions] = {
    "baichuan": {
        "positions": lambda c: {"rope": "RoPE", "alibi": "ALiBi"}[c.position_embedding],
        "output head": lambda c: "NormHead" if c.norm_head else "linear",
        "trained length": lambda c: f"{c.max_position_embeddings or c.model_max_length} tokens",
        "max-z loss weight": lambda c: c.z_loss_weight,
        "vocabulary": _vocabulary,
    },
    "chatglm": {
        "architecture": lambda c: {
            "chatglm": "prefix language model, 2-D rotary positions (ChatGLM-6B)",
            "chatglm2": "causal, multi-query, partial rotary positions (ChatGLM2, ChatGLM3)",
        }[c.architecture],
        "rope_ratio": _rope_ratio,
        "trained length": _trained_length,
        "key/value heads": lambda c: f"{c.num_key_value_heads} of {c.num_attention_heads}",
        "P-tuning v2 prefix": _prefix,
        "quantisation": _quantisation,
        "vocabulary": _vocabulary,
    },
    "glm": {
        "positions": lambda c: "learned, with block positions" if c.block_position_encoding else "learned",
        "trained length": _trained_length,
        "control tokens": _control_tokens,
        "vocabulary": _vocabulary,
    },
    "qwen": {
        "trained length": lambda c: f"{c.seq_length or c.max_position_embeddings} tokens",
        "dynamic NTK": lambda c: "on" if c.use_dynamic_ntk else "off",
        "LogN": lambda c: "on" if c.use_logn_attn else "off",
        "windows": lambda c: "by layer" if c.window_sizes else "none",
        "vocabulary": _vocabulary,
    },
}
