"""Train a chat model on the best of its own answers, again and again: rejection sampling, V1 … V5 of Llama 2-Chat.

python -m hf_cnllm.recipes.rejection_sampling --config rejection_sampling_llama2.yaml --model MODEL --reward REWARD_MODEL \
    --data FILE.jsonl --output DIR
accelerate launch -m hf_cnllm.recipes.rejection_sampling …          # each process samples its part of the queries

Each round samples answers to all queries, keeps the best to each by its reward, and learns them as recipes.sft does. `--data` are
conversations (docs/data.md), whose last answers are left out, or rows `{"prompt": …}`, a text or messages. The folder of round N holds
`samples-*.jsonl`, `selected.jsonl` and the model (or adapter); the output folder the last model, which recipes.ppo can go on with.
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, TrainingArguments
from trl import ModelConfig

import hf_cnllm  # noqa: F401  registers the families
from hf_cnllm.data.conversations import reply_end_ids
from hf_cnllm.hub.saving import is_first_process, wait_for_others, write_json_lines
from hf_cnllm.recipes.sft import SFTArguments, learn, load_model
from hf_cnllm.training.models import merged
from hf_cnllm.training.recipe import check_counts, check_sampling, parse_arguments, run_recipe
from hf_cnllm.training.rejection import best_answers, read_samples, reward_of, sample_to_file
from hf_cnllm.training.reward import QueryArguments, RewardModels, load_queries, load_reward
from hf_cnllm.training.run import SUMMARY_FILE, Run, last_complete_checkpoint, open_run
from hf_cnllm.training.sampling import pad_apart_from_ends
from hf_cnllm.training.sft_data import fills_blanks, readable_control_tokens, use_template


@dataclass
class RejectionArguments(QueryArguments):
    rounds: int = field(default=5, metadata={"help": "rounds of sampling and learning"})
    samples_per_query: int = field(
        default=10, metadata={"help": "answers sampled to each query, of which one is kept"}
    )
    queries_per_batch: int = field(default=8, metadata={"help": "queries answered at once on each process"})
    max_new_tokens: int = field(default=256, metadata={"help": "tokens of an answer at most"})
    temperature: float = field(default=1.0, metadata={"help": "that answers are sampled at"})
    top_p: float = field(default=1.0, metadata={"help": "nucleus that answers are sampled from"})
    missing_end_penalty: float = field(default=0.0, metadata={"help": "taken off an answer that does not end"})
    of_all_rounds: bool = field(
        default=True, metadata={"help": "learn the best answers of all rounds so far, not of the last alone"}
    )
    template: str | None = field(default=None, metadata={"help": "chat template, as of recipes.sft"})
    max_length: int = field(default=2048, metadata={"help": "tokens kept of a conversation that is learned"})
    z_loss_weight: float | None = field(default=None, metadata={"help": "weight of the max-z loss (Baichuan)"})


def check(arguments: RejectionArguments, training: TrainingArguments) -> None:
    """Raises ValueError for what would end a later round."""
    check_counts(arguments, "rounds", "samples_per_query", "queries_per_batch", "max_new_tokens")
    check_sampling(arguments)
    if training.eval_strategy != "no":
        raise ValueError("the rounds are evaluated by the rewards of their answers: leave --eval_strategy out")
    config = AutoConfig.from_pretrained(arguments.model)
    if fills_blanks(config):
        raise ValueError(f"{config.model_type} fills blanks, and has no chats to sample answers in")


class Versions:
    """The models V0, V1, … of a run: V0 is where it starts, V1 what it has learned in round 1.

    Args:
        output: folder of the run.
    """

    def __init__(
        self, output: Path, arguments: RejectionArguments, training: TrainingArguments, options: ModelConfig
    ) -> None:
        self.output, self.arguments, self.training, self.options = output, arguments, training, options
        self.tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        use_template(self.tokenizer, arguments.template)
        self.rows, self.safety_queries = load_queries(arguments, self.tokenizer)

    def folder(self, number: int) -> Path:
        """Of the round that samples from version `number`; behind the last round, of its samples alone."""
        return self.output / (f"round-{number + 1}" if number < self.arguments.rounds else "last-samples")

    def start(self, number: int) -> dict[str, str]:
        """What the version is loaded from: a model, or an adapter of the first one."""
        learned = str(self.folder(number - 1) / "model") if number else None
        if self.options.use_peft and learned:
            return {"model": self.arguments.model, "adapter": learned}
        return {"model": learned or self.arguments.model}

    def learning(self, number: int, **more: Any) -> SFTArguments:
        names = ("template", "max_length", "z_loss_weight")
        same = {name: getattr(self.arguments, name) for name in names}
        return SFTArguments(**self.start(number) | {"data": [], "output": ""} | same | more)

    def sample(self, number: int) -> Any:
        """Samples what is lacking of the answers of a version, and returns its model."""
        arguments, training = self.arguments, self.training
        start = self.learning(number)
        model = load_model(start, self.training, self.options)
        ends = reply_end_ids(self.tokenizer, model.generation_config)
        pad_apart_from_ends(self.tokenizer, ends)
        reward: Any = load_reward(arguments.reward, self.tokenizer, self.safety_queries)
        if isinstance(reward, RewardModels):
            reward.check(model.config.vocab_size, self.tokenizer.pad_token_id)
            reward.to(training.device).eval()
        if start.adapter is not None:
            model = PeftModel.from_pretrained(model, start.adapter)
        if not getattr(model, "is_quantized", False):
            model.to(training.device)
        place, processes = training.process_index, training.world_size
        sample_to_file(
            self.folder(number) / f"samples-{place}.jsonl",
            model,
            self.tokenizer,
            self.rows[place::processes],
            reward,
            ends,
            arguments.samples_per_query,
            arguments.queries_per_batch,
            seed=f"{training.seed} {number} {place}",
            missing_end_penalty=arguments.missing_end_penalty,
            **{name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_p")},
        )
        wait_for_others()
        return model

    def samples(self, number: int) -> list[dict[str, Any]]:
        return read_samples(sorted(self.folder(number).glob("samples-*.jsonl")))

    def learn(self, number: int) -> float | None:
        """Makes the next version, unless it is there. Returns its last loss, if that was logged."""
        folder = self.folder(number) / "model"
        if not (folder / SUMMARY_FILE).exists():
            selected = self.folder(number) / "selected.jsonl"
            if is_first_process():
                first = 0 if self.arguments.of_all_rounds else number
                samples = [one for version in range(first, number + 1) for one in self.samples(version)]
                best = best_answers(samples, readable_control_tokens(self.tokenizer))
                if not best:
                    raise ValueError(f"all answers in {self.folder(number)} are blank: there is nothing to learn")
                write_json_lines(selected, best)
                folder.mkdir(exist_ok=True)
            wait_for_others()
            arguments = self.learning(number, data=[str(selected)], output=str(folder))
            training = copy.copy(self.training)
            training.output_dir = str(folder)
            learn(Run(folder, vars(arguments), last_complete_checkpoint(folder)), arguments, training, self.options)
        loss: float | None = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))["last_loss"]
        return loss


def main() -> None:
    arguments, training, options = parse_arguments(__doc__, RejectionArguments, TrainingArguments, ModelConfig)
    with open_run(arguments, training, options) as run:
        check(arguments, training)
        versions = Versions(run.output, arguments, training, options)
        history: list[dict[str, float]] = []
        try:
            for number in range(arguments.rounds + 1):
                model = versions.sample(number)
                history.append({"step": number, **reward_of(versions.samples(number))})
                found = history[-1]
                print(f"V{number}: mean reward {found['reward']:.4g}, of the best answers {found['best_reward']:.4g}")
                if number < arguments.rounds:
                    del model  # to make room for its training
                    loss = versions.learn(number)
                    found |= {} if loss is None else {"loss": loss}
        except KeyboardInterrupt:
            raise KeyboardInterrupt(": add --resume to go on behind the answers and models that are written") from None
        model = merged(model)
        with run.saving() as folder:
            if is_first_process():
                model.save_pretrained(folder)
                versions.tokenizer.save_pretrained(folder)
                rewards = {f"{name}s": [one[name] for one in history] for name in ("reward", "best_reward")}
                run.write_summary(folder, history, ("reward", "best_reward", "loss"), **rewards)


if __name__ == "__main__":
    run_recipe(main)
