"""Pairs of answers as batches for reward models: read with their margins, split by prompt, encoded up to the ends of the answers."""

import json
import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..data.conversations import IGNORE_INDEX, Row, encode_conversation
from ..data.formats import ConversationError
from ..data.preferences import SIDES, read_pair
from .sft_data import refuse_control_tokens

# How much better the chosen answer is, and by how much its reward is to be higher (Llama 2, arXiv 2307.09288, table 27).
MARGINS = {
    "small": {"significantly better": 1.0, "better": 2 / 3, "slightly better": 1 / 3, "negligibly better": 0.0},
    "large": {"significantly better": 3.0, "better": 2.0, "slightly better": 1.0, "negligibly better": 0.0},
}


def read_rated_pair(row: Mapping[str, Any], ignore: Collection[str] = (), margins: str | None = None) -> Row:
    """A row by [`read_pair`], with its `margin`: a number or, by the column of `MARGINS` that is named, that of its `rating`.

    Raises:
        ConversationError: as there, or what says how much better the chosen answer is is missing, or none of these.
    """
    if not isinstance(row, Mapping) or margins is None:
        return read_pair(row, [*ignore, "rating"])
    rating = row.get("rating")
    if rating is not None and rating not in list(MARGINS[margins]):  # a list: a rating may be any JSON
        raise ConversationError(f"field 'rating' must be one of {', '.join(MARGINS[margins])}, got {rating!r}")
    margin = row.get("margin") if rating is None else MARGINS[margins][rating]
    if not isinstance(margin, int | float) or isinstance(margin, bool) or not 0 <= margin < float("inf"):
        raise ConversationError(f"field 'margin' must be a number from 0 on, or 'rating' be there; got {margin!r}")
    return {**read_pair(row, [*ignore, "rating"]), "margin": float(margin)}


def split_by_prompt(rows: Sequence[Row], held_out: float, seed: int) -> tuple[list[Row], list[Row]]:
    """The rows in two parts, the second with about `held_out` of the prompts, none of which is in the first.

    Raises:
        ValueError: one of the parts would be empty.
    """
    prompts = [json.dumps(row["prompt"], sort_keys=True) for row in rows]
    different = sorted(set(prompts))
    random.Random(seed).shuffle(different)
    count = round(held_out * len(different)) or 1
    if not 0 < held_out < 1 or count >= len(different):
        raise ValueError(
            f"--held_out {held_out} of {len(different)} different prompts leaves nothing to learn, or to evaluate on: give "
            "more data, a number between 0 and 1, or --eval_data"
        )
    aside = set(different[:count])
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row, prompt in zip(rows, prompts, strict=True):
        parts[prompt in aside].append(row)
    return parts


def encode_pairs(
    tokenizer: Any, rows: Sequence[Row], end_ids: Sequence[int], max_length: int | None
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """`chosen_ids` and `rejected_ids` as TRL takes them, `margin` where rows have one, and how many were left out and why.

    Each ends with the token that ends the answer, which is what a sequence classifier pools: the reward is read at "a specific
    end token" (Qwen, arXiv 2309.16609, section 3.2.1), and responses that are sampled end there, too.

    Raises:
        ConversationError: the chat template has no place for something, or the tokenizer would read a text as a control token.
        ValueError: nothing is left.
    """
    refuse_control_tokens(tokenizer, rows, ("prompt", *SIDES, "tools"))
    examples, left_out = [], Counter[str]()
    for number, row in enumerate(rows, start=1):
        example = {"margin": row["margin"]} if "margin" in row else {}
        for side in SIDES:
            answer = [{name: value for name, value in one.items() if name != "loss"} for one in row[side]]
            try:
                found = encode_conversation(tokenizer, [*row["prompt"], *answer], end_ids, tools=row["tools"])
            except ConversationError as error:
                raise ConversationError(f"pair {number}: {error}") from None
            learned = [place for place, label in enumerate(found["labels"]) if label != IGNORE_INDEX]
            example[f"{side}_ids"] = found["input_ids"][: learned[-1] + 1]
        if example["chosen_ids"] == example["rejected_ids"]:
            left_out["of two equal answers"] += 1
        elif max_length is not None and max(len(example[f"{side}_ids"]) for side in SIDES) > max_length:
            left_out[f"longer than --max_length {max_length}"] += 1
        else:
            examples.append(example)
    if not examples:
        reasons = ", ".join(f"{count} {why}" for why, count in left_out.items())
        raise ValueError(
            f"none of the {len(rows)} pairs can be learned ({reasons}): raise --max_length, or give pairs of different answers"
        )
    return examples, left_out
