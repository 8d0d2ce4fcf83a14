"""Runs every recipe on every family, and writes the table of docs/training.md.

    python scripts/training_table.py                                  # all: about ten minutes of one core
    python scripts/training_table.py --recipes sft ppo --rows qwen    # those alone: the other cells stay as they were

A cell is three runs of the recipe's own command on a tiny model and the package's own instructions: one to the end, one from
its middle checkpoint on, which must log the same numbers, and the result loaded again with `from_pretrained`. Ends with an error if a
cell neither works nor is refused in one line.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import transformers  # noqa: E402
from noxfile import REPORTS  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification  # noqa: E402

from hf_cnllm.data.conversations import load_instructions  # noqa: E402
from hf_cnllm.training.recipe import run_recipe  # noqa: E402
from sft_models import ROWS, loaded, write_checkpoint  # noqa: E402

PAGE = ROOT / "docs" / "training.md"
BEGIN, END = "<!-- table of scripts/training_table.py -->", "<!-- its end -->"
OUTCOMES = ROOT / REPORTS / "training.json"
COMMON = "--use_cpu --report_to none --logging_steps 1 --disable_tqdm true --save_strategy steps"
Rows = Callable[[], list[dict[str, Any]]]


def chats() -> list[list[dict[str, str]]]:
    return load_instructions("zh")[:8] + load_instructions("en")[:8]


def conversations() -> list[dict[str, Any]]:
    return [{"messages": chat} for chat in chats()]


def prompts() -> list[dict[str, Any]]:
    return [{"prompt": chat[0]["content"]} for chat in chats()]


def texts() -> list[dict[str, Any]]:
    return [{"text": message["content"]} for chat in chats() for message in chat]


def pairs() -> list[dict[str, Any]]:
    """The answer of each conversation, preferred to that of another."""
    asked = chats()
    return [
        {"prompt": chat[0]["content"], "chosen": chat[1]["content"], "rejected": other[1]["content"]}
        for chat, other in zip(asked, asked[1:] + asked[:1], strict=True)
    ]


def judgments() -> list[dict[str, Any]]:
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs()
        for side in ("chosen", "rejected")
    ]


def log_of(output: Path, name: str) -> list[float]:
    """A curve of the trainer's log, from its last checkpoint's state."""
    states = sorted(output.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name[11:]))
    return [entry[name] for entry in json.loads(states[-1].read_text())["log_history"] if name in entry]


def metric_of(output: Path, name: str) -> list[float]:
    values: list[float] = json.loads((output / "summary.json").read_text())["metrics"][name]
    return values


def cut_at_checkpoint(whole: Path, cut: Path, step: int) -> None:
    """As if killed behind the checkpoint of that step."""
    cut.mkdir()
    shutil.copytree(whole / f"checkpoint-{step}", cut / f"checkpoint-{step}")
    shutil.copy(whole / "run.json", cut)


def cut_in_last_round(whole: Path, cut: Path, step: int) -> None:
    """As if killed in the training of the second round, behind the checkpoint of that step."""
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "last-samples")
    for path in (cut / "summary.json", cut / "round-2" / "model" / "summary.json"):
        path.unlink()
    for checkpoint in (cut / "round-2" / "model").glob("checkpoint-*"):
        if checkpoint.name != f"checkpoint-{step}":
            shutil.rmtree(checkpoint)


@dataclass(frozen=True)
class Recipe:
    """What a cell runs.

    Args:
        rows: the lines of `--data`.
        curve: what falls or rises, in what `read` reads of the output folder.
        auto: what loads the result.
        cut: makes the folder of a run that was killed half-way.
    """

    rows: Rows
    options: str
    curve: str = "loss"
    steps: int = 8
    auto: Any = AutoModelForCausalLM
    read: Callable[[Path, str], list[float]] = log_of
    cut: Callable[[Path, Path, int], None] = cut_at_checkpoint


SAMPLED = "--reward chinese --num_generations 8 --max_completion_length 8 --learning_rate 3e-3 --gradient_checkpointing false"
ANSWERS = "--max_length 128 --gradient_checkpointing false"
TEXTS = "--max_length 64 --learning_rate 1e-2 --per_device_train_batch_size 4 --shuffle_buffer 0"
RECIPES = {
    "pretrain": Recipe(texts, TEXTS),
    "pretrain_glm": Recipe(texts, TEXTS),
    "sft": Recipe(conversations, "--learning_rate 3e-3 --max_length 128"),
    "reward": Recipe(
        pairs, "--learning_rate 1e-3 --held_out 0.25 --max_length 128 --gradient_checkpointing false",
        auto=AutoModelForSequenceClassification,
    ),
    "rejection_sampling": Recipe(
        prompts, "--reward chinese --rounds 2 --samples_per_query 4 --max_new_tokens 8 --learning_rate 3e-3",
        curve="rewards", read=metric_of, cut=cut_in_last_round,
    ),
    "ppo": Recipe(
        prompts, "--reward chinese --critic_warmup_steps 1 --queries_per_device 2 --per_device_train_batch_size 4 "
        "--max_new_tokens 8 --learning_rate 1e-3",
        curve="reward",
    ),
    "dpo": Recipe(pairs, ANSWERS + " --learning_rate 1e-4"),
    "kto": Recipe(judgments, ANSWERS + " --learning_rate 1e-3", steps=16),
    "grpo": Recipe(prompts, SAMPLED, curve="reward", steps=24),
    "rloo": Recipe(prompts, SAMPLED, curve="reward", steps=24),
}  # fmt: skip


def write_row(row: str, folder: Path) -> Path:
    """The folder of this row's model: the tiny checkpoint with the row's changes of its configuration."""
    name, changes, template = ROWS[row]
    if not folder.exists():
        original = write_checkpoint(name, folder.with_name(folder.name + "-original"))
        if name == "glm" or not (changes or template):
            return original
        model, tokenizer = loaded(original, changes, template)
        model.config.use_cache = True
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def in_a_process_of_its_own(module: str, words: Sequence[Any], log: Path) -> int:
    """The exit code of a recipe's command; a fork spares the imports, which take longer than the training."""

    def command() -> None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.argv = [module, *map(str, words)]
        try:
            run_recipe(importlib.import_module(f"hf_cnllm.recipes.{module}").main)
        except Exception:
            traceback.print_exc()
            os._exit(1)

    process = multiprocessing.get_context("fork").Process(target=command)
    process.start()
    process.join()
    return int(process.exitcode or 0)


def try_cell(recipe_name: str, row: str, scratch: Path) -> tuple[bool, str]:
    """Whether all is well, and the text of the cell."""
    recipe = RECIPES[recipe_name]
    model = write_row(row, scratch / row.replace(" ", "-"))
    data = scratch / f"{recipe_name}.jsonl"
    data.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in recipe.rows()), encoding="utf-8")
    output, half = scratch / f"{recipe_name}-{row}", recipe.steps // 2
    told = f"--max_steps {recipe.steps} --save_steps {half} {COMMON} {recipe.options}"
    words = ["--model", model, "--data", data, *told.split()]
    log = scratch / f"{recipe_name}-{row}.log"
    if code := in_a_process_of_its_own(recipe_name, [*words, "--output", output], log):
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""]
        if code != 2:
            print("\n".join(lines[-30:]))
        sentence = lines[-1].split("error: ", 1)[-1].replace(str(model), "MODEL")
        return code == 2, f"refused: {sentence}" if code == 2 else "FAILED"
    whole = recipe.read(output, recipe.curve)
    second = scratch / f"{recipe_name}-{row}-resumed"
    recipe.cut(output, second, half)
    code = in_a_process_of_its_own(recipe_name, [*words, "--output", second, "--resume"], log)
    resumed = not code and recipe.read(second, recipe.curve) == whole
    auto = AutoModelForSeq2SeqLM if ROWS[row][0] == "glm" else recipe.auto
    auto.from_pretrained(output)
    shutil.rmtree(output), shutil.rmtree(second)
    if not resumed:
        print(log.read_text()[-3000:])
    return resumed, f"{whole[0]:.3g} → {whole[-1]:.3g}" + ("" if resumed else ", NOT RESUMED")


def page(outcomes: dict[str, dict[str, str]]) -> str:
    sentences: dict[str, int] = {}
    lines = [f"| | {' | '.join(RECIPES)} |", "|---|" + "---|" * len(RECIPES)]
    for row in ROWS:
        cells = []
        for recipe in RECIPES:
            text = outcomes.get(recipe, {}).get(row, "not tried")
            if text.startswith("refused: "):
                text = f"— ({sentences.setdefault(text[9:], len(sentences) + 1)})"
            cells.append(text)
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {sentence}" for sentence, number in sentences.items())])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    outcomes = json.loads(OUTCOMES.read_text()) if OUTCOMES.is_file() else {}
    OUTCOMES.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for recipe in options.recipes:
            for row in options.rows:
                good, text = try_cell(recipe, row, Path(scratch))
                failed += not good
                outcomes.setdefault(recipe, {})[row] = text
                print(f"{recipe:20}{row:20}{text}", flush=True)
                OUTCOMES.write_text(json.dumps(outcomes, indent=1, ensure_ascii=False))
    before, _, rest = options.page.read_text(encoding="utf-8").partition(BEGIN)
    text = before + BEGIN + "\n\n" + page(outcomes) + "\n\n" + END + rest.partition(END)[2]
    options.page.write_text(text, encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
