"""What the families' chat functions share: the history they are given, and `generate` on one prompt, whole or token by
token."""

from collections.abc import Generator, Sequence
from queue import Queue
from threading import Event, Thread
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

History = Sequence[tuple[str, str]]  # the originals': (query, response) for each turn


def checked_history(query: Any, history: Any) -> History:
    """`history`, or nothing for None. Raises ValueError if the arguments have another shape."""
    if not isinstance(query, str):
        raise ValueError(f"query must be a string, but is {query!r}.")
    if history is None:
        return []
    if not isinstance(history, (list, tuple)):
        raise ValueError(
            f"history must be a list of (query, response) pairs, but is of type {type(history).__name__}."
        )
    for index, pair in enumerate(history):
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise ValueError(
                f"history must be a list of (query, response) pairs of strings, but history[{index}] is {pair!r}. "
                "Messages with roles go to tokenizer.apply_chat_template."
            )
    return history


def as_messages(query: str, history: History | None = None) -> list[dict[str, str]]:
    """The messages that end with `query`."""
    messages = []
    for past_query, past_response in checked_history(query, history):
        messages.append({"role": "user", "content": past_query})
        messages.append({"role": "assistant", "content": past_response})
    return [*messages, {"role": "user", "content": query}]


def prompt_inputs(ids: list[int], device: torch.device) -> dict[str, torch.Tensor]:
    """One prompt as the model's input, `[1, length]`."""
    input_ids = torch.tensor([ids], device=device)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def generated_ids(model: Any, **arguments: Any) -> list[int]:
    """The ids that `model.generate(**arguments)` adds to one prompt."""
    output = model.generate(**arguments)
    return getattr(output, "sequences", output)[0, arguments["input_ids"].shape[1] :].tolist()


def iterate_tokens(
    model: Any, stopping_criteria: StoppingCriteriaList | None = None, **arguments: Any
) -> Generator[int]:
    """Yield the ids that `model.generate(**arguments)` adds to one prompt as soon as each is there.

    `generate` runs in a thread of its own: contexts that belong to a thread (`torch.autocast`) do not reach it. Its errors
    are raised here. It ends when the iterator is closed.
    """
    queue: Queue[list[int] | BaseException | None] = Queue()
    left = Event()
    criteria = StoppingCriteriaList([*(stopping_criteria or []), _LeftByReader(left)])

    def run() -> None:
        try:
            model.generate(stopping_criteria=criteria, streamer=_QueueStreamer(queue), **arguments)
            queue.put(None)
        except BaseException as error:  # for the reader to raise
            queue.put(error)

    thread = Thread(target=run, name="iterate_tokens", daemon=True)
    thread.start()
    try:
        while (item := queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield from item
    finally:
        left.set()
        thread.join()


class _QueueStreamer:
    """What `generate` takes for a streamer: it is given the prompt first, then each token."""

    def __init__(self, queue: Queue):
        self.queue = queue
        self.seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self.seen_prompt:
            self.queue.put(value.tolist())
        self.seen_prompt = True

    def end(self) -> None:
        pass  # `run` says so, also after an error


class _LeftByReader(StoppingCriteria):
    def __init__(self, left: Event):
        self.left = left

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full(input_ids.shape[:1], self.left.is_set(), device=input_ids.device)
