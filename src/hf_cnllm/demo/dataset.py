"""Which conversations the demo uses for what."""

import random
import re
from pathlib import Path
from typing import NamedTuple

from ..data.conversations import Conversation, ConversationError, load_instructions, read_conversations

SMALLEST_DATA = 8
SIGN_OFFS = {"zh": "希望对你有帮助。", "en": "Hope this helps!"}


class Split(NamedTuple):
    """Conversations by what they are used for."""

    train: list[Conversation]  # full fine-tuning sees them
    held_out: list[Conversation]  # no training sees them
    adapter: list[Conversation]  # the adapter is trained on them, for something that full fine-tuning did not teach
    transfer: list[Conversation]  # what the adapter learned should show on their questions, though it never saw them


def embedded_split(seed: int) -> Split:
    """The embedded instruction set: a twentieth held out; the adapter learns on a quarter to sign off its replies.

    Whether it learned that and no mere answers is seen on conversations of the other three quarters.
    """
    train, held_out = _hold_out(load_instructions(), seed)
    quarter = len(train) // 4
    return Split(train, held_out, [signed_off(c) for c in train[:quarter]], train[quarter : 2 * quarter])


def own_split(path: Path, seed: int) -> Split:
    """The user's data: a twentieth held out, an eighth kept for the adapter, the rest for full fine-tuning."""
    conversations = read_conversations(path)
    if len(conversations) < SMALLEST_DATA:
        raise ConversationError(
            f"{path}: holds {len(conversations)} conversations, at least {SMALLEST_DATA} are needed"
        )
    rest, held_out = _hold_out(conversations, seed)
    eighth = max(1, len(rest) // 8)
    return Split(rest[eighth:], held_out, rest[:eighth], transfer=[])  # it is not known what could be transferred


def _hold_out(conversations: list[Conversation], seed: int) -> tuple[list[Conversation], list[Conversation]]:
    shuffled = random.Random(seed).sample(conversations, len(conversations))
    cut = max(1, len(shuffled) // 20)
    return shuffled[cut:], shuffled[:cut]


def sign_off_for(text: str) -> str:
    """The sign-off in the language of `text`."""
    return SIGN_OFFS["zh" if re.search(r"[\u4e00-\u9fff]", text) else "en"]


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
            space = "" if ending == SIGN_OFFS["zh"] else " "
            message = {**message, "content": message["content"] + space + ending}
        ended.append(message)
    return ended
