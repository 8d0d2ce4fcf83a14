"""A model with its tokenizer, and what the demo does with the two: train on conversations, and answer their questions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoTokenizer, BatchEncoding, DataCollatorForSeq2Seq

from ..data.conversations import as_template_takes, encode_conversation, reply_end_ids
from ..data.formats import Conversation, ConversationError
from ..families import family_of

MAX_NEW_TOKENS = 64
Z_LOSS_WEIGHT = 2e-4  # as in the Baichuan 2 report


class ChatTask:
    """Next-token training on chat-template data, the loss on the assistant's replies only."""

    def __init__(self, model: Any, tokenizer: Any, max_length: int):
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self.end_token_ids = reply_end_ids(tokenizer, model.generation_config)
        model.generation_config.eos_token_id = self.end_token_ids

    def example(self, conversation: Conversation) -> dict[str, Any]:
        """One training example."""
        return encode_conversation(self.tokenizer, conversation, self.end_token_ids, self.max_length)

    def collate(self, examples: list[dict[str, Any]]) -> Any:
        """A batch of them, with labels."""
        return DataCollatorForSeq2Seq(self.tokenizer)(examples)

    def prompts(self, conversations: Sequence[Conversation]) -> BatchEncoding:
        """What `generate` takes to answer the last question of each conversation."""
        asked = [as_template_takes(self.tokenizer, conversation)[:-1] for conversation in conversations]
        encoded = self.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)
        return self.tokenizer.pad(encoded, padding_side="left", return_tensors="pt")

    def replies(self, conversations: Sequence[Conversation], description: str) -> list[str]:
        """Answers the last question of each conversation greedily, 16 at a time."""
        self.model.eval()
        replies: list[str] = []
        for start in tqdm(range(0, len(conversations), 16), desc=description, unit="batch"):
            prompts = self.prompts(conversations[start : start + 16]).to(self.model.device)
            output = self.model.generate(
                **prompts, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, repetition_penalty=1.0
            )
            replies += self.texts(output[:, prompts["input_ids"].shape[1] :].tolist())
        return replies

    @torch.no_grad()
    def logits(self, conversations: Sequence[Conversation]) -> torch.Tensor:
        """[batch, length, vocabulary]: the model's logits on conversations."""
        batch = self.collate([self.example(conversation) for conversation in conversations]).to(self.model.device)
        del batch["labels"]
        return self.model.eval()(**batch).logits

    def texts(self, rows: list[list[int]]) -> list[str]:
        """Generated ids as texts."""
        return [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]

    def as_generated(self, text: str) -> str:
        """The text as it would come back from the model: some vocabularies normalize, `，` to `,` for example."""
        return self.texts([self.tokenizer(text, add_special_tokens=False)["input_ids"]])[0]


class InfillingTask(ChatTask):
    """Blank infilling: the reply fills a `[gMASK]` (or the one kind of blank there is) behind the question.

    The question is seen in both directions and has no loss; earlier turns stand in front of it.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int):
        self.model, self.tokenizer = model, tokenizer
        self.half_length = min(max_length, model.config.max_sequence_length) // 2
        self.blank = tokenizer.convert_ids_to_tokens(tokenizer.mask_token_ids)[-1]
        model.generation_config.eos_token_id = tokenizer.eop_token_id

    def example(self, conversation: Conversation) -> dict[str, Any]:
        if conversation[-1].get("loss") is False:
            raise ConversationError("nothing of a conversation would be learned whose last answer has `loss` False")
        *context, reply = (message["content"] for message in conversation)
        return {"text": " ".join(context) + self.blank, "target": reply}

    def collate(self, examples: list[dict[str, Any]]) -> Any:
        return self._inputs(examples, self.half_length, targets=[example["target"] for example in examples])

    def prompts(self, conversations: Sequence[Conversation]) -> BatchEncoding:
        return self._inputs([self.example(conversation) for conversation in conversations], MAX_NEW_TOKENS)

    def _inputs(self, examples: list[dict[str, Any]], max_gen_length: int, **targets: list[str]) -> BatchEncoding:
        texts = [example["text"] for example in examples]
        # Cut on the left, so that the blank stays.
        options = {"padding": True, "max_length": self.half_length, "return_tensors": "pt"}
        if hasattr(self.tokenizer, "encode_blanks"):  # GLM-130B, whose tokenizer reads no blanks otherwise
            inputs = self.tokenizer.encode_blanks(texts, **options)
        else:
            inputs = self.tokenizer(texts, truncation=True, **options)
        return self.tokenizer.build_inputs_for_generation(inputs, max_gen_length, **targets)


TASKS = {"AutoModelForCausalLM": ChatTask, "AutoModelForSeq2SeqLM": InfillingTask}


def load_task(path: str | Path, max_length: int) -> ChatTask:
    """Model and tokenizer of a checkpoint, the weights in fp32: AdamW's small steps need it.

    Args:
        max_length: tokens kept of a conversation.

    Raises:
        ValueError: the checkpoint is of no family of this package.
    """
    config = AutoConfig.from_pretrained(path)
    if (family := family_of(config)) is None:
        raise ValueError(
            f"model_type {config.model_type!r} is served by transformers itself; the demo is for the families here"
        )
    if hasattr(config, "z_loss_weight"):
        config.z_loss_weight = Z_LOSS_WEIGHT
    auto_class = getattr(transformers, family.generates_with)
    model = auto_class.from_pretrained(path, config=config, dtype=torch.float32)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return TASKS[family.generates_with](model, AutoTokenizer.from_pretrained(path), max_length)
