"""Pre-train GLM or ChatGLM-6B by blank infilling (arXiv 2103.10360): a new model of a configuration, or a checkpoint that goes on.

python -m hf_cnllm.recipes.pretrain_glm --config pretrain_glm.yaml --model MODEL --data TEXTS --output DIR --max_steps N

`--data` are .txt files with a text a line, .jsonl and .parquet files with `text`, `content` or token ids in `input_ids`, folders
of them, or names of data sets. They are streamed. `--model` is a checkpoint, or a folder with a tokenizer and config.json alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, TrainingArguments
from trl import ModelConfig

import hf_cnllm
from hf_cnllm.data.blank_infilling import MIX, ControlTokens, DataCollatorForBlankInfilling
from hf_cnllm.data.infilling import context_with_blanks, infill
from hf_cnllm.data.packing import pieces
from hf_cnllm.families import is_prefix_lm
from hf_cnllm.recipes.sft import with_adapter
from hf_cnllm.training.pretrain import (
    PretrainArguments,
    load_config,
    load_model,
    make_trainer,
    read_documents,
)
from hf_cnllm.training.recipe import parse_arguments, run_recipe
from hf_cnllm.training.run import open_run
from hf_cnllm.training.sft_data import fills_blanks

SAMPLE = 64  # texts on which each objective's loss is measured, before and after


@dataclass
class BlankArguments(PretrainArguments):
    max_length: int = field(default=512, metadata={"help": "tokens of a row, blanks and marks included"})
    mix: list[float] = field(
        default_factory=lambda: list(MIX.values()), metadata={"help": f"weights of the objectives {', '.join(MIX)}"}
    )
    infill: list[str] = field(default_factory=list, metadata={"help": "texts with [MASK] in them to fill at the end"})


def tell_control_ids(config: Any, control: ControlTokens) -> None:
    """Sets what a configuration leaves open of the control tokens, by which the model tells text from blanks."""
    masks = {
        f"{kind}mask_token_id": control.masks[name]
        for kind, name in (("", "token"), ("s", "sentence"), ("g", "document"))
    }
    for name, token in {**masks, "sop_token_id": control.start, "eop_token_id": control.end}.items():
        if getattr(config, name, 0) is None:
            setattr(config, name, token)


@torch.no_grad()
def losses_by_objective(model: Any, collator: DataCollatorForBlankInfilling, rows: Sequence[Any]) -> dict[str, float]:
    was_training, losses = model.training, {}
    model.eval()
    for objective in MIX:
        one = DataCollatorForBlankInfilling(
            collator.tokenizer, collator.max_length, {objective: 1.0}, shift_labels=collator.shift_labels
        )
        batch = {name: values.to(model.device) for name, values in one(rows).items()}
        losses[objective] = round(model(**batch).loss.item(), 4)
    model.train(was_training)
    return losses


def main() -> None:
    arguments, training, options = parse_arguments(__doc__, BlankArguments, TrainingArguments, ModelConfig)
    with open_run(arguments, training, options) as run:
        config = load_config(arguments)
        if not is_prefix_lm(config):
            raise ValueError(f"{config.model_type} is causal and fills no blanks: recipes.pretrain trains it")
        if isinstance(config, hf_cnllm.GLM130BConfig):
            raise ValueError(
                f"{config.model_type} has other positions than these rows: train it on "
                "tokenizer.build_inputs_for_generation(…, targets=…) (docs/glm130b.md)"
            )
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        if len(arguments.mix) != len(MIX):
            raise ValueError(f"--mix needs {len(MIX)} weights, for {', '.join(MIX)}; got {len(arguments.mix)}")
        collator = DataCollatorForBlankInfilling(
            tokenizer,
            arguments.max_length,
            dict(zip(MIX, arguments.mix, strict=True)),
            shift_labels=not fills_blanks(config),
        )
        if arguments.max_length > (longest := getattr(config, "max_sequence_length", arguments.max_length)):
            raise ValueError(f"--max_length is {arguments.max_length}, but the model has room for {longest} tokens")
        for text in arguments.infill:  # before the training, not after it
            try:
                context_with_blanks(tokenizer, text, collator.control)
            except ValueError as error:
                raise ValueError(f"--infill: {error}") from error
        documents = read_documents(arguments, training, tokenizer, config, is_ended=False)
        tell_control_ids(config, collator.control)
        model = load_model(arguments, options, config, AutoModelForSeq2SeqLM, training.seed)
        make_rows = partial(pieces, length=collator.longest_text, least=1)
        sample = [{**row, "seed": place} for place, row in enumerate(islice(make_rows(documents[0].epoch(0)), SAMPLE))]
        model = with_adapter(model, training, options)
        trainer = make_trainer(run, model, training, documents, make_rows, collator)
        before = losses_by_objective(model, collator, sample)
        run.train(trainer)
        after = losses_by_objective(model, collator, sample)
        filled = {text: infill(model.eval(), tokenizer, text, max_new_tokens=32) for text in arguments.infill}
        if trainer.is_world_process_zero():
            print("| objective | loss before | after |\n|---|---|---|")
            print("\n".join(f"| {name} | {loss:.2f} | {after[name]:.2f} |" for name, loss in before.items()))
            for text, answer in filled.items():
                print(f"{text}\n-> {answer}")
        run.finish(
            trainer,
            tokenizer,
            curves=("loss", "eval_loss", "learning_rate"),
            before=before,
            after=after,
            filled=filled,
        )


if __name__ == "__main__":
    run_recipe(main)
