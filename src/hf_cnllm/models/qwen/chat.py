"""Qwen v1's own chat functions: `make_context`, `model.chat`, `model.chat_stream`, and stop words in `generate`."""

import copy
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from itertools import takewhile
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from ..chat import History, checked_history, generated_ids, iterate_tokens, prompt_inputs

DEFAULT_SYSTEM = "You are a helpful assistant."
DEFAULT_WINDOW = 6144


def make_context(
    tokenizer,
    query: str,
    history: History | None = None,
    system: str = "",
    max_window_size: int = DEFAULT_WINDOW,
    chat_format: str = "chatml",
) -> tuple[str, list[int]]:
    """The prompt for the next answer, as text and as ids.

    Of the history the latest turns stay, as many as keep the system message and them under `max_window_size` tokens. The
    query always stays. Every message is encoded alone and as plain text, so none can open or close a turn; the first
    revision's tokenizer refuses texts that hold special tokens.

    Args:
        tokenizer: a `QWenTokenizer`.
        history: earlier turns, (query, response) each.
        chat_format: `"chatml"` (chat models), or `"raw"` (base models): the query is a text to go on with, in which special
            tokens count as such.

    Raises:
        ValueError: arguments of another shape, an unknown format, or a history or system message in raw format.
    """
    history = checked_history(query, history)
    if not isinstance(system, str):
        raise ValueError(f"system must be a string, but is {system!r}.")
    if chat_format == "raw":
        if history or system:
            raise ValueError(
                "chat_format 'raw' has no place for a history or a system message: put them in the query."
            )
        return query, tokenizer.encode(query)
    if chat_format != "chatml":
        raise ValueError(
            f"chat_format is {chat_format!r}, but Qwen has 'chatml' (chat models) and 'raw' (base models)."
        )

    newline = tokenizer.encode("\n")

    def turn(role: str, content: str) -> tuple[str, list[int]]:
        ids = tokenizer.encode(role, allowed_special=()) + newline + tokenizer.encode(content, allowed_special=())
        text = f"<|im_start|>{role}\n{content}<|im_end|>"
        return text, [tokenizer.im_start_id, *ids, tokenizer.im_end_id]

    system_text, system_ids = turn("system", system)
    text = ""
    ids: list[int] = []
    for past_query, past_response in reversed(history):
        query_text, query_ids = turn("user", past_query)
        response_text, response_ids = turn("assistant", past_response)
        turn_ids = [*newline, *query_ids, *newline, *response_ids]
        if len(system_ids) + len(turn_ids) + len(ids) >= max_window_size:
            break
        text = f"\n{query_text}\n{response_text}{text}"
        ids = turn_ids + ids

    query_text, query_ids = turn("user", query)
    ids += [*newline, *query_ids, *newline, tokenizer.im_start_id, *tokenizer.encode("assistant"), *newline]
    return f"{system_text}{text}\n{query_text}\n<|im_start|>assistant\n", system_ids + ids


def get_stop_words_ids(chat_format: str, tokenizer) -> list[list[int]]:
    """What ends an answer: the end of the turn or the start of another; in raw format also a line of dialogue."""
    if chat_format == "raw":
        return [tokenizer.encode("Human:"), [tokenizer.eod_id]]
    return [[tokenizer.im_end_id], [tokenizer.im_start_id]]


class StopWordsCriteria(StoppingCriteria):
    """Ends a row when its tokens after the prompt end in one of `stop_words_ids`."""

    def __init__(self, stop_words_ids: Sequence[Sequence[int]], prompt_length: int):
        self.stop_words_ids = stop_words_ids
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        generated = input_ids[:, self.prompt_length :]
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for word in self.stop_words_ids:
            if len(word) <= generated.shape[1]:
                done |= (generated[:, -len(word) :] == generated.new_tensor(word)).all(dim=-1)
        return done


class QWenChatMixin:
    """Chat methods for `QWenLMHeadModel`, before `GenerationMixin` among its bases.

    `generation_config` gives `chat_format` (chatml unless it says raw), `max_window_size` and `stop_words_ids`, as in the
    original.
    """

    device: torch.device
    generation_config: GenerationConfig

    def chat(
        self,
        tokenizer,
        query: str,
        history: History | None = None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: Sequence[Sequence[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs,
    ) -> tuple[str, list[tuple[str, str]]]:
        """Answer `query`; returns (response, history with this turn added). `history` is left as it was.

        Args:
            history: earlier turns, (query, response) each; the oldest are left out beyond `max_window_size` tokens.
            system: the system message.
            stop_words_ids: token sequences that end the answer besides the end of the turn. They stay part of it.
            kwargs: `max_window_size`, or arguments of `generate`.
        """
        inputs, ends = self._chat_inputs(
            tokenizer, query, history, system, stop_words_ids, generation_config, **kwargs
        )
        ids = generated_ids(self, generation_config=generation_config, **inputs)
        answer = takewhile(lambda token: token not in ends, ids)
        response = tokenizer.decode(list(answer), errors="replace").strip()
        return response, [*((q, r) for q, r in history or []), (query, response)]

    def chat_stream(
        self,
        tokenizer,
        query: str,
        history: History | None = None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: Sequence[Sequence[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs,
    ) -> Iterator[str]:
        """Answer `query` step by step: yields the response so far. Arguments as in `chat`."""
        inputs, ends = self._chat_inputs(
            tokenizer, query, history, system, stop_words_ids, generation_config, **kwargs
        )
        return self._growing_text(tokenizer, iterate_tokens(self, generation_config=generation_config, **inputs), ends)

    @staticmethod
    def _growing_text(tokenizer, tokens: Generator[int], ends: set[int]) -> Iterator[str]:
        answer: list[int] = []
        with closing(tokens):
            for token in tokens:
                answer += [] if token in ends else [token]
                # A character may take several tokens: one that is not complete yet is left out.
                yield tokenizer.decode(answer, skip_special_tokens=True, errors="ignore")

    def _chat_inputs(
        self,
        tokenizer,
        query: str,
        history: History | None,
        system: str,
        stop_words_ids: Sequence[Sequence[int]] | None,
        generation_config: GenerationConfig | None,
        max_window_size: int | None = None,
        **kwargs,
    ) -> tuple[dict[str, Any], set[int]]:
        """The arguments of `generate`, and the ids that end an answer without being part of it."""
        config = self.generation_config if generation_config is None else generation_config
        chat_format = getattr(config, "chat_format", None) or "chatml"
        if max_window_size is None:
            max_window_size = getattr(config, "max_window_size", None) or DEFAULT_WINDOW
        if chat_format == "raw" and system == DEFAULT_SYSTEM:
            system = ""
        _, ids = make_context(tokenizer, query, history, system, max_window_size, chat_format)
        words = get_stop_words_ids(chat_format, tokenizer)
        inputs = {
            **prompt_inputs(ids, self.device),
            **kwargs,
            "stop_words_ids": [*_checked_stop_words(stop_words_ids), *words],
        }
        ends = _as_list(kwargs.get("eos_token_id", config.eos_token_id))
        return inputs, {*ends, *(word[0] for word in words if len(word) == 1)}

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor=None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *args,
        stop_words_ids: Sequence[Sequence[int]] | None = None,
        **kwargs,
    ):
        """As [`~GenerationMixin.generate`], and a row also ends after any of `stop_words_ids` (lists of ids).

        They stay at the end of the output. By default those of the generation configuration count.
        """
        config = self.generation_config if generation_config is None else generation_config
        if stop_words_ids is None:
            stop_words_ids = getattr(config, "stop_words_ids", None)
        words = _checked_stop_words(stop_words_ids)
        ends = _as_list(kwargs.get("eos_token_id", config.eos_token_id))
        if more_ends := [word[0] for word in words if len(word) == 1 and word[0] not in ends]:
            if generation_config is None:
                kwargs["eos_token_id"] = ends + more_ends
            else:  # transformers wants either a configuration or arguments
                generation_config = copy.deepcopy(generation_config)
                generation_config.eos_token_id = ends + more_ends
                kwargs.pop("eos_token_id", None)
        if longer := [word for word in words if len(word) > 1]:
            prompt = kwargs.get("input_ids") if inputs is None else inputs
            criterion = StopWordsCriteria(longer, 0 if prompt is None else prompt.shape[1])
            stopping_criteria = StoppingCriteriaList([*(stopping_criteria or []), criterion])
        arguments = (inputs, generation_config, logits_processor, stopping_criteria, *args)
        return super().generate(*arguments, **kwargs)


def _checked_stop_words(stop_words_ids: Any) -> list[list[int]]:
    words = [list(word) if isinstance(word, (list, tuple)) else [] for word in stop_words_ids or []]
    if not all(word and all(isinstance(token, int) for token in word) for word in words):
        raise ValueError(f"stop_words_ids must be a list of non-empty lists of token ids, but is {stop_words_ids!r}.")
    return words


def _as_list(ids: Any) -> list[int]:
    if ids is None:
        return []
    ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
    return list(ids) if isinstance(ids, (list, tuple)) else [ids]
