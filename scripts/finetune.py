"""Fine-tune a checkpoint on conversations: fully, or with LoRA.

    python scripts/finetune.py --model PATH --data FILE.jsonl --output DIR [--lora] [--z-loss-weight 2e-4]

The data are JSON lines or one JSON list, in any format of docs/data.md (`messages`, Alpaca, ShareGPT, ChatGLM's, ...). The
loss is on the assistant's replies only. Multi-GPU runs start with `accelerate launch` or `torchrun` as any Trainer script.
"""

import argparse
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from hf_cnllm import encode_conversations, read_conversations, reply_end_ids
from hf_cnllm.auto import family_of
from hf_cnllm.hub.saving import check_new_folder, staged_folder


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint to start from")
    parser.add_argument("--data", required=True, type=Path, help="conversations, JSON lines or a JSON list")
    parser.add_argument("--prompt-column", help="field of the question, for data of no known format")
    parser.add_argument("--response-column", help="field of its answer")
    parser.add_argument("--history-column", help="field of earlier rounds, [[question, answer], ...]")
    parser.add_argument("--ignore-fields", nargs="+", default=[], help="fields of the data to leave out")
    parser.add_argument("--output", required=True, type=Path, help="new folder for the model, or for the adapter")
    parser.add_argument("--lora", action="store_true", help="train an adapter; the checkpoint stays as it is")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=4, help="conversations a step and device")
    parser.add_argument("--accumulate", type=int, default=1, help="steps whose gradients are added up")
    parser.add_argument("--learning-rate", type=float, help="default: 1e-4 with --lora, else 1e-5")
    parser.add_argument(
        "--max-length", type=int, default=2048, help="tokens kept of a conversation, its last answer first"
    )
    parser.add_argument("--z-loss-weight", type=float, help="weight of the max-z loss, for families that have it")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    return parser.parse_args()


def main() -> int:
    args = parse()
    check_new_folder(args.output)
    columns = {name: getattr(args, name) for name in ("prompt_column", "response_column", "history_column")}
    rows = read_conversations(args.data, **columns, ignore=args.ignore_fields)
    family = family_of(AutoConfig.from_pretrained(args.model))
    if family is not None and family.generates_with != "AutoModelForCausalLM":
        raise ValueError(
            f"{args.model} fills blanks: fine-tune it with `hf-cnllm demo --model`, which asks with a blank"
        )

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto" if args.lora else torch.float32)
    if args.z_loss_weight is not None:
        if not hasattr(model.config, "z_loss_weight"):
            raise ValueError(f"{type(model).__name__} has no max-z loss: leave --z-loss-weight out")
        model.config.z_loss_weight = args.z_loss_weight
    ends = reply_end_ids(tokenizer, model.generation_config)
    model.generation_config.eos_token_id = ends
    if args.lora:
        model = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", r=args.lora_rank, lora_alpha=2 * args.lora_rank)
        )
        model.print_trainable_parameters()
    examples, cuts = encode_conversations(tokenizer, rows, ends, args.max_length)
    for cut, count in cuts.items():
        print(f"{cut} in {count} of {len(rows)} conversations, which are longer than --max-length {args.max_length}")

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(args.output),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=args.accumulate,
            learning_rate=args.learning_rate or (1e-4 if args.lora else 1e-5),
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=0.5,
            bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            gradient_checkpointing=args.gradient_checkpointing,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=examples,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    trainer.train()
    model.config.use_cache = True  # Trainer switches it off; whoever loads the result wants to generate
    with staged_folder(args.output) as folder:
        trainer.save_model(str(folder))
        if trainer.is_world_process_zero():
            tokenizer.save_pretrained(folder)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"finetune.py: error: {' '.join(str(error).split())}")
