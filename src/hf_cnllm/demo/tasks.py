"""How the families turn a conversation into training examples and prompts, and which auto class serves them."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jinja2 import TemplateError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..auto import family_of
from ..data.conversations import Conversation, encode_conversation, reply_end_ids, with_system_in_question

Example = dict[str, Any]
Batch = dict[str, torch.Tensor]


class Task(ABC):
    """How conversations become tensors for one model and its tokenizer.

    Attributes:
        auto_class: loads the family's generation model.
        reloads_with_auto_tokenizer: whether AutoTokenizer gives a saved tokenizer its own class back.
        tokenizer: the model's.
        end_token_ids: what stops `generate`.
    """

    auto_class: ClassVar[Any]
    reloads_with_auto_tokenizer: ClassVar[bool] = True
    tokenizer: PreTrainedTokenizerBase
    end_token_ids: list[int]

    @abstractmethod
    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, max_length: int): ...

    @abstractmethod
    def example(self, conversation: Conversation) -> Example:
        """One training example."""

    @abstractmethod
    def collate(self, examples: list[Example]) -> Batch:
        """A batch of them, with labels."""

    @abstractmethod
    def prompts(self, conversations: Sequence[Conversation], max_new_tokens: int) -> Batch:
        """What `generate` takes to answer the last question of each conversation."""

    def texts(self, ids: list[list[int]] | torch.Tensor) -> list[str]:
        """Generated ids as texts, without those that only pad the embedding to a round size: they have no token."""
        rows = ids.tolist() if isinstance(ids, torch.Tensor) else ids
        known = [[index for index in row if index < len(self.tokenizer)] for row in rows]
        return [text.strip() for text in self.tokenizer.batch_decode(known, skip_special_tokens=True)]

    def as_generated(self, text: str) -> str:
        """The text as it would come back from the model: some vocabularies normalize, `，` to `,` for example."""
        return self.texts([self.tokenizer(text, add_special_tokens=False)["input_ids"]])[0]


class ChatTask(Task):
    """Next-token training on chat-template data, the loss on the assistant's replies only."""

    auto_class = AutoModelForCausalLM

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, max_length: int):
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.end_token_ids = reply_end_ids(tokenizer, model.generation_config)
        self.pad = DataCollatorForSeq2Seq(tokenizer)
        try:
            tokenizer.apply_chat_template([{"role": role, "content": "?"} for role in ("system", "user")])
            self.has_system_role = True
        except TemplateError:  # those of ChatGLM-6B and ChatGLM2-6B refuse one
            self.has_system_role = False

    def example(self, conversation: Conversation) -> Example:
        return encode_conversation(self.tokenizer, self._messages(conversation), self.end_token_ids, self.max_length)

    def collate(self, examples: list[Example]) -> Batch:
        return self.pad(examples)

    def prompts(self, conversations: Sequence[Conversation], max_new_tokens: int) -> Batch:
        asked = [self._messages(conversation)[:-1] for conversation in conversations]
        encoded: Any = self.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)
        return dict(self.tokenizer.pad(encoded, padding_side="left", return_tensors="pt"))

    def _messages(self, conversation: Conversation) -> Conversation:
        return conversation if self.has_system_role else with_system_in_question(conversation)


class InfillingTask(Task):
    """Blank infilling: the reply fills a `[gMASK]` (or the one kind of blank there is) behind the question.

    The question is seen in both directions and has no loss; earlier turns stand in front of it.
    """

    auto_class = AutoModelForSeq2SeqLM
    # The model type is GLM-4's, too, for which transformers takes a plain backend unless there is an `auto_map`.
    reloads_with_auto_tokenizer = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, max_length: int):
        self.tokenizer = tokenizer
        self.half_length = min(max_length, model.config.max_sequence_length) // 2
        self.blank = tokenizer.convert_ids_to_tokens(tokenizer.mask_token_ids)[-1]
        self.end_token_ids = [tokenizer.eop_token_id]

    def example(self, conversation: Conversation) -> Example:
        *context, reply = (message["content"] for message in conversation)
        return {"text": " ".join(context) + self.blank, "target": reply}

    def collate(self, examples: list[Example]) -> Batch:
        targets = [example["target"] for example in examples]
        return self._inputs(examples, self.half_length, targets=targets)

    def prompts(self, conversations: Sequence[Conversation], max_new_tokens: int) -> Batch:
        return self._inputs([self.example(conversation) for conversation in conversations], max_new_tokens)

    def _inputs(self, examples: list[Example], max_gen_length: int, **targets: list[str]) -> Batch:
        texts = self.tokenizer(  # cut on the left, so that the blank stays
            [example["text"] for example in examples],
            padding=True,
            truncation=True,
            max_length=self.half_length,
            return_tensors="pt",
        )
        return dict(self.tokenizer.build_inputs_for_generation(texts, max_gen_length, **targets))


def task_for(config: PreTrainedConfig) -> type[Task]:
    """The task of a checkpoint, from its configuration.

    Raises:
        ValueError: the checkpoint is of no family of this package.
    """
    if (family := family_of(config)) is None:
        raise ValueError(
            f"model_type {config.model_type!r} is served by transformers itself; the demo is for the families here"
        )
    return next(task for task in (ChatTask, InfillingTask) if task.auto_class.__name__ == family.generates_with)
