"""A step of fine-tuning: time and memory of the recipe on Baichuan beside TRL and the plain Trainer on a Llama of equal shape.

    python scripts/benchmark_training.py                          # vocabulary 125,696
    python scripts/benchmark_training.py --clock cpu --rounds 7   # on a busy machine, with OMP_NUM_THREADS=1

Each trainer takes the same tokens through its own `train()`, with SGD, all in turns: the ratios are medians of the rounds'
own. Memory is the growth at its peak above the model, less the gradients, which are the same for all. `TRL` is `SFTTrainer` as it
is by default, which works on the head in chunks too; `Trainer` is transformers' with the model's own loss, which TRL had before.
"""

import argparse
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import SFTConfig
from trl import SFTTrainer as TRLTrainer
from trl import __version__ as trl_version

from benchmark.measure import CLOCKS, MIB, peak_growth, take_turns
from hf_cnllm import BaichuanConfig
from hf_cnllm.recipes.sft import SFTTrainer

OURS = "recipe, Baichuan"


class Clock(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self, clock):
        self.clock, self.seconds = clock, []

    def on_step_begin(self, *args, **kwargs):
        self.began = self.clock()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(self.clock() - self.began)


def shaped(config_class, args, **fields):
    """An untrained model of the shape that was asked for."""
    shape = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "intermediate_size": args.hidden_size * 8 // 3,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden_size // 64,
    }
    return AutoModelForCausalLM.from_config(config_class(**shape, **fields))


def collate(rows):
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=125_696)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()

    tokens = torch.randint(
        3, args.vocab_size, (2 * args.batch, args.length), generator=torch.Generator().manual_seed(0)
    )
    rows = Dataset.from_dict({"input_ids": tokens.tolist()})
    common = {
        "per_device_train_batch_size": args.batch, "max_steps": 2, "optim": "sgd", "learning_rate": 1e-3,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "logging_strategy": "no",
        "remove_unused_columns": False, "gradient_checkpointing": False, "bf16": torch.cuda.is_available(),
    }  # fmt: skip
    folder = tempfile.mkdtemp()
    baichuan = {"position_embedding": "rope", "norm_head": False, "model_max_length": 4096}
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1}, "<pad>"))  # which TRL insists on
    trl = {
        "args": SFTConfig(folder, **common, dataset_kwargs={"skip_prepare_dataset": True}),
        "processing_class": PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>"),
    }
    plain = {"args": TrainingArguments(folder, **common)}
    kinds = {
        OURS: (SFTTrainer, shaped(BaichuanConfig, args, **baichuan), plain),
        "TRL, Llama": (TRLTrainer, shaped(LlamaConfig, args), trl),
        "Trainer, Llama": (Trainer, shaped(LlamaConfig, args), plain),
    }

    def training(trainer_class, model, options):
        def train():
            clock = Clock(CLOCKS[args.clock])
            trainer_class(model, data_collator=collate, train_dataset=rows, callbacks=[clock], **options).train()
            model.zero_grad()
            return min(clock.seconds)

        return train

    runs = {name: training(*kind) for name, kind in kinds.items()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    times = take_turns(runs, args.rounds, device)
    gradients = {
        name: sum(p.numel() * p.element_size() for p in model.parameters()) / MIB
        for name, (_, model, _) in kinds.items()
    }
    peaks = {name: (peak_growth(run, device) or float("nan")) - gradients[name] for name, run in runs.items()}
    print(
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, trl {trl_version}: {args.batch} rows of "
        f"{args.length} tokens, {args.layers} layers of width {args.hidden_size}, vocabulary {args.vocab_size}"
    )
    print(
        "| trainer, model | s/step | recipe's time by it | quartiles | peak MiB | recipe's peak by it |\n|---|---|---|---|---|---|"
    )
    for name in runs:
        low, ratio, high = times.ratio(OURS, name)
        memory = f"{peaks[name]:.0f} | {peaks[OURS] / peaks[name]:.2f}"
        print(f"| {name} | {times.median(name):.2f} | {ratio:.2f} | {low:.2f}-{high:.2f} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
