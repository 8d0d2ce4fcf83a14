"""The originals' chat history, `[(query, response), …]`, and today's messages."""

from collections.abc import Sequence
from typing import Any

History = Sequence[tuple[str, str]]


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
