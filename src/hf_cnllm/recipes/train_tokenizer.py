"""Trains a vocabulary as Baichuan 2's (SentencePiece) or Qwen's (tiktoken), or extends a checkpoint's, and tells how it compresses.

python -m hf_cnllm.recipes.train_tokenizer --input corpus/documents --output vocabulary --vocab-size 64000 --style baichuan
python -m hf_cnllm.recipes.train_tokenizer --input corpus/documents --output vocabulary --vocab-size 64000 --style qwen \\
    --compare Qwen/Qwen-7B baichuan-inc/Baichuan2-7B-Base --domains zh=zh.txt en=en.txt
python -m hf_cnllm.recipes.train_tokenizer --input medicine.txt --output extended --vocab-size 130000 --style baichuan \\
    --extend baichuan-inc/Baichuan2-7B-Base

`--input` are files and folders of .jsonl ({"text", …}) and .txt (a text a line), also .gz and .zst, and of .parquet. The output folder is one that
`AutoTokenizer` loads; with `--extend` it is a checkpoint. `compression.json` in it has bytes per token, by domain. docs/data_pipelines.md
"""

import argparse
import tempfile
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_cnllm  # noqa: F401  registers the families
from hf_cnllm.data.records import find_files, read_texts
from hf_cnllm.hub.places import check_is_checkpoint
from hf_cnllm.hub.saving import check_new_folder, staged_folder, write_json
from hf_cnllm.tokenization.training import (
    STYLES,
    compression,
    extend_vocabulary,
    new_tokens,
    standard_domains,
)
from hf_cnllm.training.recipe import run_recipe

SAMPLE = 1000  # records of a domain that compression is measured on


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", type=Path, required=True, help="files and folders of texts")
    parser.add_argument("--output", type=Path, required=True, help="folder for the result: new, or empty")
    parser.add_argument("--vocab-size", type=int, required=True, help="ids of the result, special tokens included")
    parser.add_argument("--style", choices=list(STYLES), required=True)
    parser.add_argument("--max-records", type=int, help="train on the first so many (default: all)")
    parser.add_argument("--symbols", type=Path, help="baichuan: file of texts, one a line, that are one token each")
    parser.add_argument(
        "--character-coverage", type=float, help="baichuan: share of characters with a piece of their own"
    )
    parser.add_argument("--threads", type=int, help="baichuan: for training")
    parser.add_argument(
        "--extend", metavar="MODEL", help="checkpoint to add the tokens to that it lacks, up to --vocab-size"
    )
    parser.add_argument(
        "--init", choices=["subtokens", "mean"], default="subtokens", help="their embeddings: the mean of"
    )
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="MODEL", help="other tokenizers to measure beside it"
    )
    parser.add_argument(
        "--domains", nargs="+", default=[], metavar="NAME=FILE", help="texts to measure compression on"
    )
    return parser.parse_args()


def read_domains(args: argparse.Namespace) -> dict[str, list[str]]:
    """Name -> texts: the input, those at hand everywhere, and those that were named."""
    places = {"input": args.input}
    for given in args.domains:
        name, _, file = given.partition("=")
        if not file:
            raise ValueError(f"--domains {given}: expected NAME=FILE")
        places[name] = [Path(file)]
    return standard_domains() | {name: list(islice(read_texts(files), SAMPLE)) for name, files in places.items()}


def train(args: argparse.Namespace, folder: Path) -> Any:
    options = {"character_coverage": args.character_coverage, "threads": args.threads}
    options = {name: value for name, value in options.items() if value is not None}
    if args.symbols is not None:
        options["symbols"] = args.symbols.read_text(encoding="utf-8-sig").splitlines()
    if options and args.style != "baichuan":
        raise ValueError(f"--style {args.style} has no {', '.join(options)}")
    skipped: Counter[str] = Counter()
    STYLES[args.style](islice(read_texts(args.input, skipped), args.max_records), folder, args.vocab_size, **options)
    if skipped:
        print(f"skipped in --input: {dict(skipped)}")
    return AutoTokenizer.from_pretrained(folder)


def extend(args: argparse.Namespace, folder: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(args.extend)
    if args.vocab_size <= len(tokenizer):
        raise ValueError(f"--vocab-size {args.vocab_size}: {args.extend} has {len(tokenizer)} ids already")
    model = AutoModelForCausalLM.from_pretrained(args.extend, dtype="auto")
    with tempfile.TemporaryDirectory() as scratch:
        trained = train(args, Path(scratch))
    tokens = new_tokens(tokenizer, trained, args.vocab_size - len(tokenizer))
    extend_vocabulary(model, tokenizer, tokens, args.init)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def main() -> None:
    args = parse_arguments()
    check_new_folder(args.output)
    if args.extend:
        check_is_checkpoint(args.extend, "--extend")
    for name in args.compare:
        check_is_checkpoint(name, "--compare", tokenizer_alone=True)
    for place in args.input:
        find_files(place)
    domains = read_domains(args)
    if not domains["input"]:
        skipped: Counter[str] = Counter()
        list(read_texts(args.input, skipped))
        raise ValueError(f"--input: there is no record with a text; skipped: {dict(skipped)} (undecodable: not UTF-8)")
    others = {name: AutoTokenizer.from_pretrained(name) for name in args.compare}
    with staged_folder(args.output) as folder:
        made = extend(args, folder) if args.extend else train(args, folder)
        table = {
            name: {domain: round(compression(tokenizer, texts), 3) for domain, texts in domains.items()}
            for name, tokenizer in {str(args.output): made, **others}.items()
        }
        write_json(folder / "compression.json", table)
    print(f"{len(made):,} ids in {args.output}; bytes per token:")
    print("\n".join(("| tokenizer | " + " | ".join(domains) + " |", "|---" * (len(domains) + 1) + "|")))
    for name, values in table.items():
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in values.values()) + " |")


if __name__ == "__main__":
    run_recipe(main)
