"""Group relative policy optimization (arXiv 2402.03300) of a chat model: several answers to a question, each against their mean.

python -m hf_cnllm.recipes.grpo --config grpo.yaml --model MODEL --reward REWARD_MODEL --data FILE.jsonl --output DIR

`--data` are rows `{"prompt": …}`, whose other fields reward functions are given, or conversations (docs/data.md), whose last
answers are left out. `--reward` is a reward model, `length` or `chinese`, or a function of your own (package.module.name).
"""

import trl

import hf_cnllm  # noqa: F401  registers the families
from hf_cnllm.training.preference import train_on_rewards
from hf_cnllm.training.recipe import run_recipe
from hf_cnllm.training.run import StopAtNonFiniteLoss


class GRPOTrainer(StopAtNonFiniteLoss, trl.GRPOTrainer):
    """TRL's."""


def main() -> None:
    train_on_rewards(__doc__, GRPOTrainer, trl.GRPOConfig)


if __name__ == "__main__":
    run_recipe(main)
