"""Qwen v1's own chat functions: `make_context`, `model.chat` and `model.chat_stream`."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from transformers import GenerationConfig

from ...tokenization.rendered_chat import RenderedChat
from ..chat import History, checked_history, generated_tokens, iterate_tokens
from .generation_qwen import checked_stop_words, end_token_ids, setting
from .tokenization_qwen import IMEND, IMSTART

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
    """The prompt for the next answer, as text (a `RenderedChat`, of which the tokenizer makes the same ids) and as ids.

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

    def turn(role: str, content: str) -> tuple[list[tuple[str, bool]], list[int]]:
        ids = tokenizer.encode(role, allowed_special=()) + newline + tokenizer.encode(content, allowed_special=())
        sections = [(IMSTART, True), (role, False), ("\n", False), (content, False), (IMEND, True)]
        return sections, [tokenizer.im_start_id, *ids, tokenizer.im_end_id]

    first = turn("system", system)
    past: list[tuple[list[tuple[str, bool]], list[int]]] = []
    room = max_window_size - len(first[1])
    for past_query, past_response in reversed(history):
        pair = [turn("user", past_query), turn("assistant", past_response)]
        room -= sum(len(newline) + len(ids) for _, ids in pair)
        if room <= 0:
            break
        past = pair + past
    opening = [(IMSTART, True), ("assistant", False)], [tokenizer.im_start_id, *tokenizer.encode("assistant")]
    turns, ids = zip(first, *past, turn("user", query), opening, strict=True)
    text = RenderedChat.join(section for sections in turns for section in [*sections, ("\n", False)])
    return text, [token for turn_ids in ids for token in [*turn_ids, *newline]]


def get_stop_words_ids(chat_format: str, tokenizer) -> list[list[int]]:
    """What ends an answer: the end of the turn or the start of another; in raw format also a line of dialogue."""
    if chat_format == "raw":
        return [tokenizer.encode("Human:"), [tokenizer.eod_id]]
    return [[tokenizer.im_end_id], [tokenizer.im_start_id]]


class QWenChatMixin:
    """Chat methods for `QWenLMHeadModel`, before `GenerationMixin` among its bases.

    `generation_config` gives `chat_format` (chatml unless it says raw), `max_window_size` and `stop_words_ids`, as in the
    original.
    """

    generation_config: GenerationConfig

    def chat(
        self,
        tokenizer,
        query: str,
        history: History | None = None,
        system: str = DEFAULT_SYSTEM,
        append_history: bool = True,
        stream: None = None,
        stop_words_ids: Sequence[Sequence[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs,
    ) -> tuple[str, list[tuple[str | None, str | None]]]:
        """Answer `query`; returns (response, history with this turn added). `history` is left as it was.

        Args:
            history: earlier turns, (query, response) each; the oldest are left out beyond `max_window_size` tokens.
            append_history: whether the history that is returned has this turn.
            stream: not here, see `chat_stream`.
            stop_words_ids: token sequences that end the answer besides the end of the turn. They stay part of it.
            kwargs: `max_window_size`, or arguments of `generate`.
        """
        if stream is not None:
            raise ValueError(
                "chat answers at once: call chat_stream for an answer as it grows, and leave out `stream`."
            )
        prompt, ends, arguments = self._chat_inputs(
            tokenizer, query, history, system, stop_words_ids, generation_config, **kwargs
        )
        response = tokenizer.decode(generated_tokens(self, prompt, ends, **arguments), errors="replace").strip()
        turns = [(past_query, past_response) for past_query, past_response in history or []]
        return response, [*turns, (query, response)] if append_history else turns

    def chat_stream(
        self,
        tokenizer,
        query: str,
        history: History | None = None,
        system: str = DEFAULT_SYSTEM,
        stop_words_ids: Sequence[Sequence[int]] | None = None,
        logits_processor: Sequence | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs,
    ) -> Iterator[str]:
        """Answer `query` step by step: yields the response so far. Arguments as in `chat`."""
        prompt, ends, arguments = self._chat_inputs(
            tokenizer, query, history, system, stop_words_ids, generation_config, **kwargs
        )
        arguments["logits_processor"] = logits_processor
        # A character may take several tokens: one that is not complete yet is left out.
        read = partial(tokenizer.decode, skip_special_tokens=True, errors="ignore")
        return iterate_tokens(self, prompt, ends, read, **arguments)

    def _chat_inputs(
        self,
        tokenizer,
        query: str,
        history: History | None,
        system: str,
        stop_words_ids: Sequence[Sequence[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        max_window_size: int | None = None,
        **kwargs,
    ) -> tuple[list[int], set[int], dict[str, Any]]:
        """The prompt, the ids that end an answer without being part of it, and the arguments of `generate`."""
        chat_format = setting(self, "chat_format", generation_config) or "chatml"
        if max_window_size is None:
            max_window_size = setting(self, "max_window_size", generation_config) or DEFAULT_WINDOW
        if chat_format == "raw" and system == DEFAULT_SYSTEM:
            system = ""
        _, prompt = make_context(tokenizer, query, history, system, max_window_size, chat_format)
        words = get_stop_words_ids(chat_format, tokenizer)
        ends = {*end_token_ids(self, generation_config, kwargs), *(word[0] for word in words if len(word) == 1)}
        words = [*checked_stop_words(stop_words_ids), *words]
        return prompt, ends, {**kwargs, "generation_config": generation_config, "stop_words_ids": words}
