"""Ghost attention (Llama 2, arXiv 2307.09288, section 3.3): answers that follow an instruction many turns after it was given.

The instruction is the system message of a conversation. Answers are sampled with it in front of every question, and learned
with it in front of the first one only, and no loss on what was answered before:

    sampled   [inst u₁] a₁ [inst u₂] a₂ [inst u₃] → a₃
    learned   [inst u₁] a₁ [u₂]      a₂ [u₃]      a₃        the loss is on a₃ alone
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .conversations import with_system_in_question
from .formats import Conversation, ConversationError


def to_sample(conversation: Conversation) -> Conversation:
    """The conversation up to its last question, with the instruction in front of every question.

    Raises:
        ConversationError: it does not begin with a system message, or has no question.
    """
    instruction, *turns = _with_instruction(conversation)
    last = max((index for index, message in enumerate(turns) if message["role"] == "user"), default=None)
    if last is None:
        raise ConversationError("there is no question in the conversation")
    return [
        {**message, "content": f"{instruction['content']}\n{message['content']}"}
        if message["role"] == "user"
        else message
        for message in turns[: last + 1]
    ]


def to_learn(conversation: Conversation) -> Conversation:
    """The conversation with the instruction in front of the first question only, and nothing to learn before the last
    question.

    Raises:
        ConversationError: it does not begin with a system message.
    """
    return with_system_in_question(learn_last_answer(_with_instruction(conversation)))


def learn_last_answer(conversation: Conversation) -> Conversation:
    """The conversation with `"loss": False` on the assistant's messages that stand before the last question."""
    last = max(index for index, message in enumerate(conversation) if message["role"] == "user")
    return [
        {**message, "loss": False} if message["role"] == "assistant" and index < last else message
        for index, message in enumerate(conversation)
    ]


def sample_ghost_attention(
    conversations: Iterable[Conversation],
    instructions: Sequence[str],
    answer: Callable[[list[Conversation]], Sequence[str]],
) -> list[dict[str, Any]]:
    """Rows for `sft --ghost_attention`: each conversation with each of the instructions, and a last answer that follows it.

    Args:
        conversations: dialogues without a system message.
        instructions: what is to be kept to throughout, "Always answer in verse." for one.
        answer: gives a reply to each of a list of conversations, which end with a question: the model's own samples.

    Returns:
        `{"messages": [...]}`, with the instruction as the system message.

    Raises:
        ConversationError: a conversation has a system message already.
        ValueError: there are not as many answers as questions.
    """
    instructed = []
    for conversation in conversations:
        if conversation[0]["role"] == "system":
            raise ConversationError(
                "a conversation has a system message already: the instruction would be a second one"
            )
        instructed += [[{"role": "system", "content": text}, *conversation] for text in instructions]
    answers = answer([to_sample(conversation) for conversation in instructed])
    if len(answers) != len(instructed):
        raise ValueError(f"there are {len(answers)} answers to {len(instructed)} questions")
    rows = []
    for conversation, text in zip(instructed, answers, strict=True):
        kept = len(to_sample(conversation)) + 1  # and the system message
        rows.append({"messages": [*conversation[:kept], {"role": "assistant", "content": text}]})
    return rows


def _with_instruction(conversation: Conversation) -> Conversation:
    if not conversation or conversation[0]["role"] != "system":
        raise ConversationError("the first message must be of the role system: it is the instruction")
    return conversation
