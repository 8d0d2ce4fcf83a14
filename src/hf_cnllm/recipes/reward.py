"""Train a reward model on pairs of answers, of which one is preferred: a sequence classifier with one label.

python -m hf_cnllm.recipes.reward --config reward_llama2.yaml --model MODEL --data FILE.jsonl --output DIR
accelerate launch --config_file fsdp2.yaml -m hf_cnllm.recipes.reward …

`--data` are rows `{"prompt": …, "chosen": …, "rejected": …}` in any format of docs/data.md. With `--margins` each has a `rating`
or a number as its `margin`. `--model` is a language model, which gets a new head, or a reward model, which learns on.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import trl
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    set_seed,
)
from trl import ModelConfig, RewardConfig, get_peft_config

import hf_cnllm  # noqa: F401  registers the families
from hf_cnllm.data.conversations import reply_end_ids
from hf_cnllm.training.critic import HEADS, adapter_of_classifier
from hf_cnllm.training.models import loading_options, merged
from hf_cnllm.training.recipe import ChatArguments, parse_arguments, run_recipe
from hf_cnllm.training.reward_data import MARGINS, encode_pairs, read_rated_pair, split_by_prompt
from hf_cnllm.training.run import StopAtNonFiniteLoss, open_run
from hf_cnllm.training.sampling import pad_apart_from_ends
from hf_cnllm.training.sft_data import fills_blanks, use_template


@dataclass
class RewardArguments(ChatArguments):
    takes_classifiers = True
    eval_data: list[str] | None = field(default=None, metadata={"help": "pairs to evaluate on, instead of --held_out"})
    held_out: float = field(default=0.1, metadata={"help": "part of the prompts that is not learned but evaluated on"})
    margins: str | None = field(
        default=None,
        metadata={
            "help": "margin loss of Llama 2: what its ratings are worth, small or large; numbers stay as they are"
        },
    )


class RewardTrainer(StopAtNonFiniteLoss, trl.RewardTrainer):
    """Evaluates by pairs, where TRL's accuracy is the mean of those of batches, of which the last one is smaller."""

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        chosen, rejected = outputs.logits.squeeze(-1).float().chunk(2)
        return loss.detach(), chosen - rejected, torch.ones_like(chosen)


def accuracy(evaluated: Any) -> dict[str, float]:
    """The part of the pairs whose chosen answer has the higher reward."""
    return {"held_out_accuracy": float((evaluated.predictions > 0).mean())}


def load_reward_model(name: str, options: ModelConfig) -> Any:
    """The reward model, or the language model with a new head in the place of its own.

    Raises:
        ValueError: there are no sequence classifiers of this kind, or this one has several labels.
    """
    config = AutoConfig.from_pretrained(name)
    if fills_blanks(config) or type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ValueError(f"{config.model_type} has no sequence classifier, which a reward model is")
    is_classifier = any("SequenceClassification" in kind for kind in config.architectures or ())
    if is_classifier and config.num_labels != 1:
        raise ValueError(f"a reward model has one label, {name} has {config.num_labels}")
    given = loading_options(options)
    if given["quantization_config"] is not None:
        given["quantization_config"].llm_int8_skip_modules = list(HEADS)  # the head is learned as it is
    return AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, **given)


def main() -> None:
    arguments, training, options = parse_arguments(__doc__, RewardArguments, RewardConfig, ModelConfig)
    with open_run(arguments, training, options) as run:
        if arguments.margins not in (None, *MARGINS):
            raise ValueError(f"--margins must be one of {', '.join(MARGINS)}, got {arguments.margins!r}")
        for name in ("chat_template_path", "eos_token", "pad_token", "model_init_kwargs"):
            if getattr(training, name, None) is not None:
                raise ValueError(f"--{name} is not read here; --template sets the form of chats")
        rows, eval_rows = arguments.read(partial(read_rated_pair, margins=arguments.margins))
        if not arguments.eval_data:
            rows, eval_rows = split_by_prompt(rows, arguments.held_out, training.seed)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        set_seed(training.seed)  # a new head
        model = load_reward_model(arguments.model, options)
        use_template(tokenizer, arguments.template)
        try:
            generation = GenerationConfig.from_pretrained(arguments.model)
        except OSError:  # reward models have none
            generation = GenerationConfig.from_model_config(model.config)
        ends = reply_end_ids(tokenizer, generation)
        pad_apart_from_ends(tokenizer, ends)

        def dataset(name: str, rows: list[Any]) -> Any:
            from datasets import Dataset

            examples, left_out = encode_pairs(tokenizer, rows, ends, training.max_length)
            for why, count in left_out.items():
                print(f"{count} of the {len(rows)} pairs to {name} are left out: {why}")
            return Dataset.from_list(examples)

        held_out = dataset("evaluate on", eval_rows)
        trainer = RewardTrainer(
            model,
            training,
            train_dataset=dataset("learn", rows),
            eval_dataset=held_out,
            processing_class=tokenizer,
            compute_metrics=accuracy,
            peft_config=adapter_of_classifier(get_peft_config(options), model),
        )
        run.train(trainer)
        found = trainer.evaluate()
        trainer.model = merged(trainer.model)  # transformers would load an adapter with two labels
        run.finish(
            trainer,
            tokenizer,
            curves=("loss", "accuracy", "eval_held_out_accuracy"),
            held_out_pairs=len(held_out),
            held_out_accuracy=found["eval_held_out_accuracy"],
            held_out_loss=found["eval_loss"],
        )


if __name__ == "__main__":
    run_recipe(main)
