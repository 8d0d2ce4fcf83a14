"""Fine-tune a checkpoint on conversations, with the loss on the assistant's replies: fully, or with LoRA, QLoRA, DoRA.

python -m hf_cnllm.recipes.sft --model MODEL --data FILE.jsonl --output DIR
python -m hf_cnllm.recipes.sft --config sft_lora.yaml --model MODEL --data FILE.jsonl --output DIR
accelerate launch --config_file scripts/accelerate/fsdp2.yaml -m hf_cnllm.recipes.sft …
"""

from dataclasses import dataclass, field

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

import hf_cnllm  # noqa: F401  registers the families
from hf_cnllm import encode_conversations, read_conversations, reply_end_ids
from hf_cnllm.training.recipe import RecipeArguments, StopAtNonFiniteLoss, open_run, parse_arguments, run_recipe


@dataclass
class SFTArguments(RecipeArguments):
    z_loss_weight: float | None = field(default=None, metadata={"help": "weight of the max-z loss (Baichuan)"})


class RecipeSFTTrainer(StopAtNonFiniteLoss, SFTTrainer):
    pass


def main() -> None:
    arguments, training, model_options = parse_arguments(__doc__, SFTArguments, SFTConfig, ModelConfig)
    with open_run(arguments, training, model_options) as run:
        conversations = [row for path in arguments.data for row in read_conversations(path)]
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        model = AutoModelForCausalLM.from_pretrained(
            arguments.model,
            dtype=model_options.dtype,
            attn_implementation=model_options.attn_implementation,
            quantization_config=get_quantization_config(model_options),
        )
        if arguments.z_loss_weight is not None:
            if not hasattr(model.config, "z_loss_weight"):
                raise ValueError(f"{type(model).__name__} has no max-z loss: leave --z_loss_weight out")
            model.config.z_loss_weight = arguments.z_loss_weight
        ends = reply_end_ids(tokenizer, model.generation_config)
        model.generation_config.eos_token_id = ends
        rows, _ = encode_conversations(tokenizer, conversations, ends, training.max_length)
        trainer = RecipeSFTTrainer(
            model,
            training,
            train_dataset=Dataset.from_list([{k: row[k] for k in ("input_ids", "labels")} for row in rows]),
            processing_class=tokenizer,
            peft_config=get_peft_config(model_options),
        )
        run.train(trainer)
        run.finish(trainer, tokenizer, curves=("loss", "eval_loss", "mean_token_accuracy"))


if __name__ == "__main__":
    run_recipe(main)
