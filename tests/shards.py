"""Model-parallel shards of GLM-130B, as SwissArmyTransformer writes them, made of a whole state dict."""

import json
from pathlib import Path

import torch

ITERATION = "49300"


def split(name: str, tensor: torch.Tensor, rank: int, count: int) -> torch.Tensor:
    """One rank's part, by the original's rules."""
    if name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
        return tensor.chunk(count, dim=1)[rank].clone()
    if ".dense_h_to_4h." in name:
        return torch.cat([half.chunk(count)[rank] for half in tensor.chunk(2)])
    if "word_embeddings" in name or "query_key_value" in name:
        return tensor.chunk(count)[rank].clone()
    return tensor.clone()


def write_shards(folder: Path, state: dict[str, torch.Tensor], count: int, head_dim: int, **settings) -> Path:
    """Writes `latest` and the ranks, and `model_config.json` if there are settings."""
    (folder / ITERATION).mkdir(parents=True)
    (folder / "latest").write_text(ITERATION)
    if settings:
        (folder / "model_config.json").write_text(json.dumps({"model_class": "GLM130B"} | settings))
    layers = sorted({name.rpartition(".attention.dense")[0] for name in state if ".attention.dense.weight" in name})
    for rank in range(count):
        part = {name: split(name, tensor, rank, count) for name, tensor in state.items() if name != "lm_head.weight"}
        part |= {f"{layer}.attention.rotary_emb.inv_freq": torch.ones(head_dim // 2).half() for layer in layers}
        torch.save({"module": part}, folder / ITERATION / f"mp_rank_{rank:02}_model_states.pt")
    return folder
