"""Pre-train a causal language model on texts: a new one of a configuration, or a checkpoint that goes on.

python -m hf_cnllm.recipes.pretrain --config pretrain_baichuan2.yaml --model MODEL --data TEXTS --output DIR --max_steps N
accelerate launch --config_file fsdp2.yaml -m hf_cnllm.recipes.pretrain …

`--data` are .txt files with a text a line, .jsonl and .parquet files with `text`, `content` or token ids in `input_ids`, folders
of them, or names of data sets. They are streamed. `--model` is a checkpoint, or a folder with a tokenizer and config.json alone.
"""

import inspect
import math
from dataclasses import dataclass, field
from functools import partial

from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import ModelConfig

import hf_cnllm  # noqa: F401  registers the families
from hf_cnllm.data.packing import pack, pieces
from hf_cnllm.families import is_prefix_lm
from hf_cnllm.recipes.sft import set_z_loss_weight, with_adapter
from hf_cnllm.training.pretrain import (
    PretrainArguments,
    load_config,
    load_model,
    make_trainer,
    read_documents,
)
from hf_cnllm.training.pretrain_data import CollatePacked
from hf_cnllm.training.recipe import parse_arguments, run_recipe
from hf_cnllm.training.run import open_run


@dataclass
class CausalArguments(PretrainArguments):
    z_loss_weight: float | None = field(default=None, metadata={"help": "weight of the max-z loss (Baichuan)"})


def main() -> None:
    arguments, training, options = parse_arguments(__doc__, CausalArguments, TrainingArguments, ModelConfig)
    with open_run(arguments, training, options) as run:
        config = load_config(arguments)
        if is_prefix_lm(config):
            raise ValueError(f"{config.model_type} fills blanks, which recipes.pretrain_glm trains it on")
        set_z_loss_weight(config, arguments.z_loss_weight)
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token, which stands between the texts")
        documents = read_documents(arguments, training, tokenizer, config, is_ended=True)
        model = load_model(arguments, options, config, AutoModelForCausalLM, training.seed)
        has_positions = "position_ids" in inspect.signature(model.forward).parameters
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        is_flat = has_positions and "flash" in (model.config._attn_implementation or "")
        trainer = make_trainer(
            run,
            with_adapter(model, training, options),
            training,
            documents,
            partial(pack if has_positions else pieces, length=arguments.max_length),
            CollatePacked(pad_id, is_flat, has_positions),
        )
        run.train(trainer)
        evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        run.finish(
            trainer,
            tokenizer,
            curves=("loss", "eval_loss", "learning_rate"),
            perplexity=math.exp(min(evaluated[-1], 100)) if evaluated else None,
        )


if __name__ == "__main__":
    run_recipe(main)
