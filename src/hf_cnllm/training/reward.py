"""Rewards of responses: of a reward model, of two as one, or computed from the texts."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from ..hub.places import check_is_checkpoint
from .critic import inputs_of
from .recipe import RecipeArguments
from .sampling import encode_queries, read_queries, response_texts

RewardFunction = Callable[[list[str], list[str]], Sequence[float]]
"""Queries and responses as texts, special tokens left out of the responses -> a reward each."""


def _of_responses(score: Callable[[str], float]) -> RewardFunction:
    return lambda queries, responses: [score(response) for response in responses]


def _is_chinese(character: str) -> bool:
    return "\u4e00" <= character <= "\u9fff"


# Rewards that need no model, to try a configuration with.
REWARDS: dict[str, RewardFunction] = {
    "length": _of_responses(len),
    "chinese": _of_responses(lambda response: sum(map(_is_chinese, response)) / max(len(response), 1)),
}
UNSAFE = 0.15  # probability of being safe below which an answer's safety is all that counts (Llama 2, section 3.2.3)


def combined_rewards(helpful: Tensor, safe: Tensor, is_safety: Tensor, unsafe: float = UNSAFE) -> Tensor:
    """The reward of a helpful and a safe reward model, before it is whitened (Llama 2, arXiv 2307.09288, section 3.2.3):

        R_c = R_s if the query is one of safety or R_s < 0.15, else R_h;   R = whiten(logit(R_c))

    Args:
        helpful, safe: [N] what the models return; their sigmoids are the R_h and R_s of the paper.
        is_safety: [N] whether the query belongs to those of safety.

    Returns:
        [N] logit(R_c). PPO whitens it by its running moments (`normalize_rewards`); the order of answers needs no whitening.
    """
    return torch.where(is_safety | (safe.sigmoid() < unsafe), safe, helpful)


class RewardModels(nn.Module):
    """One reward model, or a helpful and a safe one, asked about queries with responses.

    Args:
        models: sequence classifiers with one label.
        safety_queries: token ids of those queries whose answers the second model judges alone.

    Raises:
        ValueError: a model is no reward model, or the number of models is not one or two.
    """

    def __init__(self, *models: PreTrainedModel, safety_queries: Iterable[Sequence[int]] = ()) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)
        self.safety_queries = {tuple(query) for query in safety_queries}
        if len(models) not in (1, 2):
            raise ValueError(
                f"a reward is that of one model, or of a helpful and a safe one, got {len(models)} models"
            )
        if len(models) == 1 and self.safety_queries:
            raise ValueError("the queries of safety need a second reward model, that of safety")

    def check(self, vocabulary: int, pad_id: int) -> None:
        """Raises ValueError if the models are of another vocabulary or would read the padding."""
        for model in self.models:
            config: Any = model.config
            if config.vocab_size != vocabulary:
                raise ValueError(
                    f"the reward model is of another vocabulary: {config.vocab_size} tokens, the actor has {vocabulary}"
                )
            if (config.num_labels, config.pad_token_id) != (1, pad_id):
                raise ValueError(
                    f"a reward model has one label and finds the end of a response by the tokenizer's pad_token_id, {pad_id}; "
                    f"the config of this one has num_labels {config.num_labels} and pad_token_id {config.pad_token_id}"
                )

    def forward(self, queries: Sequence[Sequence[int]], ids: Tensor, attention: Tensor) -> Tensor:
        """[N] rewards of rows of `ids` and `attention` [N, length], which hold the queries and responses to them."""
        scores = [model(**inputs_of(model, ids, attention)).logits[:, 0].float() for model in self.models]
        if len(scores) == 1:
            return scores[0]
        is_safety = [tuple(query) in self.safety_queries for query in queries]
        helpful, safe = scores
        return combined_rewards(helpful, safe, torch.tensor(is_safety, device=ids.device))


@dataclass
class QueryArguments(RecipeArguments):
    """What recipes are told that answer queries and have the answers rewarded."""

    reward: list[str] = field(
        default_factory=list,
        metadata={"help": f"reward model, a helpful and a safe one, or a reward of texts: {', '.join(REWARDS)}"},
    )
    safety_data: list[str] | None = field(
        default=None, metadata={"help": "further queries as --data, whose answers the safe reward model judges alone"}
    )
    ignore_fields: list[str] | None = field(default=None, metadata={"help": "fields of the data to leave out"})
    max_prompt_length: int = field(default=512, metadata={"help": "longer queries are left out"})


def load_reward(
    names: Sequence[str], tokenizer: Any, safety_queries: Iterable[Sequence[int]] = ()
) -> RewardModels | RewardFunction:
    """One of `REWARDS`, or one or two reward models with the vocabulary of `tokenizer`.

    Raises:
        ValueError: there is no name, there are too many, or a model is of another vocabulary.
    """
    if len(names) == 1 and names[0] in REWARDS and not safety_queries:
        return REWARDS[names[0]]
    if not any(names) or REWARDS.keys() & set(names):
        raise ValueError(
            "--reward is missing or mixed: it is one reward model, a helpful and a safe one, or one of "
            f"{', '.join(REWARDS)} (without --safety_data); got {' '.join(names)!r}"
        )
    models = []
    for name in names:
        check_is_checkpoint(name, "--reward")
        if AutoTokenizer.from_pretrained(name).get_vocab() != tokenizer.get_vocab():
            raise ValueError(f"the reward model {name} is of another vocabulary than --model")
        model = AutoModelForSequenceClassification.from_pretrained(name)
        model.config.pad_token_id = tokenizer.pad_token_id  # what it tells the end of a response by
        models.append(model)
    return RewardModels(*models, safety_queries=safety_queries)


def load_queries(arguments: QueryArguments, tokenizer: Any) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """The rows of `--data` and `--safety_data` by `encode_queries`, and the queries of the latter."""
    rows, safety_rows = (
        encode_queries(tokenizer, read_queries(paths, arguments.ignore_fields or ()), arguments.max_prompt_length)
        if paths
        else []
        for paths in (arguments.data, arguments.safety_data)
    )
    return rows + safety_rows, [row["query"] for row in safety_rows]


def score_responses(
    reward: RewardModels | RewardFunction,
    tokenizer: Any,
    queries: Sequence[Sequence[int]],
    batch: dict[str, Tensor],
    batch_size: int,
) -> Tensor:
    """[N] rewards of the responses in a batch of `sample_responses` to the queries, models asked about `batch_size` at once.

    Raises:
        ValueError: a function returned another number of rewards.
    """
    if isinstance(reward, RewardModels):
        rows = zip(batch["ids"].split(batch_size), batch["attention"].split(batch_size), strict=True)
        starts = range(0, len(queries), batch_size)
        return torch.cat([reward(queries[at : at + batch_size], *row) for at, row in zip(starts, rows, strict=True)])
    responses = response_texts(tokenizer, batch)
    scores = reward([tokenizer.decode(query) for query in queries], responses)
    if len(scores) != len(responses):
        raise ValueError(f"the reward function returned {len(scores)} rewards for {len(responses)} responses")
    return torch.tensor(scores, dtype=torch.float32, device=batch["ids"].device)
