"""What the recipes for preferences share around TRL's trainers: the policy in its chat's form, answers with their ends, rewards.

The reference is the policy as it began: the model without its adapter or, where all weights are trained, a second one from the
same checkpoint. Both are TRL's doing.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed
from trl import ModelConfig, get_peft_config

from ..data.conversations import ConversationError, Row, as_template_takes, reply_end_ids
from ..data.preferences import Reader, read_question
from ..hub.places import check_is_checkpoint
from .models import loading_options
from .ppo_equations import rise_of
from .recipe import ChatArguments, parse_arguments, tell_left_out
from .reward import REWARDS
from .run import open_run
from .sampling import tokens_out_of_place
from .sft_data import fills_blanks, refuse_control_tokens, use_template

ANSWERS = ("chosen", "rejected", "completion")
ANSWER_IDS = ("chosen_ids", "rejected_ids", "completion_ids", "KL_completion_ids")  # TRL's columns of tokens


@dataclass
class RewardArguments(ChatArguments):
    reward: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"reward models, rewards of texts ({', '.join(REWARDS)}), or functions of your own as package.module.name, "
            "called as TRL calls them; --reward_weights weighs several"
        },
    )
    max_prompt_length: int = field(default=512, metadata={"help": "longer questions are left out"})


class Policy(NamedTuple):
    """A model that is going to be trained, and what its chats are written with."""

    model: Any
    tokenizer: Any
    end_ids: list[int]  # what ends an answer

    @classmethod
    def load(cls, arguments: ChatArguments, training: Any, options: ModelConfig) -> "Policy":
        """Raises ValueError if the model has no chats."""
        config = AutoConfig.from_pretrained(arguments.model)
        if fills_blanks(config):
            raise ValueError(f"{config.model_type} fills blanks and has no chats, which preferences are about")
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
        use_template(tokenizer, arguments.template)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        set_seed(training.seed)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, **loading_options(options))
        ends = reply_end_ids(tokenizer, model.generation_config)
        model.generation_config.eos_token_id = ends
        return cls(model, tokenizer, ends)


@dataclass
class EndedAnswers:
    """Makes batches of answers that end with the token that ends a reply, as in supervised fine-tuning: nothing stands behind
    it, and where the chat template writes none (Baichuan, ChatGLM) it is added.

    Args:
        collate: TRL's collator.
        end_ids: the tokens that end a reply; the first is the one that is added.
    """

    collate: Callable[[list[Row]], dict[str, Any]]
    end_ids: Sequence[int]

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        ended = [{name: self._ended(row[name]) for name in ANSWER_IDS if name in row} for row in rows]
        return self.collate([{**row, **answers} for row, answers in zip(rows, ended, strict=True)])

    def _ended(self, ids: Sequence[int]) -> list[int]:
        end = next((place for place, token in enumerate(ids) if token in self.end_ids), None)
        return [*ids, self.end_ids[0]] if end is None else list(ids[: end + 1])


def as_dataset(policy: Policy, rows: Sequence[Row]) -> Any:
    """A `datasets.Dataset` of rows for TRL, their prompts as the chat template takes them.

    Raises:
        ConversationError: the template has no place for something, or the tokenizer would read a text as a control token.
    """
    from datasets import Dataset, Features, Json, List

    refuse_control_tokens(policy.tokenizer, rows, ("prompt", *ANSWERS, "tools"))
    for number, row in enumerate(rows, start=1):
        try:
            row["prompt"] = as_template_takes(policy.tokenizer, row["prompt"], row["tools"])
        except ConversationError as error:
            raise ConversationError(f"conversation {number}: {error}") from None
    # Arrow's structs would give every message the fields of all others, as None.
    lists = {name: List(Json()) for name in ("prompt", *ANSWERS)}
    names = dict.fromkeys(name for row in rows for name in row)
    return Dataset.from_list(list(rows), features=Features({name: lists.get(name, Json()) for name in names}))


def train_on_answers(
    description: str, trainer_class: Any, config: type, read: Reader, collator: Any, curves: Sequence[str]
) -> None:
    """A recipe whose data are answers and what is thought of them: DPO, KTO.

    Args:
        read: one row, one of `data/preferences.py`.
        collator: from the training's arguments and the padding's id, TRL's collator.
        curves: names in the log to draw.
    """
    arguments, training, options = parse_arguments(description, ChatArguments, config, ModelConfig)
    with open_run(arguments, training, options) as run:
        rows, eval_rows = arguments.read(read)
        policy = Policy.load(arguments, training, options)
        trainer = trainer_class(
            policy.model,
            args=training,
            data_collator=EndedAnswers(collator(training, policy.tokenizer.pad_token_id), policy.end_ids),
            train_dataset=as_dataset(policy, rows),
            eval_dataset=as_dataset(policy, eval_rows) if eval_rows else None,
            processing_class=policy.tokenizer,
            peft_config=get_peft_config(options),
        )
        tell_left_out(len(trainer.train_dataset), len(rows), "questions", "max_length", training.max_length)
        run.train(trainer)
        run.finish(trainer, policy.tokenizer, curves=("loss", "eval_loss", *curves))


def train_on_rewards(description: str, trainer_class: Any, config: type) -> None:
    """A recipe whose data are questions, and whose answers are sampled and rewarded: GRPO, RLOO."""
    arguments, training, options = parse_arguments(description, RewardArguments, config, ModelConfig)
    with open_run(arguments, training, options) as run:
        rows, eval_rows = arguments.read(read_question)
        policy = Policy.load(arguments, training, options)
        rewards, tokenizers = load_rewards(arguments.reward)
        if (suppressed := tokens_out_of_place(policy.model, policy.end_ids)) is not None:
            training.generation_kwargs = {"suppress_tokens": suppressed, **(training.generation_kwargs or {})}
        trainer = trainer_class(
            policy.model,
            rewards,
            args=training,
            train_dataset=_short_enough(policy, rows, arguments.max_prompt_length),
            eval_dataset=_short_enough(policy, eval_rows, arguments.max_prompt_length) if eval_rows else None,
            processing_class=policy.tokenizer,
            reward_processing_classes=tokenizers,
            peft_config=get_peft_config(options),
        )
        run.train(trainer)
        history = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
        run.finish(
            trainer,
            policy.tokenizer,
            curves=("reward", "kl", "entropy", "loss", "eval_reward"),
            **rise_of(history),
        )


def load_rewards(names: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """What `--reward` names, as TRL's trainers take it, and the tokenizer of each that is a model.

    Raises:
        ValueError: none is named, a function is not there, or a model gives more than one number.
        OSError: a model is not there.
    """
    if not names:
        raise ValueError(
            f"--reward is missing: a reward model, one of {', '.join(REWARDS)}, or a function of your own"
        )
    rewards: list[Any] = []
    tokenizers: list[Any] = []
    for name in names:
        is_model = name not in REWARDS and (Path(name).is_dir() or "/" in name)
        rewards.append(_load_reward_model(name) if is_model else _find_reward(name))
        tokenizers.append(AutoTokenizer.from_pretrained(name) if is_model else None)
    return rewards, tokenizers


def _load_reward_model(name: str) -> Any:
    check_is_checkpoint(name, "--reward")
    model = AutoModelForSequenceClassification.from_pretrained(name)
    if model.config.num_labels != 1:
        raise ValueError(f"the reward model {name} must have one label, its reward, but has {model.config.num_labels}")
    return model


def _find_reward(name: str) -> Callable[..., Sequence[float]]:
    if name in REWARDS:
        reward = partial(_reward_of_texts, name)
        reward.__name__ = name  # type: ignore[attr-defined]  # TRL logs it under that
        return reward
    module, _, function = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--reward {name}: no folder of a reward model, none of {', '.join(REWARDS)}, and no function that can be imported "
            f"({error})"
        ) from None
    return found  # type: ignore[no-any-return]


def _reward_of_texts(name: str, prompts: Any, completions: Any, **_: Any) -> Sequence[float]:
    return REWARDS[name](prompts, [completion[0]["content"] for completion in completions])


def _short_enough(policy: Policy, rows: Sequence[Row], max_length: int) -> Any:
    """The data set of the questions that have at most `max_length` tokens.

    Raises:
        ValueError: none has, or one has tools, which TRL would drop.
    """
    if number := next((number for number, row in enumerate(rows, start=1) if row["tools"]), None):
        raise ConversationError(f"question {number} has tools, which TRL does not ask with: leave it out")
    dataset = as_dataset(policy, rows)

    def length(row: Mapping[str, Any]) -> int:
        return len(policy.tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False))

    places = [place for place, row in enumerate(dataset) if length(row) <= max_length]
    tell_left_out(len(places), len(rows), "questions", "max_prompt_length", max_length)
    return dataset.select(places)
