"""One training in an output folder that it owns: checkpoints that are known to be whole, resuming from them, and what it
leaves behind.

The output folder then loads with plain `from_pretrained`; `summary.json` and `curves.png` lie in it, and the checkpoints of
the training as `checkpoint-N`.
"""

import contextlib
import dataclasses
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from transformers import TrainerCallback, TrainingArguments

from .._stack import LIBRARIES, installed_version, own_version
from ..data.owned_folder import LOCK_FILE, RUN_FILE, exclusive
from ..hub.places import check_is_checkpoint, is_adapter_alone, refuse_classifier
from ..hub.saving import (
    FullDiskError,
    failed_write,
    is_first_process,
    staged_folder,
    wait_for_others,
    write_json,
    write_through,
)
from .curves import draw_curves
from .processes import gather_whole_model
from .recipe import RecipeArguments

SUMMARY_FILE, CURVES_FILE = "summary.json", "curves.png"
COMPLETE_FILE = "complete"  # in a checkpoint: all processes have written all of it
FINAL_FOLDER = ".final"  # until what is saved last moves into the output folder
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Arguments that do not change the sequence of losses, so a resumed run may have others.
MAY_DIFFER = re.compile(
    r"logging_.*|log_.*|save_.*|report_to|run_name|project|trackio_.*|hub_.*|push_to_hub|disable_tqdm|output.*|resume.*|"
    r"dataloader_(num_workers|prefetch_factor|pin_memory|persistent_workers)|eval_.*|do_.*|local_rank|dataset_num_proc"
)


def stop_at_non_finite(loss: torch.Tensor, inputs: Any, args: TrainingArguments, step: int) -> None:
    """Raises FloatingPointError if the loss is NaN or infinite, with the batch that it comes from saved."""
    if not torch.isfinite(loss).all():
        path = Path(args.output_dir, f"non-finite-loss-step-{step}-process-{args.process_index}.pt")
        torch.save(inputs, path)
        raise FloatingPointError(
            f"the loss is {loss.item()} at step {step}; the batch is in {path}. Lower the learning rate, or look for what is "
            "odd in these examples, and go on with --resume."
        )


class StopAtNonFiniteLoss:
    """Stands in front of a Trainer: the first loss that is NaN or infinite ends the training, with the batch saved."""

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]
        trainer: Any = self
        stop_at_non_finite(loss, inputs, trainer.args, trainer.state.global_step)
        return loss


class _MarkComplete(TrainerCallback):
    """Marks a checkpoint once every process has written its part of it and it is on the disk."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        wait_for_others()
        if is_first_process():
            write_through(folder)
            (folder / COMPLETE_FILE).touch()


class _LogTheLastStep(TrainerCallback):
    """Logs the end of a training whose number of steps `logging_steps` does not divide, or is above."""

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True


class _HasEndedError(Exception):
    pass


class _EndWhereItEnded(TrainerCallback):
    """Ends a training that was killed after its last step, which Trainer would follow with one more."""

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if 0 < state.max_steps <= state.global_step and not args.load_best_model_at_end:  # by now all is loaded
            raise _HasEndedError


def _checkpoints(output: Path) -> list[Path]:
    steps = {int(found[1]): path for path in output.iterdir() if (found := CHECKPOINT.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps)]


def complete_checkpoints(output: Path) -> list[Path]:
    """The checkpoints that were written to their ends, oldest first; those that a killed process left are passed over."""
    return [path for path in _checkpoints(output) if (path / COMPLETE_FILE).exists()]


def _remove_half_written(output: Path) -> None:
    incomplete = [path for path in _checkpoints(output) if not (path / COMPLETE_FILE).exists()]
    for path in (*incomplete, *output.glob(f".{FINAL_FOLDER}-*")):
        shutil.rmtree(path, ignore_errors=True)


def last_complete_checkpoint(output: Path) -> Path | None:
    return next(reversed(complete_checkpoints(output)), None)


@dataclass
class Run:
    """One training in its output folder. A trainer is transformers' or has what is used of it here, as `PPOTrainer`."""

    output: Path
    told: dict[str, Any]  # every argument, by name
    checkpoint: Path | None  # what it goes on from
    started: float = field(default_factory=time.monotonic)

    def train(self, trainer: Any) -> None:
        """Trains, from the last complete checkpoint on if the run is resumed."""
        trainer.add_callback(_MarkComplete())
        trainer.add_callback(_LogTheLastStep())
        if self.checkpoint is None:
            trainer.train()
            return
        trainer.add_callback(_EndWhereItEnded())
        with contextlib.suppress(_HasEndedError):
            trainer.train(resume_from_checkpoint=str(self.checkpoint))

    def finish(self, trainer: Any, tokenizer: Any = None, curves: Sequence[str] = ("loss",), **metrics: Any) -> None:
        """Saves the model, the tokenizer, the picture of the curves and, last, the summary.

        Args:
            curves: names in the trainer's log to draw.
            metrics: what else was measured, for the summary.
        """
        gather_whole_model(trainer)
        trainer.model.config.use_cache = True  # Trainer switches it off; whoever loads the result wants to generate
        history = trainer.state.log_history
        with self.saving() as folder:
            trainer.save_model(str(folder))
            if is_first_process():
                if tokenizer is not None:
                    tokenizer.save_pretrained(folder)
                self.write_summary(folder, history, curves, **metrics)

    @contextlib.contextmanager
    def saving(self) -> Iterator[Path]:
        """A folder, the same to all processes, whose contents move into the output folder once they are on the disk: what
        makes it load comes last."""
        final = self.output / FINAL_FOLDER
        with staged_folder(final, check=lambda _: None) as folder:
            yield folder
        if is_first_process():
            for path in sorted(final.iterdir(), key=lambda path: (path.name == SUMMARY_FILE, "config" in path.name)):
                if path.is_dir():  # a file is replaced, a folder of a run that was killed here is not
                    shutil.rmtree(self.output / path.name, ignore_errors=True)
                path.replace(self.output / path.name)
            final.rmdir()
        wait_for_others()

    def write_summary(
        self, folder: Path, history: Sequence[Mapping[str, Any]], curves: Sequence[str], **metrics: Any
    ) -> None:
        """Draws the curves of a trainer's log, and writes the first and last values of the loss, metrics and versions."""
        points = {
            name: [(entry["step"], entry[name]) for entry in history if isinstance(entry.get(name), int | float)]
            for name in curves
        }
        points = {name: curve for name, curve in points.items() if curve}
        draw_curves(folder / CURVES_FILE, points)
        losses = [entry["loss"] for entry in history if "loss" in entry]
        summary = {
            "recipe": Path(sys.argv[0]).stem,
            "model": self.told["model"],
            "data": self.told["data"],
            "steps": max((entry.get("step", 0) for entry in history), default=0),
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "metrics": metrics,
            "resumed_from": None if self.checkpoint is None else self.checkpoint.name,
            "seconds": round(time.monotonic() - self.started, 1),
            "versions": {"hf-cnllm": own_version()}
            | {name: found for name in LIBRARIES if (found := installed_version(name)) is not None},
        }
        write_json(folder / SUMMARY_FILE, summary, default=str)


@contextlib.contextmanager
def open_run(arguments: RecipeArguments, training: TrainingArguments, *others: Any) -> Iterator[Run]:
    """Takes the output folder for one run, and decides where it begins.

    Args:
        others: further objects of arguments; all of them are compared when a run is resumed.

    Raises:
        ValueError: the folder is another run's, complete, in use, or there is nothing to resume.
        FileExistsError: the folder has something in it, and `--resume` was not given.
        FileNotFoundError: a checkpoint is not there that an option names.
    """
    output = Path(arguments.output)
    training.output_dir = str(output)
    if training.save_total_limit == 1:
        raise ValueError("save_total_limit must be at least 2: the last checkpoint stays until the next is complete")
    told = {"processes": training.world_size} | {
        name: value
        for one in (arguments, training, *others)
        for name, value in dataclasses.asdict(one).items()
        if not name.startswith("_")
    }
    for option in ("model", "config_name", "adapter", "critic"):
        if (name := told.get(option)) is not None:
            # A configuration of its own leaves the tokenizer to --model.
            alone = option == "model" and told.get("config_name") is not None
            check_is_checkpoint(name, f"--{option}", tokenizer_alone=alone)
            _check_kind(option, name, has_adapter_option="adapter" in told)
            if option == "model" and not (alone or arguments.takes_classifiers):
                refuse_classifier(name, f"--{option}")
    told = json.loads(json.dumps(told, default=str))
    with contextlib.ExitStack() as stack:
        if training.process_index == 0:
            _take_folder(output, arguments.resume, told, stack)
        wait_for_others()
        try:
            yield Run(output, told, last_complete_checkpoint(output))
        except KeyboardInterrupt as interrupt:
            if interrupt.args:  # of a run within this one
                raise
            raise KeyboardInterrupt(f": {_what_is_left(output)}") from interrupt
        except Exception as error:
            # What several processes write together fails together.
            first = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            if (cause := failed_write(first)) is None:
                raise
            advice = _what_is_left(output) if last_complete_checkpoint(output) else None
            raise FullDiskError(output, cause, advice) from error
        finally:
            if training.process_index == 0:
                _remove_half_written(output)


def _check_kind(option: str, name: str, has_adapter_option: bool) -> None:
    """Raises ValueError for an adapter in the place of a model, and the other way round."""
    is_adapter = is_adapter_alone(name)
    if option != "adapter" and is_adapter:
        other = f", or give its base model, --use_peft and --adapter {name}" if has_adapter_option else ""
        raise ValueError(
            f"--{option}: {name} is an adapter: merge it into its base model (PEFT's merge_and_unload) first{other}"
        )
    if option == "adapter" and not is_adapter and Path(name).is_dir():
        raise ValueError(f"--{option}: {name} is a model and no adapter: give it as --model")


def _what_is_left(output: Path) -> str:
    last = last_complete_checkpoint(output)
    return f"add --resume to go on from {last.name}" if last else "no checkpoint was complete yet"


def _leave_nothing_of_a_run_that_did_nothing(output: Path) -> None:
    names = {path.name for path in output.iterdir()}
    if names <= {RUN_FILE, LOCK_FILE, "README.md"}:  # TRL writes that before the first checkpoint
        for name in names:
            (output / name).unlink()
        output.rmdir()


def _take_folder(output: Path, resume: bool, told: dict[str, Any], stack: contextlib.ExitStack) -> None:
    record = output / RUN_FILE
    if resume and not record.is_file():
        raise ValueError(f"there is no run to resume in {output}; leave --resume out to start one")
    if not resume and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"--output {output} is not empty: choose a new folder, or go on with --resume")
    output.mkdir(parents=True, exist_ok=True)
    stack.enter_context(exclusive(output))
    _remove_half_written(output)  # of a run that was killed
    stack.callback(_leave_nothing_of_a_run_that_did_nothing, output)
    if (output / SUMMARY_FILE).exists():
        raise ValueError(f"the run in {output} is complete; there is nothing to resume")
    if not resume:
        write_json(record, told)
        return
    before = json.loads(record.read_text(encoding="utf-8"))
    changed = [
        f"{name} was {before.get(name)!r} and is {told.get(name)!r}"
        for name in sorted(before.keys() | told.keys())
        if not MAY_DIFFER.fullmatch(name) and before.get(name) != told.get(name)
    ]
    if changed:
        raise ValueError(f"{output} is the folder of another run: {'; '.join(changed[:5])}. Choose a new folder")
