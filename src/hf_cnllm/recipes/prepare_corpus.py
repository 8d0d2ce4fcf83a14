"""Makes a corpus for pre-training of raw texts: duplicates, bad text and personal data go, and each stage is counted.

python -m hf_cnllm.recipes.prepare_corpus --input crawl/ books.jsonl.gz --output corpus
python -m hf_cnllm.recipes.prepare_corpus --input crawl/ --output corpus --workers 8 \\
    --stages exact,language,heuristics,paragraph,minhash,pii --tokenizer Qwen/Qwen-7B

`--input` are files and folders of .jsonl ({"id", "text", …}) and .txt (a document a line), also .gz and .zst, and of .parquet. Documents
that are left are in `documents/*.jsonl` of the output folder, counts in `statistics.json`, their picture in `funnel.png`, and with
`--tokenizer` packed rows of token ids in `tokens/*.parquet`. A run that was interrupted goes on when the same command is given again. docs/data_pipelines.md
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from hf_cnllm.recipes import SettingsParser, needs_extra
from hf_cnllm.training.recipe import run_recipe


def as_value(word: str) -> Any:
    """A number, a switch or an object of JSON; else the word itself."""
    try:
        return json.loads(word)
    except ValueError:
        return word


def parse_arguments() -> argparse.Namespace:
    from hf_cnllm.data.corpus import STAGES, Settings
    from hf_cnllm.data.corpus.executors import EXECUTORS

    parser = SettingsParser(__doc__, Settings)
    add, default = parser.add, parser.defaults
    add("input", "files and folders", nargs="+", type=Path, required=True)
    add("output", "folder for the result: new, or that of the run to go on with", type=Path, required=True)
    stages = ",".join(default["stages"])
    add("stages", f"any of {', '.join(STAGES)}, in this order or another (default: {stages})", default=stages)
    add("executor", "who runs the tasks", choices=list(EXECUTORS))
    add(
        "executor-options",
        "of datatrove's executor, as JSON or words; slurm needs time=24:00:00 partition=NAME (of a job, as sbatch's), and "
        """takes cpus_per_task=1 mem_per_cpu_gb=2 qos=normal env_command='module load …' sbatch_args='{"account": "…"}' …""",
        nargs="+",
        metavar="NAME=VALUE",
    )
    add("workers", "tasks at a time; -1 for all")
    add("shard-bytes", "larger files are cut into tasks of that size; gzip is not")
    add("max-line-bytes", "longer lines are skipped")
    add("jaccard", "minhash: similarity of 5-grams from which documents are duplicates")
    add("min-paragraph-words", "paragraph: shorter ones may repeat")
    add("embedder", "embedding: checkpoint whose hidden states are compared")
    add("embedding-threshold", "embedding: cosine from which documents are duplicates")
    add("languages", "language: those to keep", nargs="+")
    add("language-model", "language: fastText's file; without it the scripts decide (zh, en, ja, ko)")
    add("language-threshold", "language: least probability, or share of letters")
    add("min-words", "heuristics: fewer words (characters in Chinese) are too few")
    add("quality-good", "quality: files and folders of good examples to train on", nargs="+", type=Path)
    add("quality-bad", "quality: of bad ones", nargs="+", type=Path)
    add("quality-model", "quality: folder of a classifier trained before (`SentenceClassifier.save`)")
    add("quality-threshold", "quality: least probability of a sentence to be good")
    add("decontaminate", "decontamination: files of benchmarks (.jsonl, .txt)", nargs="+", type=Path)
    add("decontamination-ngrams", "decontamination: words in a row that must not be shared")
    add(
        "weights",
        "mix: one for each --input; 0.5 takes half of its documents, 2 takes each twice",
        nargs="+",
        type=float,
    )
    add("tokenizer", "checkpoint whose tokenizer packs the result into rows of token ids")
    add("sequence-length", "tokens in a row")
    arguments = parser.parse_args()
    arguments.stages = [name for name in arguments.stages.split(",") if name]
    options = dict(option.partition("=")[::2] for option in arguments.executor_options)
    arguments.executor_options = {name: as_value(value) for name, value in options.items()}
    return arguments


def main() -> None:
    with needs_extra("data"):
        arguments = parse_arguments()
        from hf_cnllm.data.corpus import Settings, run
    settings = Settings(**vars(arguments))
    statistics = run(settings)
    if statistics is None:
        print(f"submitted; {settings.output}/statistics.json is written last")
        return
    print(f"{'stage':<16}{'documents':>12}{'bytes':>16}")
    for row in ({"stage": "input", **statistics["input"]}, *statistics["stages"]):
        print(f"{row['stage']:<16}{row['documents']:>12,}{row['bytes']:>16,}")
    print(f"skipped: {statistics['input']['skipped'] or 'nothing'}")


if __name__ == "__main__":
    code = 0
    try:
        run_recipe(main)
    except SystemExit as end:
        code = int(end.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # after a pool of workers, the interpreter's last garbage collection was seen to hang
