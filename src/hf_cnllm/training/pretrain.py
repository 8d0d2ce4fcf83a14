"""What the recipes for pre-training share: their arguments, the model from a configuration or a checkpoint, and the stream."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, Trainer, TrainerCallback, TrainingArguments, set_seed
from trl import ModelConfig

from .models import loading_options
from .pretrain_data import Documents, Place, Stream, StreamState, find_sources
from .recipe import DataArguments
from .run import Run, StopAtNonFiniteLoss

STREAM_FILE = "stream.json"  # in a checkpoint
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


@dataclass
class PretrainArguments(DataArguments):
    config_name: str | None = field(
        default=None,
        metadata={
            "help": "make a new model of this configuration, a folder or a name; the tokenizer is --model's. A --model folder "
            "without weights makes one of its own"
        },
    )
    text_field: str | None = field(default=None, metadata={"help": "field of the text; default: text, or content"})
    shuffle_buffer: int = field(
        default=1000, metadata={"help": "documents among which the next one is drawn; 0 keeps their order"}
    )
    max_length: int = field(default=2048, metadata={"help": "tokens of a row"})


class PretrainTrainer(StopAtNonFiniteLoss, Trainer):
    """transformers' own: the max-z loss, and GLM's labels, which are not shifted, are the model's business."""


def load_config(arguments: PretrainArguments) -> Any:
    return AutoConfig.from_pretrained(arguments.config_name or arguments.model)


def load_model(arguments: PretrainArguments, options: ModelConfig, config: Any, kind: Any, seed: int) -> Any:
    """A new model of the configuration, or the checkpoint, in fp32 unless the options say otherwise: what is trained in 16 bits
    without master weights loses small steps."""
    given = loading_options(options) | {"dtype": options.dtype or "float32"}
    folder = Path(arguments.model)
    if arguments.config_name or (folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in WEIGHTS)):
        set_seed(seed)
        del given["quantization_config"]
        return kind.from_config(config, **given)
    return kind.from_pretrained(arguments.model, config=config, **given)


def read_documents(
    arguments: PretrainArguments, training: TrainingArguments, tokenizer: Any, config: Any, is_ended: bool
) -> tuple[Documents, Documents | None]:
    """The documents of `--data`, and those of `--eval_data` or None.

    Raises:
        ValueError: what was asked for does not go together, or there is no text.
    """
    if training.max_steps <= 0:
        raise ValueError("--max_steps is missing: the stream of texts has no end")
    if arguments.max_length < 2:
        raise ValueError(f"--max_length {arguments.max_length}: a row needs 2 tokens, one of which is learned")
    if arguments.shuffle_buffer < 0:
        raise ValueError(f"--shuffle_buffer must be at least 0, got {arguments.shuffle_buffer}")
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, more than the model's vocab_size, {config.vocab_size}"
        )
    training.remove_unused_columns = False
    training.accelerator_config.dispatch_batches = False  # rows of a batch have its own length

    def documents(names: Iterable[str]) -> Documents:
        found = Documents(
            find_sources(names), tokenizer, is_ended, arguments.text_field, arguments.split, seed=training.seed
        )
        next(found.forever())  # what is wrong with the first is said before the model is loaded
        return found

    of_evaluation = documents(arguments.eval_data) if arguments.eval_data else None
    of_training = documents(arguments.data)
    of_training.shuffle_buffer = arguments.shuffle_buffer
    return of_training, of_evaluation


class _SaveStream(TrainerCallback):
    """Writes into a checkpoint how far the stream has come; without it a resumed run reads it again from the beginning."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        rows = state.global_step * self.stream.rows_per_step
        found = next((one for one in self.stream.states if one.rows == rows), None)  # none where a worker reads it
        if found is not None and args.process_index == 0:
            Path(args.output_dir, f"checkpoint-{state.global_step}", STREAM_FILE).write_text(json.dumps(found))


def _start_of(checkpoint: Path | None) -> StreamState:
    if checkpoint is None or not (checkpoint / STREAM_FILE).exists():
        return StreamState()
    rows, place, used = json.loads((checkpoint / STREAM_FILE).read_text())
    return StreamState(rows, Place(*place), used)


def make_trainer(
    run: Run,
    model: Any,
    training: TrainingArguments,
    documents: tuple[Documents, Documents | None],
    make_rows: Callable[[Iterable[list[int]]], Iterator[dict[str, Any]]],
    collate: Callable[..., Any],
) -> PretrainTrainer:
    of_training, of_evaluation = documents
    rows = None
    if of_evaluation is not None:  # with seeds: the same blanks in each evaluation
        rows = [{**row, "seed": place} for place, row in enumerate(make_rows(of_evaluation.epoch(0)))]
    model.config.use_cache = False  # with a cache, transformers' own models do not look for packed rows
    rows_per_step = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    stream = Stream(of_training, make_rows, rows_per_step, _start_of(run.checkpoint))
    return PretrainTrainer(
        model,
        training,
        data_collator=collate,
        train_dataset=stream,
        eval_dataset=rows,  # type: ignore[arg-type]
        callbacks=[_SaveStream(stream)],
    )
