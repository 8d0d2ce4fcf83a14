"""Compares two files of answers by a chat model that sees each pair in both orders; a table by category.

python -m hf_cnllm.recipes.judge --answers mine.jsonl theirs.jsonl --output verdicts --model Qwen/Qwen-14B-Chat
python -m hf_cnllm.recipes.judge --answers mine.jsonl theirs.jsonl --output verdicts \\
    --model qwen --base-url http://localhost:8000/v1 --questions questions.jsonl

Questions are rows `{"question_id", "category", "text"}`, answers `{"question_id", "text"}`, as in Vicuna's files. An answer wins if the
judge prefers it in both orders. `verdicts.jsonl` of the output folder has the verdicts, `statistics.json` and `table.md` the
counts. A run that was interrupted goes on when the same command is given again. docs/data_pipelines.md
"""

import argparse
from pathlib import Path

from hf_cnllm.recipes import SettingsParser, needs_extra
from hf_cnllm.training.recipe import run_recipe


def parse_arguments() -> argparse.Namespace:
    from hf_cnllm.data.synthetic.chat_models import add_arguments
    from hf_cnllm.data.synthetic.judge import Settings, own_questions

    parser = SettingsParser(__doc__, Settings)
    parser.add("answers", "two files: of A and of B", nargs=2, type=Path, required=True)
    parser.add("output", "folder for the result: new, or that of the run to go on with", type=Path, required=True)
    parser.add("questions", "what they answer (default: 32 of our own)", type=Path, default=own_questions())
    parser.add("max-tokens", "tokens of a verdict with its reasons at most")
    parser.add("attempts", "failures after which a request is given up, each with all its --retries")
    add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    with needs_extra("data"):
        arguments = parse_arguments()
        from hf_cnllm.data.synthetic.chat_models import opened, without_model
        from hf_cnllm.data.synthetic.judge import Settings, run, table

        with opened(arguments) as model:
            statistics = run(Settings(**without_model(arguments)), model)
    print(table(statistics), end="")
    print(f"not judged: {statistics['not_judged'] or 'nothing'}")


if __name__ == "__main__":
    run_recipe(main)
