"""What the families' chat functions share: the history they are given, and `generate` on one prompt, whole or token by
token."""

from collections.abc import Callable, Container, Generator, Sequence
from contextlib import closing
from itertools import islice, takewhile
from queue import SimpleQueue
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import torch

History = Sequence[tuple[str | None, str | None]]  # the originals': (query, response) for each turn


def checked_history(query: Any, history: Any) -> list[tuple[str, str]]:
    """`history`, or nothing for None; None in it, as web pages have for a greeting that nobody asked for, is an empty text.
    Raises ValueError if the arguments have another shape."""
    if not isinstance(query, str):
        raise ValueError(f"query must be a string, but is {query!r}.")
    if not isinstance(history, list | tuple | None):
        raise ValueError(
            f"history must be a list of (query, response) pairs, but is of type {type(history).__name__}."
        )
    for index, pair in enumerate(history or []):
        if not (
            isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str | None) for text in pair)
        ):
            raise ValueError(
                f"history must be a list of (query, response) pairs of strings, but history[{index}] is {pair!r}. "
                "Messages with roles go to tokenizer.apply_chat_template."
            )
    return [(past_query or "", past_response or "") for past_query, past_response in history or []]


def by_name(names: Sequence[str], values: Sequence[Any], options: dict[str, Any]) -> dict[str, Any]:
    """`options`, and `values` that were given by position under their `names`.

    Raises:
        TypeError: there are more than names, or one was given by name, too.
    """
    if len(values) > len(names):
        raise TypeError(f"{len(values) - len(names)} arguments too many behind `{names[-1]}`: pass arguments by name.")
    given = dict(zip(names, values, strict=False))
    if twice := given.keys() & options.keys():
        raise TypeError(f"`{min(twice)}` is given twice, by position and by name.")
    return given | options


def as_messages(query: str, history: History | None = None) -> list[dict[str, str]]:
    """The messages that end with `query`."""
    messages = []
    for past_query, past_response in checked_history(query, history):
        messages.append({"role": "user", "content": past_query})
        messages.append({"role": "assistant", "content": past_response})
    return [*messages, {"role": "user", "content": query}]


def generated_tokens(model: Any, prompt: list[int], ends: Container[int] = (), **arguments: Any) -> list[int]:
    """The ids that `model.generate(**arguments)` adds to `prompt`, up to the first of `ends`."""
    output = model.generate(**_as_inputs(model, prompt) | arguments)
    ids = getattr(output, "sequences", output)[0, len(prompt) :].tolist()
    return list(takewhile(lambda token: token not in ends, ids))


def iterate_tokens(
    model: Any, prompt: list[int], ends: Container[int] = (), read: Callable[[list[int]], Any] = list, **arguments: Any
) -> Generator[Any]:
    """Yields `read(ids)` for each new token, of all ids so far that `generated_tokens` would give; see `streamed_tokens`."""
    ids: list[int] = []
    with closing(streamed_tokens(model, **_as_inputs(model, prompt) | arguments)) as steps:
        for tokens in islice(steps, 1, None):  # the prompt comes first
            for token in tokens.flatten().tolist():  # of assisted decoding there are several, in one row
                if token not in ends:
                    ids.append(token)
                yield read(ids)


def streamed_tokens(model: Any, **arguments: Any) -> Generator[torch.Tensor]:
    """Yields what `model.generate(**arguments)` gives a streamer: the prompts, [batch, length], and the tokens of each step.

    `generate` runs in a thread of its own: contexts that belong to a thread (`torch.autocast`) do not reach it. Its errors
    are raised here. It ends when the iterator is closed.
    """
    queue: SimpleQueue[torch.Tensor | BaseException | None] = SimpleQueue()
    is_closed = Event()

    def put(tokens: torch.Tensor) -> None:
        if is_closed.is_set():
            raise GeneratorExit  # out of `generate`, whose tokens nobody reads any more
        queue.put(tokens)

    def run() -> None:
        try:
            streamer = SimpleNamespace(put=put, end=lambda: None)
            model.generate(streamer=streamer, **arguments)
            queue.put(None)
        except BaseException as error:  # for the reader to raise
            queue.put(error)

    thread = Thread(target=run, name="streamed_tokens", daemon=True)
    thread.start()
    try:
        for item in iter(queue.get, None):
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        is_closed.set()
        thread.join()


def _as_inputs(model: Any, prompt: list[int]) -> dict[str, torch.Tensor]:
    input_ids = torch.tensor([prompt], device=model.device)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
