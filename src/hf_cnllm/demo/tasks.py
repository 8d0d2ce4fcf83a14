"""How the families turn a conversation into training examples and prompts, and which auto class serves them."""

from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..data.conversations import Conversation, encode_conversation, reply_end_ids, with_system_in_question


class ChatTask:
    """Next-token training on chat-template data, the loss on the assistant's replies only."""

    auto_class = AutoModelForCausalLM

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, max_length: int):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.end_token_ids = reply_end_ids(tokenizer, model.generation_config)
        self.has_system_role = _has_system_role(tokenizer)
        self.collator = DataCollatorForSeq2Seq(tokenizer, padding="longest")

    def example(self, conversation: Conversation) -> dict[str, Any]:
        messages = self._messages(conversation)
        return encode_conversation(self.tokenizer, messages, self.end_token_ids, self.max_length)

    def prompts(self, conversations: Sequence[Conversation]) -> dict[str, torch.Tensor]:
        asked = [self._messages(c)[:-1] for c in conversations]
        ids = self.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        return dict(self.tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt"))

    def replies(self, output_ids: torch.Tensor, prompt_length: int) -> list[str]:
        texts = self.tokenizer.batch_decode(output_ids[:, prompt_length:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _messages(self, conversation: Conversation) -> Conversation:
        return conversation if self.has_system_role else with_system_in_question(conversation)


def _has_system_role(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template takes a system message (those of ChatGLM-6B and ChatGLM2-6B refuse one)."""
    try:
        tokenizer.apply_chat_template([{"role": role, "content": "?"} for role in ("system", "user")])
    except TemplateError:
        return False
    return True


def task_class_for(config: PreTrainedConfig) -> type[ChatTask]:
    """The task of a checkpoint, from its configuration.

    Raises:
        ValueError: the checkpoint is of no family of this package.
    """
    if not type(config).__module__.startswith("hf_cnllm."):
        raise ValueError(
            f"model_type {config.model_type!r} is served by transformers itself; the demo is for the families here"
        )
    return TASKS.get(config.model_type, ChatTask)


TASKS: dict[str, type] = {}
