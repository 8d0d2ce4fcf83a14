"""Queries, and the responses that a model samples to them."""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..data.conversations import ConversationError, as_template_takes, read_rows
from ..data.preferences import read_question
from ..models.glm_line.blank_positions import MASK_FIELDS
from ..models.glm_line.generation import PrefixLMGenerationMixin
from .critic import plain_model
from .ppo_equations import response_mask
from .recipe import tell_left_out


def read_queries(names: Sequence[str], ignore: Collection[str] = ()) -> list[dict[str, Any]]:
    """Rows of conversations that end where an answer is wanted, by [`read_question`]."""
    rows = read_rows(names, partial(read_question, ignore=ignore))
    return [{"messages": row["prompt"], "tools": row["tools"]} for row in rows]


def encode_queries(tokenizer: Any, rows: Sequence[dict[str, Any]], max_length: int) -> list[dict[str, Any]]:
    """The rows with their token ids, as the chat template opens the reply, as `query`; longer ones are left out.

    Raises:
        ConversationError: the template has no place for something.
        ValueError: all queries are longer.
    """
    encoded = []
    for number, row in enumerate(rows, start=1):
        try:
            messages = as_template_takes(tokenizer, row["messages"], row["tools"])
        except ConversationError as error:
            raise ConversationError(f"query {number}: {error}") from None
        query = tokenizer.apply_chat_template(
            messages, tools=row["tools"], add_generation_prompt=True, return_dict=False
        )
        encoded.append({**row, "query": query})
    kept = [row for row in encoded if len(row["query"]) <= max_length]
    tell_left_out(len(kept), len(encoded), "queries", "max_prompt_length", max_length)
    return kept


def pad_apart_from_ends(tokenizer: Any, end_ids: Sequence[int]) -> None:
    """Gives the tokenizer a padding token that ends no reply, if it has one: a reward model reads the last token that is no
    padding, which is to be the end of the reply."""
    others = [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, end_ids[0]]
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in end_ids:
        known = [one for one in others if one is not None]
        tokenizer.pad_token_id = next((one for one in known if one not in end_ids), known[-2:][0])


def tokens_out_of_place(model: Any, end_ids: Sequence[int]) -> list[int] | None:
    """Those that a prefix language model must not sample: a second start or blank would make another text of its answer."""
    plain = plain_model(model)
    if not isinstance(plain, PrefixLMGenerationMixin):
        return None
    controls = {getattr(plain.config, name) for name in (*MASK_FIELDS, "sop_token_id")}
    return sorted(controls - {None, *end_ids})


def sample_responses(
    model: Any,
    queries: Sequence[Sequence[int]],
    end_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> tuple[dict[str, Tensor], Tensor]:
    """One response to each query, all at once.

    Returns:
        `ids` and `attention` [N, P + R] of queries, padded on the left, and responses, padded on the right; `mask` [N, R], 1 on
        a response, its end token included; and whether each has one, [N].
    """
    longest, device = max(map(len, queries)), model.device
    ids = torch.tensor([[pad_id] * (longest - len(query)) + list(query) for query in queries], device=device)
    is_query = torch.tensor([[0] * (longest - len(query)) + [1] * len(query) for query in queries], device=device)
    options = GenerationConfig(
        do_sample=True,
        top_p=top_p,
        top_k=0,
        temperature=temperature,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(end_ids),
        pad_token_id=pad_id,
        suppress_tokens=tokens_out_of_place(model, end_ids),
    )
    tokens = model.generate(input_ids=ids, attention_mask=is_query, generation_config=options)[:, longest:]
    mask, has_end = response_mask(tokens, end_ids)
    tokens = tokens.masked_fill(mask == 0, pad_id)
    return {
        "ids": torch.cat([ids, tokens], 1),
        "attention": torch.cat([is_query, mask.long()], 1),
        "mask": mask,
    }, has_end


def response_texts(tokenizer: Any, batch: dict[str, Tensor]) -> list[str]:
    """The responses of such a batch, without special tokens."""
    length = batch["mask"].shape[1]
    return [
        tokenizer.decode(ids[-length:][mask.bool()], skip_special_tokens=True)
        for ids, mask in zip(batch["ids"], batch["mask"], strict=True)
    ]
