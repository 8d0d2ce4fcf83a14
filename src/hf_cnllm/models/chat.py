"""What the families' chat functions share: the history they are given, and `generate` on one prompt, whole or token by
token."""

from collections.abc import Callable, Container, Generator, Sequence
from itertools import takewhile
from queue import SimpleQueue
from threading import Event, Thread
from types import SimpleNamespace
from typing import Any

import torch

History = Sequence[tuple[str, str]]  # the originals': (query, response) for each turn


def checked_history(query: Any, history: Any) -> History:
    """`history`, or nothing for None. Raises ValueError if the arguments have another shape."""
    if not isinstance(query, str):
        raise ValueError(f"query must be a string, but is {query!r}.")
    if not isinstance(history, list | tuple | None):
        raise ValueError(
            f"history must be a list of (query, response) pairs, but is of type {type(history).__name__}."
        )
    for index, pair in enumerate(history or []):
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise ValueError(
                f"history must be a list of (query, response) pairs of strings, but history[{index}] is {pair!r}. "
                "Messages with roles go to tokenizer.apply_chat_template."
            )
    return history or []


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
    """Yields `read(ids)` for each new token, of all ids so far that `generated_tokens` would give.

    `generate` runs in a thread of its own: contexts that belong to a thread (`torch.autocast`) do not reach it. Its errors
    are raised here. It ends when the iterator is closed.
    """
    queue: SimpleQueue[list[int] | BaseException | None] = SimpleQueue()
    is_closed = Event()

    def put(tokens: torch.Tensor) -> None:
        if is_closed.is_set():
            raise GeneratorExit  # out of `generate`, whose tokens nobody reads any more
        queue.put(tokens.flatten().tolist())  # of assisted decoding there are several, in one row

    def run() -> None:
        try:
            streamer = SimpleNamespace(put=put, end=lambda: None)
            model.generate(streamer=streamer, **_as_inputs(model, prompt) | arguments)
            queue.put(None)
        except BaseException as error:  # for the reader to raise
            queue.put(error)

    thread = Thread(target=run, name="iterate_tokens", daemon=True)
    thread.start()
    ids: list[int] = []
    try:
        for number, item in enumerate(iter(queue.get, None)):
            if isinstance(item, BaseException):
                raise item
            for token in item if number > 0 else []:  # the prompt comes first
                if token not in ends:
                    ids.append(token)
                yield read(ids)
    finally:
        is_closed.set()
        thread.join()


def _as_inputs(model: Any, prompt: list[int]) -> dict[str, torch.Tensor]:
    input_ids = torch.tensor([prompt], device=model.device)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
