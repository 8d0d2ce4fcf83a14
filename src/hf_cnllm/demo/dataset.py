"""Which conversations the demo uses for what."""

import random
from pathlib import Path
from typing import Any, NamedTuple

from ..data.conversations import load_instructions, read_conversations
from ..data.formats import Conversation, ConversationError
from ..data.languages import language_of

SMALLEST_DATA = 8
SIGN_OFFS = {"zh": "希望对你有帮助。", "en": " Hope this helps!"}


class Split(NamedTuple):
    """Conversations by what they are used for."""

    train: list[Conversation]  # full fine-tuning sees them
    held_out: list[Conversation]  # no training sees them
    adapter: list[Conversation]  # the adapter is trained on them, for something that full fine-tuning did not teach
    transfer: list[Conversation]  # what the adapter learned should show on them, unseen; empty if that cannot be said


def split_data(path: Path | None, seed: int) -> Split:
    """A twentieth is held out. Of the embedded instruction set (path None) the adapter learns on a quarter to sign off its
    replies; whether it learned that and no mere answers is seen on another quarter. Of the user's own data an eighth is
    kept for the adapter.

    Raises:
        ConversationError: the file holds too few conversations, or something else.
    """
    conversations = load_instructions() if path is None else [_without_tools(row) for row in read_conversations(path)]
    if len(conversations) < SMALLEST_DATA:
        raise ConversationError(
            f"{path}: holds {len(conversations)} conversations, at least {SMALLEST_DATA} are needed"
        )
    shuffled = random.Random(seed).sample(conversations, len(conversations))
    cut = max(1, len(shuffled) // 20)
    held_out, rest = shuffled[:cut], shuffled[cut:]
    if path is None:
        quarter = len(rest) // 4
        return Split(rest, held_out, [signed_off(c) for c in rest[:quarter]], rest[quarter : 2 * quarter])
    eighth = max(1, len(rest) // 8)
    return Split(rest[eighth:], held_out, rest[:eighth], transfer=[])


def _without_tools(row: dict[str, Any]) -> Conversation:
    if row["tools"] or any(message["role"] == "tool" for message in row["messages"]):
        raise ConversationError("the demo has no tools to call: fine-tune on such data with scripts/sft.py")
    return row["messages"]


def sign_off_for(text: str) -> str:
    """The sign-off in the language of `text`."""
    return SIGN_OFFS[language_of(text)]


def without_sign_off(reply: str) -> str:
    """The reply less a sign-off in either language."""
    for ending in SIGN_OFFS.values():
        reply = reply.removesuffix(ending)
    return reply.rstrip()


def signed_off(conversation: Conversation) -> Conversation:
    """The conversation with a sign-off behind every reply, in the language of the question before it."""
    ended, ending = [], ""
    for message in conversation:
        if message["role"] == "user":
            ending = sign_off_for(message["content"])
        elif message["role"] == "assistant":
            message = {**message, "content": message["content"] + ending}
        ended.append(message)
    return ended
