"""Makes ShareGPT's conversations fit for fine-tuning: HTML to Markdown, broken ones and other languages out, long ones split.

python -m hf_cnllm.recipes.clean_sharegpt --input sharegpt.json --output conversations --tokenizer Qwen/Qwen-7B-Chat --max-length 2048

`--input` are JSON lines or one JSON list of `{"id", "conversations": [{"from", "value"}]}`. `conversations.jsonl` of the output folder
is the same format, which `hf_cnllm.recipes.sft` reads; `discarded.jsonl` has what was not taken and why, `statistics.json` the
counts. docs/data_pipelines.md
"""

import argparse
from pathlib import Path

from hf_cnllm.recipes import SettingsParser, needs_extra
from hf_cnllm.training.recipe import run_recipe


def parse_arguments() -> argparse.Namespace:
    from hf_cnllm.data.sharegpt import Settings

    parser = SettingsParser(__doc__, Settings)
    add = parser.add
    add("input", "files", nargs="+", type=Path, required=True)
    add("output", "folder for the result: new, or empty", type=Path, required=True)
    add("languages", "those to keep", nargs="+")
    add("language-model", "fastText's file; without it the scripts decide (zh, en, ja, ko)")
    add("language-threshold", "least probability, or share of letters")
    add("tokenizer", "checkpoint whose tokenizer counts; without it nothing is split")
    add("template", "its chat template, as of recipes.sft")
    add("max-length", "tokens from which a conversation is split between its rounds")
    return parser.parse_args()


def main() -> None:
    with needs_extra("data"):
        arguments = vars(parse_arguments())
        from hf_cnllm.data.sharegpt import Settings, run, token_counter

        name, template, count_tokens = arguments.pop("tokenizer"), arguments.pop("template"), None
        if name is not None:
            from transformers import AutoTokenizer

            import hf_cnllm  # noqa: F401  registers the families
            from hf_cnllm.hub.places import check_is_checkpoint
            from hf_cnllm.training.sft_data import use_template

            check_is_checkpoint(name, "--tokenizer", tokenizer_alone=True)
            tokenizer = AutoTokenizer.from_pretrained(name)
            use_template(tokenizer, template)
            count_tokens = token_counter(tokenizer)
        statistics = run(Settings(**arguments), count_tokens)
    for stage, counts in statistics.items():
        print(f"{stage:<10}", ", ".join(f"{name} {number:,}" for name, number in counts.items()) or "nothing")


if __name__ == "__main__":
    run_recipe(main)
