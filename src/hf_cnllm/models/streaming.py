"""The tokens of `generate` one by one, as an iterator."""

from collections.abc import Generator
from queue import Queue
from threading import Event, Thread
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer


class _QueueStreamer(BaseStreamer):
    def __init__(self, queue: Queue):
        self.queue = queue
        self.seen_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self.seen_prompt:
            self.queue.put(value.tolist())
        self.seen_prompt = True

    def end(self) -> None:
        pass  # `run` below says so, also after an error


class _StoppedByReader(StoppingCriteria):
    def __init__(self, stopped: Event):
        self.stopped = stopped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full(input_ids.shape[:1], self.stopped.is_set(), device=input_ids.device)


def iterate_tokens(model: Any, stopping_criteria: StoppingCriteriaList | None = None, **kwargs: Any) -> Generator[int]:
    """Yield the ids that `model.generate(**kwargs)` adds to one prompt, `[1, length]`, as soon as each is there.

    `generate` runs in a thread of its own: contexts that belong to a thread (`torch.autocast`) do not reach it. Its errors
    are raised here. It ends when the iterator is closed.
    """
    queue: Queue[list[int] | BaseException | None] = Queue()
    stopped = Event()
    criteria = StoppingCriteriaList([*(stopping_criteria or []), _StoppedByReader(stopped)])

    def run() -> None:
        try:
            model.generate(stopping_criteria=criteria, streamer=_QueueStreamer(queue), **kwargs)
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
        stopped.set()
        thread.join()
