"""Baichuan's own chat function: `model.chat(tokenizer, messages, stream=False, generation_config=None)`."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from transformers import GenerationConfig, PreTrainedConfig

from ..chat import generated_tokens, iterate_tokens

Message = dict[str, str]
# The pieces that open a turn: <reserved_102> and <reserved_103> in Baichuan 1, <reserved_106> and <reserved_107> in
# Baichuan 2. generation_config.json names them (user_token_id, assistant_token_id), with these values in all checkpoints.
TURN_TOKEN_IDS = {"user": 195, "assistant": 196}


def build_chat_input(
    tokenizer,
    messages: Sequence[Message],
    max_input_tokens: int,
    user_token_id: int = TURN_TOKEN_IDS["user"],
    assistant_token_id: int = TURN_TOKEN_IDS["assistant"],
) -> list[int]:
    """The ids that an answer to `messages` is generated from: the original's `build_chat_input`.

    The system message comes first, without a mark; each later message follows the token of its role. A round is a user
    message and what follows it. Of the rounds the latest stay, as many as fit beside the system message; the very
    last always stays, and loses its beginning (and the system message) if it alone is too long. The assistant's token
    ends the ids, unless the last message is the assistant's: then that one is continued.

    Args:
        max_input_tokens: room for the prompt, in tokens (the model's length less `max_new_tokens`).

    Raises:
        ValueError: no messages, an unknown role, a system message that is not the first, or no room.
    """
    if max_input_tokens <= 0:
        raise ValueError(
            f"there is room for {max_input_tokens} prompt tokens: set max_new_tokens below the model's length."
        )
    if not messages:
        raise ValueError("a chat needs at least one message.")
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(
            f"messages must be a list such as [{{'role': 'user', 'content': '…'}}], but is of type {type(messages).__name__}"
            f"{'' if isinstance(messages, str) else ' and holds something else'}."
        )
    turn_tokens = {"user": user_token_id, "assistant": assistant_token_id}
    system: list[int] = []
    rounds: list[list[int]] = []
    for index, message in enumerate(messages):
        role = message["role"]
        content = tokenizer.encode_message(message["content"])
        if role == "system" and index == 0:
            system = content
        elif role in turn_tokens:
            if role == "user" or not rounds:
                rounds.append([])
            rounds[-1] += [turn_tokens[role], *content]
        else:
            where = "only the first message can be the system's" if role == "system" else "unknown role"
            raise ValueError(f"messages[{index}] has the role {role!r}: {where}.")

    history: list[int] = []
    for tokens in reversed(rounds):
        if history and len(system) + len(history) + len(tokens) > max_input_tokens:
            break
        history = tokens + history
    ids = system + history
    if messages[-1]["role"] != "assistant":
        ids.append(assistant_token_id)
    return ids[-max_input_tokens:]


class BaichuanChatMixin:
    """`chat` for `BaichuanForCausalLM`, which has `GenerationMixin` among its bases."""

    config: PreTrainedConfig
    generation_config: GenerationConfig

    def chat(
        self,
        tokenizer,
        messages: Sequence[Message],
        stream: bool = False,
        generation_config: GenerationConfig | None = None,
    ) -> str | Iterator[str]:
        """The model's answer to `messages`; with `stream=True` an iterator over the answer so far, as it grows.

        Args:
            tokenizer: a `BaichuanTokenizer`.
            messages: `{"role": "system" | "user" | "assistant", "content": …}` each; see `build_chat_input` for what
                is left out when they are too many.
            generation_config: in place of the model's own. Without `max_new_tokens`, half the model's length is kept
                for the answer, as in the published checkpoints.
        """
        config = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
        length = self.config.model_max_length or self.config.max_position_embeddings
        if config.max_new_tokens is None:
            config.max_new_tokens = length // 2
        names = ("user_token_id", "assistant_token_id")
        turn_ids = {name: index for name in names if (index := getattr(config, name, None)) is not None}
        prompt = build_chat_input(tokenizer, messages, length - config.max_new_tokens, **turn_ids)
        read = partial(tokenizer.decode, skip_special_tokens=True)
        if stream:
            return iterate_tokens(self, prompt, read=read, generation_config=config)
        return read(generated_tokens(self, prompt, generation_config=config))
