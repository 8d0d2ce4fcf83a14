"""One of two processes that share a GLM-130B; run by torchrun, see test_tensor_parallel.py. The first prints how far its logits
are from those of one process."""

import sys
import warnings

import torch
import torch.distributed as dist
from transformers import AutoModelForSeq2SeqLM

import hf_cnllm  # noqa: F401


def main(folder: str) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    ids = torch.tensor([[10, 11, 150, 12, 13, 154, 20, 21]])
    shared, whole = (
        AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
        for options in ({"tp_plan": "auto"}, {})
    )
    with torch.no_grad():
        logits = shared(ids).logits
        logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
        difference = (logits - whole(ids).logits).abs().max().item()
    weight = shared.transformer.layers[0].mlp.dense_h_to_4h.weight
    rows = (weight.to_local() if hasattr(weight, "to_local") else weight).shape[0]
    if dist.get_rank() == 0:
        print(f"rows {rows} difference {difference:.1e}")
    dist.barrier()
    dist.destroy_process_group()


main(sys.argv[1])
