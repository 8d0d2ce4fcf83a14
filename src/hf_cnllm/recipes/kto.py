"""Kahneman-Tversky optimization (arXiv 2402.01306) of a chat model on answers that are called good or bad one by one.

python -m hf_cnllm.recipes.kto --config kto.yaml --model MODEL --data JUDGMENTS.jsonl --output DIR

`--data` are rows `{"prompt": …, "completion": …, "label": true}`, texts or messages, or conversations with a `label`
(docs/data.md). The estimate of the KL needs at least two examples a batch.
"""

from typing import Any

import trl
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

import hf_cnllm  # noqa: F401  registers the families
from hf_cnllm.data.preferences import read_judgment
from hf_cnllm.training.preference import train_on_answers
from hf_cnllm.training.recipe import run_recipe
from hf_cnllm.training.run import StopAtNonFiniteLoss

CURVES = ("rewards/margins", "kl")


class KTOTrainer(StopAtNonFiniteLoss, trl.KTOTrainer):
    """TRL's."""


def collator(training: Any, pad_id: int) -> Any:
    return DataCollatorForUnpairedPreference(
        pad_id, training.max_length, pad_to_multiple_of=training.pad_to_multiple_of
    )


def main() -> None:
    train_on_answers(__doc__, KTOTrainer, trl.KTOConfig, read_judgment, collator, CURVES)


if __name__ == "__main__":
    run_recipe(main)
