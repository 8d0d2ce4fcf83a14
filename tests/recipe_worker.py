"""A process of a recipe that `accelerate launch` starts on the CPU, as `FILE RUNS`: a JSON list of the arguments of each run.

accelerate has FSDP and tensor parallelism on GPUs only: here it takes these processes for them, and all it does with the
models and data is what it does there. `HALT_AT`, one of `MOMENTS`, makes process `HALT_RANK` write its id to `HALT_FILE` there,
and wait to be killed.
"""

import json
import os
import signal
import sys
from pathlib import Path

import accelerate
import accelerate.state
import transformers
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from hf_cnllm.recipes import sft
from hf_cnllm.training import recipe, run

IS_CUT = "ACCELERATE_USE_FSDP" in os.environ or "PARALLELISM_CONFIG_TP_SIZE" in os.environ  # as the launcher says


def take_processes_for_gpus():
    original_init, original_state = accelerate.state.AcceleratorState.__init__, accelerate.Accelerator.get_state_dict

    def init(state, *args, **kwargs):
        if not accelerate.state.AcceleratorState._shared_state:
            accelerate.state.PartialState(cpu=True).distributed_type = accelerate.DistributedType.MULTI_GPU
        original_init(state, *args, **kwargs)

    def state_dict(*args, **kwargs):  # a copy from a GPU to the CPU would have waited for the other process
        state = original_state(*args, **kwargs)
        return {name: v.wait() if isinstance(v, AsyncCollectiveTensor) else v for name, v in state.items()}

    accelerate.state.AcceleratorState.__init__ = init
    accelerate.Accelerator.get_state_dict = state_dict


def leave_half_an_optimizer(folder):
    folder.mkdir(exist_ok=True)  # where the first process has not come that far
    return (folder / "optimizer.pt").write_bytes(b"PK\3\4")


# name: what is called there, whether it is that call, what is left half-written
MOMENTS = {
    "before a write": (transformers.Trainer, "training_step", lambda trainer, *_: trainer.state.global_step == 3),
    "inside a write": (
        transformers.Trainer,
        "_save_optimizer_and_scheduler",
        lambda _, folder: folder.endswith("checkpoint-4") and leave_half_an_optimizer(Path(folder)),
    ),
    "written, unmarked": (run, "write_through", lambda folder: folder.name == "checkpoint-4"),
    "after a write": (transformers.Trainer, "training_step", lambda trainer, *_: trainer.state.global_step == 4),
    "in the last save": (run.Run, "write_summary", lambda *_: True),
    "half moved": (Path, "replace", lambda path, _: path.parent.name == ".final" and path.name == "config.json"),
}


def halt_at(moment):
    owner, name, is_it = MOMENTS[moment]
    original = getattr(owner, name)

    def halting(*args, **kwargs):
        if is_it(*args):
            note = Path(os.environ["HALT_FILE"])
            note.with_suffix(".tmp").write_text(str(os.getpid()))
            os.rename(note.with_suffix(".tmp"), note)
            while True:
                signal.pause()
        return original(*args, **kwargs)

    setattr(owner, name, halting)


if __name__ == "__main__":
    if IS_CUT:
        take_processes_for_gpus()
    if os.environ.get("HALT_AT") and os.environ.get("RANK", "0") == os.environ.get("HALT_RANK", "0"):
        halt_at(os.environ["HALT_AT"])
    for words in json.loads(Path(sys.argv[1]).read_text()):
        sys.argv[1:] = words
        recipe.run_recipe(sft.main)
