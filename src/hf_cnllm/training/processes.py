"""What a recipe has to know of the processes that `accelerate launch` starts. All else is accelerate's and the Trainer's."""

import os
from typing import Any

from transformers import TrainingArguments

from .._compat import tensor_parallel_config


def tensor_parallel_options(training: TrainingArguments) -> dict[str, Any]:
    """What `from_pretrained` is told where accelerate's configuration asks for tensor parallelism: weights are cut as they
    are read, by the plan of the family.

    Raises:
        ValueError: there would be checkpoints, in which the optimizer's state of one process would stand for all.
    """
    size = int(os.environ.get("PARALLELISM_CONFIG_TP_SIZE", "1"))  # where accelerate's ParallelismConfig reads it
    if size == 1:
        return {}
    if training.save_strategy != "no":
        raise ValueError(
            "transformers does not save the optimizer of a model under tensor parallelism, so there is nothing to resume "
            "from: add --save_strategy no"
        )
    return {"distributed_config": tensor_parallel_config(size)}


def gather_whole_model(trainer: Any) -> None:
    """Has what a Trainer saves from now on be the whole model, which FSDP would leave in parts."""
    if getattr(trainer, "is_fsdp_enabled", False):
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
