"""Rejection sampling (Llama 2, arXiv 2307.09288, section 3.2.3): several responses to each query, their rewards, the best of them.

What was sampled is written at once, a line a query, so that nothing is sampled twice; the responses do not depend on where a run
was stopped.
"""

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from .reward import RewardFunction, RewardModels, score_responses
from .sampling import response_texts, sample_responses


def sample_to_file(
    path: Path,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    reward: RewardModels | RewardFunction,
    end_ids: Sequence[int],
    samples: int,
    batch_size: int,
    seed: str,
    missing_end_penalty: float = 0.0,
    **options: Any,
) -> None:
    """Appends to the file what it lacks of `samples` responses to each query, with their rewards:

        {"messages": […], "tools": …, "responses": ["…", …], "rewards": [0.5, …], "ended": [true, …]}

    Args:
        rows: of `encode_queries`.
        batch_size: queries answered at once.
        seed: of this file; each batch has its own from it.
        missing_end_penalty: taken off the reward of a response that does not end within `max_new_tokens`.
        options: of `sample_responses`.

    Raises:
        FloatingPointError: a reward is NaN or infinite; what was written before stays.
        ValueError: the file holds answers to other queries.
    """
    starts = range(0, len(rows), batch_size)
    done = _whole_batches(path, batch_size, rows)
    model.eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        for start in starts[done:]:
            batch = rows[start : start + batch_size]
            queries = [row["query"] for row in batch for _ in range(samples)]
            set_seed(zlib.crc32(f"{seed} {start}".encode()))
            with torch.no_grad():
                answers, has_end = sample_responses(model, queries, end_ids, tokenizer.pad_token_id, **options)
                scores = (
                    score_responses(reward, tokenizer, queries, answers, batch_size) - missing_end_penalty * ~has_end
                )
            if not torch.isfinite(scores).all():
                raise FloatingPointError(f"a reward of the queries from {start + 1} on is not finite ({path})")
            texts, rewards, ended = response_texts(tokenizer, answers), scores.tolist(), has_end.tolist()
            lines = []
            for number, row in enumerate(batch):
                mine = slice(number * samples, (number + 1) * samples)
                found = {"responses": texts[mine], "rewards": rewards[mine], "ended": ended[mine]}
                lines.append(
                    json.dumps({"messages": row["messages"], "tools": row["tools"], **found}, ensure_ascii=False)
                )
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _whole_batches(path: Path, batch_size: int, rows: Sequence[Mapping[str, Any]]) -> int:
    """How many batches the file holds; the rest of a batch, which a killed process left, is cut off."""
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    kept = len(rows) if len(lines) == len(rows) else len(lines) // batch_size * batch_size
    written = [json.loads(line)["messages"] for line in lines[:kept]]
    if written != [row["messages"] for row in rows[:kept]]:
        raise ValueError(f"{path} holds answers to other queries than --data has now: choose a new folder")
    os.truncate(path, sum(map(len, lines[:kept])))
    return -(-kept // batch_size)


def read_samples(paths: Iterable[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for path in paths for line in path.read_bytes().splitlines()]  # not at U+2028


def best_answers(samples: Iterable[Mapping[str, Any]], control_tokens: Iterable[str] = ()) -> list[dict[str, Any]]:
    """Conversations that end with the response of the highest reward to each query, over all of its samples. Blank responses, and
    texts that hold a control token, are none; a query that has no others is left out."""
    best: dict[str, tuple[float, dict[str, Any]]] = {}
    for sample in samples:
        query = json.dumps([sample["messages"], sample["tools"]])
        for text, reward in zip(sample["responses"], sample["rewards"], strict=True):
            if not text.strip() or any(token in text for token in control_tokens):
                continue
            if query not in best or reward > best[query][0]:
                messages = [*sample["messages"], {"role": "assistant", "content": text}]
                best[query] = reward, {"messages": messages, "tools": sample["tools"]}
    return [row for _, row in best.values()]


def reward_of(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean reward of all responses, and of the best to each query."""
    rewards = [sample["rewards"] for sample in samples]
    return {
        "reward": sum(map(sum, rewards)) / sum(map(len, rewards)),
        "best_reward": sum(map(max, rewards)) / len(rewards),
    }
