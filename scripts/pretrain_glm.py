"""Pre-trains a small GLM by blank infilling, shows the loss of each objective before and after, and fills a blank.

    python scripts/pretrain_glm.py --output pretrained                  # demo on the embedded texts: minutes on a CPU
    python scripts/pretrain_glm.py --output pretrained --texts corpus.txt --tokenizer THUDM/glm-large-chinese \
        --hidden-size 768 --layers 12 --heads 12 --max-length 512 --steps 100000 --infill "北京是[MASK]的首都。"

`--texts` are text files, one text a line, which are streamed, or conversations (.json, .jsonl; docs/data.md). Without
`--tokenizer` a vocabulary is trained on them.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed

from hf_cnllm import GLMChineseTokenizer, GLMConfig, GLMForConditionalGeneration
from hf_cnllm.data.blank_infilling import MIX, DataCollatorForBlankInfilling, infill
from hf_cnllm.data.conversations import load_instructions, read_conversations
from hf_cnllm.demo.tiny_checkpoints import write_glm_chinese
from hf_cnllm.hub.saving import check_new_folder, staged_folder


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--texts", nargs="+", help="text files; default: the embedded instruction set")
    parser.add_argument("--tokenizer", help="checkpoint whose tokenizer to use; default: train one")
    parser.add_argument("--hidden-size", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--mix", type=float, nargs=3, default=list(MIX.values()), metavar=tuple(MIX))
    parser.add_argument("--infill", nargs="+", help="texts with blanks to fill at the end; default: some of --texts")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load_texts(files):
    """(texts for training, some of them for measuring)."""
    conversations = load_instructions() if files is None else []
    if files is not None and all(Path(file).suffix in (".json", ".jsonl") for file in files):
        conversations = [row["messages"] for file in files for row in read_conversations(file)]
    if conversations:
        texts = [message["content"] for conversation in conversations for message in conversation]
        return Dataset.from_dict({"text": texts}), texts[:64]
    stream = load_dataset("text", data_files=files, split="train", streaming=True)
    return stream.shuffle(seed=0, buffer_size=1000), [row["text"] for row in stream.take(64)]


def make_tokenizer(name, texts):
    if name is not None:
        return AutoTokenizer.from_pretrained(name)
    with tempfile.TemporaryDirectory() as folder:
        write_glm_chinese(Path(folder), texts)
        return GLMChineseTokenizer.from_pretrained(folder)


def make_model(args, tokenizer):
    config = GLMConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        num_layers=args.layers,
        num_attention_heads=args.heads,
        max_sequence_length=args.max_length,
        pad_token_id=tokenizer.pad_token_id,
        mask_token_id=tokenizer.mask_token_id,
        smask_token_id=tokenizer.smask_token_id,
        gmask_token_id=tokenizer.gmask_token_id,
        sop_token_id=tokenizer.sop_token_id,
        eop_token_id=tokenizer.eop_token_id,
        embedding_dropout_prob=0.0,
        attention_dropout_prob=0.0,
        output_dropout_prob=0.0,
    )
    return GLMForConditionalGeneration(config)


@torch.no_grad()
def losses_by_objective(model, tokenizer, texts, max_length):
    model.eval()
    losses = {}
    for objective in MIX:
        collator = DataCollatorForBlankInfilling(tokenizer, max_length=max_length, mix={objective: 1.0}, seed=1)
        batch = collator([{"text": text} for text in texts])
        losses[objective] = model(**{name: values.to(model.device) for name, values in batch.items()}).loss.item()
    return losses


def main():
    args = parse_arguments()
    check_new_folder(args.output)
    set_seed(args.seed)
    dataset, sample = load_texts(args.texts)
    all_texts = dataset["text"] if isinstance(dataset, Dataset) else [row["text"] for row in dataset.take(10_000)]
    tokenizer = make_tokenizer(args.tokenizer, all_texts)
    model = make_model(args, tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens in the vocabulary", flush=True)

    before = losses_by_objective(model, tokenizer, sample, args.max_length)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(args.output),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 20,
            adam_beta2=0.98,
            weight_decay=0.1,
            logging_steps=max(args.steps // 10, 1),
            remove_unused_columns=False,
            save_strategy="no",
            report_to=[],
            seed=args.seed,
        ),
        data_collator=DataCollatorForBlankInfilling(
            tokenizer, max_length=args.max_length, mix=dict(zip(MIX, args.mix, strict=True)), seed=args.seed
        ),
        train_dataset=dataset,
    )
    trainer.train()
    after = losses_by_objective(model, tokenizer, sample, args.max_length)

    print("| objective | loss before | after |\n|---|---|---|")
    for objective, loss in before.items():
        print(f"| {objective} | {loss:.2f} | {after[objective]:.2f} |")
    for blanked in args.infill or blank_out(sample):
        print(f"{blanked}\n-> {infill(model.eval(), tokenizer, blanked, max_new_tokens=32)}")
    with staged_folder(args.output) as folder:
        model.save_pretrained(folder, is_main_process=trainer.is_world_process_zero())
        if trainer.is_world_process_zero():
            tokenizer.save_pretrained(folder)


def blank_out(texts, count=3):
    """Some of the shorter texts, each with a blank for its third quarter."""
    texts = sorted((text for text in texts if len(text) >= 16), key=len)[:count]
    return [f"{text[: len(text) // 2]}[MASK]{text[3 * len(text) // 4 :]}" for text in texts]


if __name__ == "__main__":
    main()
