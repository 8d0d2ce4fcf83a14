"""One of two processes that train a tiny Baichuan2 together; run by test_distributed.py, as `FILE RANK STORE`.

Every way of sharing the work must end with the parameters of a single process that saw the whole batch.
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from hf_cnllm import BaichuanConfig, BaichuanForCausalLM
from hf_cnllm.loss.lazy_logits import LazyTensor

RANKS, STEPS, VOCAB, LENGTH = 2, 3, 211, 16


def fsdp1(model):
    layers = ModuleWrapPolicy({type(model.model.layers[0])})
    return FullyShardedDataParallel(
        model, auto_wrap_policy=layers, use_orig_params=True, device_id=torch.device("cpu")
    )


def fsdp2(model, also_head=False):
    for module in (*model.model.layers, *([model.lm_head] if also_head else [])):
        fully_shard(module)
    return fully_shard(model)


WAYS = {
    # name: (wrapper, whether the logits stay unread)
    "ddp": (DistributedDataParallel, True),
    "ddp_unused": (lambda model: DistributedDataParallel(model, find_unused_parameters=True), True),
    "fsdp1": (fsdp1, True),
    "fsdp2": (fsdp2, True),
    "fsdp2_head": (lambda model: fsdp2(model, also_head=True), False),
}


def build_model() -> BaichuanForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BaichuanConfig(vocab_size=VOCAB, model_max_length=64, norm_head=True, z_loss_weight=0.01, **sizes)
    return BaichuanForCausalLM(config).train()


def train(model, input_ids, scale=1.0, **loss_kwargs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(STEPS):
        optimizer.zero_grad()
        outputs = model(input_ids, labels=input_ids, **loss_kwargs)
        unread = isinstance(outputs.logits, LazyTensor) and outputs.logits._computed is None
        (outputs.loss * scale).backward()
        optimizer.step()
    return unread


def full_parameters(wrapped) -> dict[str, torch.Tensor]:
    if isinstance(wrapped, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(wrapped):
            named = {name.replace("_fsdp_wrapped_module.", ""): p.clone() for name, p in wrapped.named_parameters()}
    else:
        named = {name.removeprefix("module."): parameter for name, parameter in wrapped.named_parameters()}
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in named.items()}


def main(rank: int, store: str):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    input_ids = torch.randint(VOCAB, (RANKS, LENGTH), generator=torch.Generator().manual_seed(1))
    single = build_model()
    single.config.loss_chunk_size = None
    train(single, input_ids)
    for name, (wrap, expect_unread) in WAYS.items():
        model = build_model()
        model.config.loss_chunk_size = 5
        wrapped = wrap(model)
        counted = torch.tensor(RANKS * (LENGTH - 1))
        unread = train(wrapped, input_ids[rank : rank + 1], scale=RANKS, num_items_in_batch=counted)
        assert unread == expect_unread, name
        shared = full_parameters(wrapped)
        for key, parameter in single.named_parameters():
            torch.testing.assert_close(
                shared[key], parameter, rtol=1e-4, atol=1e-5, msg=lambda m, n=name, k=key: f"{n} {k}: {m}"
            )
        print("passed", name, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
