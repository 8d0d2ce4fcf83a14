"""Makes instruction data with a chat model, by Self-Instruct or in Alpaca's one call; every discard is counted with its reason.

python -m hf_cnllm.recipes.self_instruct --output instructions --tasks 1000 --model Qwen/Qwen-7B-Chat
python -m hf_cnllm.recipes.self_instruct --output instructions --tasks 1000 --style alpaca \\
    --model qwen --base-url http://localhost:8000/v1

`instructions.jsonl` of the output folder is what `hf_cnllm.recipes.sft` reads, `tasks.jsonl` the same in the format of seed tasks;
`discarded.jsonl` holds what was not taken and why, `statistics.json` the counts. A run that was interrupted goes on when the same
command is given again, and behind its end with more `--tasks`. docs/data_pipelines.md
"""

import argparse
from pathlib import Path

from hf_cnllm.recipes import SettingsParser, needs_extra
from hf_cnllm.training.recipe import run_recipe


def parse_arguments() -> argparse.Namespace:
    from hf_cnllm.data.synthetic.chat_models import add_arguments
    from hf_cnllm.data.synthetic.seeds import own_seeds
    from hf_cnllm.data.synthetic.self_instruct import STYLES, Settings

    parser = SettingsParser(__doc__, Settings)
    add = parser.add
    add("output", "folder for the result: new, or that of the run to go on with", type=Path, required=True)
    add(
        "seeds",
        "seed tasks, as Self-Instruct's seed_tasks.jsonl (default: 32 of our own)",
        type=Path,
        default=own_seeds(),
    )
    add("tasks", "tasks wanted; the batch of requests that reaches it is taken whole")
    add("style", "how they are asked for", choices=list(STYLES))
    add("languages", "of the prompts, in turn: zh, en", nargs="+")
    add("batch", "requests for tasks that are made of the same tasks")
    add("max-requests", "requests for tasks after which the run is content with what it has")
    add("rouge", "ROUGE-L from which a task is too similar to one before")
    add("max-tokens", "tokens of a reply at most")
    add("temperature", "that tasks are sampled at")
    add("top-p", "nucleus that they are sampled from")
    add("attempts", "failures after which a request is given up, each with all its --retries")
    add("seed", "of the choice of examples, and of sampling from a checkpoint")
    add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    with needs_extra("data"):
        arguments = parse_arguments()
        from hf_cnllm.data.synthetic.chat_models import opened, without_model
        from hf_cnllm.data.synthetic.self_instruct import Settings, run

        with opened(arguments, arguments.seed) as model:
            statistics = run(Settings(**without_model(arguments)), model)
    print(f"{'':<14}{'found':>8}{'kept':>8}  discarded")
    for stage in ("replies", "instructions", "instances", "tasks"):
        row = statistics[stage]
        reasons = ", ".join(f"{reason} {number}" for reason, number in row["discarded"].items())
        print(f"{stage:<14}{row['found']:>8,}{row['kept']:>8,}  {reasons or 'nothing'}")
    if not statistics["tasks"]["kept"]:
        raise ValueError(f"no task is left; {arguments.output}/discarded.jsonl has what was discarded, and why")


if __name__ == "__main__":
    run_recipe(main)
