"""Fine-tune a checkpoint on conversations, with the loss on the assistant's replies: fully, or with LoRA, QLoRA, DoRA.

python -m hf_cnllm.recipes.sft --model MODEL --data FILE.jsonl --output DIR
python -m hf_cnllm.recipes.sft --config sft_lora.yaml --model MODEL --data FILE.jsonl --output DIR
accelerate launch --config_file fsdp2.yaml -m hf_cnllm.recipes.sft …
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import transformers
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoTokenizer, Trainer, TrainingArguments, set_seed
from trl import ModelConfig, get_peft_config

import hf_cnllm  # noqa: F401  registers the families
from hf_cnllm.data.formats import to_messages
from hf_cnllm.training.models import NEEDS_ADAPTER, loading_options
from hf_cnllm.training.processes import tensor_parallel_options
from hf_cnllm.training.recipe import ChatArguments, parse_arguments, run_recipe
from hf_cnllm.training.run import Run, StopAtNonFiniteLoss, open_run
from hf_cnllm.training.sft_data import (
    encode_rows,
    fills_blanks,
    make_batches,
    set_control_ids,
    use_template,
)


@dataclass
class SFTArguments(ChatArguments):
    prompt_column: str | None = field(
        default=None, metadata={"help": "field of the question, for data of no known format"}
    )
    response_column: str | None = field(default=None, metadata={"help": "field of its answer"})
    history_column: str | None = field(
        default=None, metadata={"help": "field of earlier rounds, [[question, answer], ...]"}
    )
    max_length: int = field(default=2048, metadata={"help": "tokens kept of a conversation, its last answer first"})
    packing: bool = field(
        default=False,
        metadata={"help": "fill rows of --max_length tokens with conversations that do not see each other"},
    )
    ghost_attention: bool = field(
        default=False,
        metadata={
            "help": "the system message is an instruction that holds for all turns (Llama 2): learn the last answer only"
        },
    )
    learn_questions: bool = field(
        default=False, metadata={"help": "learn all tokens; by default questions and system messages are masked"}
    )
    z_loss_weight: float | None = field(default=None, metadata={"help": "weight of the max-z loss (Baichuan)"})
    adapter: str | None = field(default=None, metadata={"help": "adapter to go on with, instead of a new one"})


class SFTTrainer(StopAtNonFiniteLoss, Trainer):
    """Not TRL's, which computes cross entropy from the head's weights by itself: the max-z loss, and GLM's labels, which are
    not shifted, are the model's own business."""


def set_z_loss_weight(config: Any, weight: float | None) -> None:
    """Raises ValueError if there is a weight, and the model has no max-z loss."""
    if weight is not None:
        if not hasattr(config, "z_loss_weight"):
            raise ValueError(f"{config.model_type} has no max-z loss: leave --z_loss_weight out")
        config.z_loss_weight = weight


def load_model(arguments: SFTArguments, training: TrainingArguments, options: ModelConfig) -> Any:
    config = AutoConfig.from_pretrained(arguments.model)
    set_z_loss_weight(config, arguments.z_loss_weight)
    kind = transformers.AutoModelForSeq2SeqLM if fills_blanks(config) else transformers.AutoModelForCausalLM
    return kind.from_pretrained(
        arguments.model,
        config=config,
        **loading_options(options),
        **tensor_parallel_options(training),
    )


def with_adapter(model: Any, training: TrainingArguments, options: ModelConfig, adapter: str | None = None) -> Any:
    """The model, with an adapter if the options ask for one: a new one, or that in the folder `adapter`."""
    quantizer = getattr(model, "hf_quantizer", None)  # by an option, or by the checkpoint's own configuration
    config = get_peft_config(options)
    if quantizer is not None and not quantizer.is_trainable:
        method = quantizer.quantization_config.quant_method
        raise ValueError(
            f"nothing can be trained through these quantized weights ({getattr(method, 'value', method)})"
        )
    if config is None:
        if adapter is not None:
            raise ValueError("--adapter names an adapter to train: add --use_peft")
        if quantizer is not None:
            raise ValueError(NEEDS_ADAPTER)
        return model
    if quantizer is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=training.gradient_checkpointing)
    elif training.gradient_checkpointing:
        model.enable_input_require_grads()
    if adapter is not None:
        return PeftModel.from_pretrained(model, adapter, is_trainable=True)
    if fills_blanks(model.config):
        config.task_type = None  # PEFT knows sequence-to-sequence models with an encoder only
    return get_peft_model(model, config)


def learn(run: Run, arguments: SFTArguments, training: TrainingArguments, options: ModelConfig) -> None:
    """Trains the model of `arguments` on their data, in the folder of the run."""
    columns = {name: getattr(arguments, name) for name in ("prompt_column", "response_column", "history_column")}
    rows, eval_rows = arguments.read(partial(to_messages, **columns))
    set_seed(training.seed)  # a new adapter
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = load_model(arguments, training, options)
    if not fills_blanks(model.config):
        use_template(tokenizer, arguments.template)
    elif arguments.template is not None:
        raise ValueError("--template: a model that fills blanks has no chats")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    set_control_ids(model, tokenizer)
    model.config.use_cache = False  # with a cache, transformers' own models do not look for packed rows
    packed_length = arguments.max_length if arguments.packing else None

    def batches(rows: list[dict[str, Any]]) -> tuple[Any, Any]:
        forms = {"ghost_attention": arguments.ghost_attention, "learn_questions": arguments.learn_questions}
        examples, cuts = encode_rows(model, tokenizer, rows, arguments.max_length, **forms)
        for cut, count in cuts.items():
            print(f"{cut} in {count} of {len(rows)} conversations, longer than --max_length {arguments.max_length}")
        return make_batches(model, tokenizer, examples, packed_length)

    dataset, collate = batches(rows)
    training.remove_unused_columns = False  # the lengths of what is packed
    trainer = SFTTrainer(
        with_adapter(model, training, options, arguments.adapter),
        training,
        data_collator=collate,
        train_dataset=dataset,
        eval_dataset=batches(eval_rows)[0] if eval_rows else None,
    )
    run.train(trainer)
    run.finish(trainer, tokenizer, curves=("loss", "eval_loss"))


def main() -> None:
    arguments, training, options = parse_arguments(__doc__, SFTArguments, TrainingArguments, ModelConfig)
    with open_run(arguments, training, options) as run:
        learn(run, arguments, training, options)


if __name__ == "__main__":
    run_recipe(main)
