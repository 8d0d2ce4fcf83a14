"""Direct preference optimization (arXiv 2305.18290) of a chat model: fully, or an adapter (--use_peft) against the model without.

python -m hf_cnllm.recipes.dpo --config dpo.yaml --model MODEL --data PAIRS.jsonl --output DIR

`--data` are pairs: `{"prompt": …, "chosen": …, "rejected": …}`, each a text or messages, and other formats (docs/data.md).
"""

from typing import Any

import trl
from trl.trainer.dpo_trainer import DataCollatorForPreference

import hf_cnllm  # noqa: F401  registers the families
from hf_cnllm.data.preferences import read_pair
from hf_cnllm.training.preference import train_on_answers
from hf_cnllm.training.recipe import run_recipe
from hf_cnllm.training.run import StopAtNonFiniteLoss

CURVES = ("rewards/margins", "rewards/accuracies")


class DPOTrainer(StopAtNonFiniteLoss, trl.DPOTrainer):
    """TRL's."""


def collator(training: Any, pad_id: int) -> Any:
    return DataCollatorForPreference(
        pad_id, training.max_length, training.truncation_mode, pad_to_multiple_of=training.pad_to_multiple_of
    )


def main() -> None:
    train_on_answers(__doc__, DPOTrainer, trl.DPOConfig, read_pair, collator, CURVES)


if __name__ == "__main__":
    run_recipe(main)
