"""Train a chat model against a reward by PPO: with a reward model, or with a reward that is computed from the texts.

python -m hf_cnllm.recipes.ppo --config ppo_qwen.yaml --model MODEL --reward REWARD_MODEL --data FILE.jsonl --output DIR
accelerate launch -m hf_cnllm.recipes.ppo …          # on several GPUs: DDP

`--data` are conversations (docs/data.md), whose last answers are left out, or rows `{"prompt": "…"}`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
from trl import ModelConfig, get_peft_config, get_quantization_config

import hf_cnllm  # noqa: F401  registers the families
from hf_cnllm.data.conversations import (
    as_template_takes,
    encode_conversations,
    read_conversations,
    read_json_rows,
    reply_end_ids,
)
from hf_cnllm.training.critic import HEADS, Critic
from hf_cnllm.training.ppo import PPOConfig, PPOTrainer, RewardFunction
from hf_cnllm.training.ppo_equations import rise_p_value
from hf_cnllm.training.recipe import RecipeArguments, open_run, parse_arguments, run_recipe

CURVES = ("reward", "kl", "value_error", "entropy", "value_loss", "policy_loss")


def _of_responses(score: Callable[[str], float]) -> RewardFunction:
    return lambda queries, responses: [score(response) for response in responses]


def _is_chinese(character: str) -> bool:
    return "\u4e00" <= character <= "\u9fff"


# Rewards that need no model, to try a configuration with.
REWARDS: dict[str, RewardFunction] = {
    "length": _of_responses(len),
    "chinese": _of_responses(lambda response: sum(map(_is_chinese, response)) / max(len(response), 1)),
}


@dataclass
class PPOArguments(RecipeArguments):
    reward: str = field(default="", metadata={"help": f"reward model, or a reward of texts: {', '.join(REWARDS)}"})
    critic: str | None = field(
        default=None, metadata={"help": "where the critic begins; default: the reward model, else --model"}
    )
    ptx_data: list[str] | None = field(
        default=None, metadata={"help": "conversations, or .txt files with one text a line, for ptx_coefficient"}
    )
    max_prompt_length: int = field(default=512, metadata={"help": "longer queries are left out"})
    max_ptx_length: int = field(default=1024, metadata={"help": "tokens kept of a pre-training example"})


def read_queries(paths: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of conversations that end where an answer is wanted."""
    rows: list[dict[str, Any]] = []
    for path in paths:
        prompts = [value for _, value in read_json_rows(path)]
        if prompts and all(isinstance(row, dict) and row.keys() == {"prompt"} for row in prompts):
            rows += [{"messages": [{"role": "user", "content": str(row["prompt"])}], "tools": None} for row in prompts]
            continue
        for row in read_conversations(path):
            messages = row["messages"]
            while messages[-1]["role"] == "assistant":
                messages = messages[:-1]
            rows.append({"messages": messages, "tools": row["tools"]})
    return rows


def encode_queries(tokenizer: Any, rows: Sequence[dict[str, Any]], max_length: int) -> list[list[int]]:
    queries = []
    for row in rows:
        messages = as_template_takes(tokenizer, row["messages"], row["tools"])
        encoded = tokenizer.apply_chat_template(
            messages, tools=row["tools"], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        queries.append(list(encoded["input_ids"]))
    kept = [query for query in queries if len(query) <= max_length]
    if not kept:
        raise ValueError(f"all of the {len(queries)} queries are longer than --max_prompt_length {max_length}")
    if len(kept) < len(queries):
        print(f"{len(queries) - len(kept)} of {len(queries)} queries are longer than --max_prompt_length and left out")
    return kept


def read_ptx_rows(tokenizer: Any, model: Any, paths: Sequence[str], ends: Sequence[int], max_length: int) -> list[Any]:
    rows: list[Any] = []
    for path in paths:
        if Path(path).suffix != ".txt":
            found, _ = encode_conversations(tokenizer, read_conversations(path), ends, max_length)
            rows += [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in found]
            continue
        if hasattr(model.config, "has_kinds_of_blanks") and hasattr(model, "positions_of_prompt"):
            raise ValueError(f"{path}: a prefix language model learns no plain text; give --ptx_data conversations")
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            ids = tokenizer(line)["input_ids"][:max_length]
            if len(ids) > 1:
                rows.append({"input_ids": ids, "labels": ids})
    return rows


def load_reward(name: str, tokenizer: Any) -> Any:
    """A reward model with the tokenizer of the actor, or one of `REWARDS`."""
    if name in REWARDS:
        return REWARDS[name]
    if not name:
        raise ValueError(f"--reward is missing: a reward model, or one of {', '.join(REWARDS)}")
    if AutoTokenizer.from_pretrained(name).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"the reward model {name} is of another vocabulary than --model")
    model = AutoModelForSequenceClassification.from_pretrained(name)
    model.config.pad_token_id = tokenizer.pad_token_id  # what it tells the end of a response by
    return model


def main() -> None:
    arguments, training, model_options = parse_arguments(__doc__, PPOArguments, PPOConfig, ModelConfig)
    with open_run(arguments, training, model_options) as run:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {arguments.model} has no chat template, which PPO asks its queries with"
            )
        rows = read_queries(arguments.data)
        set_seed(training.seed)
        options = {
            "dtype": model_options.dtype,
            "attn_implementation": model_options.attn_implementation,
            "quantization_config": get_quantization_config(model_options),
        }
        model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, **options)
        ends = reply_end_ids(tokenizer, model.generation_config)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token_id = ends[0]
        reward = load_reward(arguments.reward, tokenizer)
        model.generation_config.eos_token_id = ends
        start = arguments.critic or (arguments.model if arguments.reward in REWARDS else arguments.reward)
        critic = Critic.from_pretrained(start, **options)
        queries = encode_queries(tokenizer, rows, arguments.max_prompt_length)
        ptx_rows = read_ptx_rows(tokenizer, model, arguments.ptx_data or [], ends, arguments.max_ptx_length)
        adapter = cast("LoraConfig | None", get_peft_config(model_options))
        if adapter is not None:
            heads = [name for name in HEADS if hasattr(critic.model, name)]
            model = get_peft_model(model, adapter)
            of_critic = dataclasses.replace(adapter, task_type="SEQ_CLS", modules_to_save=heads)
            critic = Critic(get_peft_model(critic.model, of_critic))
        trainer = PPOTrainer(model, training, queries, reward, tokenizer, critic, ends, ptx_rows=ptx_rows)
        run.train(trainer)
        history = [entry for entry in trainer.state.log_history if entry["step"] > training.critic_warmup_steps]
        rewards = [entry["reward"] for entry in history]
        quarter = max(len(rewards) // 4, 1)
        run.finish(
            trainer,
            tokenizer,
            curves=CURVES,
            reward_of_first_quarter=sum(rewards[:quarter]) / quarter if rewards else None,
            reward_of_last_quarter=sum(rewards[-quarter:]) / quarter if rewards else None,
            reward_rise_p_value=rise_p_value(rewards),
            largest_kl=max((entry["kl"] for entry in history), default=None),
        )


if __name__ == "__main__":
    run_recipe(main)
