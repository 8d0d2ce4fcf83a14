"""Train a chat model against a reward by PPO: with a reward model, or with a reward that is computed from the texts.

python -m hf_cnllm.recipes.ppo --config ppo_qwen.yaml --model MODEL --reward REWARD_MODEL --data FILE.jsonl --output DIR
… --config ppo_llama2.yaml --reward HELPFUL_MODEL SAFE_MODEL --safety_data FILE.jsonl
accelerate launch -m hf_cnllm.recipes.ppo …          # on several GPUs: DDP

`--data` are conversations (docs/data.md), whose last answers are left out, or rows `{"prompt": …}`, a text or messages.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import ModelConfig, get_peft_config

import hf_cnllm  # noqa: F401  registers the families
from hf_cnllm.data.conversations import encode_conversations, labels_of_whole, read_conversations, reply_end_ids
from hf_cnllm.families import is_prefix_lm
from hf_cnllm.training.critic import Critic, adapter_of_classifier
from hf_cnllm.training.models import loading_options
from hf_cnllm.training.ppo import PPOConfig, PPOTrainer
from hf_cnllm.training.ppo_equations import rise_of
from hf_cnllm.training.pretrain_data import Documents
from hf_cnllm.training.recipe import parse_arguments, run_recipe
from hf_cnllm.training.reward import REWARDS, QueryArguments, load_queries, load_reward
from hf_cnllm.training.run import open_run
from hf_cnllm.training.sampling import pad_apart_from_ends

CURVES = ("reward", "kl", "value_error", "entropy", "value_loss", "policy_loss")


@dataclass
class PPOArguments(QueryArguments):
    critic: str | None = field(
        default=None, metadata={"help": "where the critic begins; default: the first reward model, else --model"}
    )
    ptx_data: list[str] | None = field(
        default=None, metadata={"help": "conversations, or .txt files with one text a line, for ptx_coefficient"}
    )
    max_ptx_length: int = field(default=1024, metadata={"help": "tokens kept of a pre-training example"})


def read_ptx_rows(tokenizer: Any, model: Any, paths: Sequence[str], ends: Sequence[int], max_length: int) -> list[Any]:
    rows: list[Any] = []
    for path in paths:
        if Path(path).suffix != ".txt":
            found, _ = encode_conversations(tokenizer, read_conversations(path), ends, max_length)
            rows += [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in found]
            continue
        if is_prefix_lm(model.config):
            raise ValueError(f"{path}: a prefix language model learns no plain text; give --ptx_data conversations")
        texts = (document[:max_length] for document in Documents([path], tokenizer).epoch(0))
        rows += [{"input_ids": ids, "labels": labels_of_whole(ids)} for ids in texts if len(ids) > 1]
    return rows


def main() -> None:
    arguments, training, model_options = parse_arguments(__doc__, PPOArguments, PPOConfig, ModelConfig)
    with open_run(arguments, training, model_options) as run:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {arguments.model} has no chat template, which PPO asks its queries with"
            )
        rows, safety_queries = load_queries(arguments, tokenizer)
        set_seed(training.seed)
        options = loading_options(model_options)
        model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, **options)
        ends = reply_end_ids(tokenizer, model.generation_config)
        pad_apart_from_ends(tokenizer, ends)
        reward = load_reward(arguments.reward, tokenizer, safety_queries)
        model.generation_config.eos_token_id = ends
        begins = arguments.model if arguments.reward[0] in REWARDS else arguments.reward[0]
        critic = Critic.from_pretrained(arguments.critic or begins, **options)
        ptx_rows = read_ptx_rows(tokenizer, model, arguments.ptx_data or [], ends, arguments.max_ptx_length)
        adapter = cast("LoraConfig | None", get_peft_config(model_options))
        if adapter is not None:
            model = get_peft_model(model, adapter)
            critic = Critic(get_peft_model(critic.model, adapter_of_classifier(adapter, critic.model)))
        trainer = PPOTrainer(
            model, training, [row["query"] for row in rows], reward, tokenizer, critic, ends, ptx_rows=ptx_rows
        )
        run.train(trainer)
        history = [entry for entry in trainer.state.log_history if entry["step"] > training.critic_warmup_steps]
        rewards = [entry["reward"] for entry in history]
        run.finish(
            trainer,
            tokenizer,
            curves=CURVES,
            **rise_of(rewards),
            largest_kl=max((entry["kl"] for entry in history), default=None),
        )


if __name__ == "__main__":
    run_recipe(main)
