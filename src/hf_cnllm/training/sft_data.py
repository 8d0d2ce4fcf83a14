"""Conversations as batches for supervised fine-tuning: read, encoded in the model's own form, padded or packed."""

import inspect
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening

from ..data.blank_infilling import ControlTokens
from ..data.conversations import (
    ANSWER,
    IGNORE_INDEX,
    QUESTION,
    Row,
    encode_conversations,
    labels_of_whole,
    reply_end_ids,
)
from ..data.formats import ConversationError
from ..data.ghost_attention import learn_last_answer
from ..families import family_of
from ..tokenization.chat_sections import ChatTokenizer
from ..tokenization.templates import FORMS, read_template

Example = dict[str, list[int]]


def fills_blanks(config: Any) -> bool:
    """Whether a model of this configuration answers by filling a blank (GLM), instead of continuing a chat."""
    family = family_of(config)
    return family is not None and family.generates_with == "AutoModelForSeq2SeqLM"


def use_template(tokenizer: Any, template: str | None) -> None:
    """Gives the tokenizer the chat template `template`: one of `FORMS`, or a file.

    Raises:
        ValueError: there is no such template, or none at all.
    """
    if template is not None:
        if template not in FORMS and not Path(template).is_file():
            raise ValueError(f"--template must be one of {', '.join(FORMS)} or a file, got {template!r}")
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has no eos_token, which ends the answers in --template")
        tokenizer.chat_template = (
            read_template(template) if template in FORMS else Path(template).read_text(encoding="utf-8-sig")
        )
    elif getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(f"the tokenizer has no chat template: choose one with --template {'|'.join(FORMS)}")


def encode_rows(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    max_length: int,
    ghost_attention: bool = False,
    learn_questions: bool = False,
) -> tuple[list[Example], Counter[str]]:
    """`input_ids` and `labels` of each conversation, and how many were cut in which way.

    GLM gets its own form: all that stands before the last answer and a blank behind it, then the answer, which alone is
    learned. All other models get the chat template's.

    Args:
        ghost_attention: the system message is an instruction for [`ghost_attention`]; rows without one stay as they are.
        learn_questions: the loss is on all tokens, not on the answers alone.

    Raises:
        ConversationError: nothing of a conversation would be learned, or its form has no place for something in it.
        ValueError: two of the options exclude each other.
    """
    if ghost_attention and learn_questions:
        raise ValueError("--ghost_attention learns the last answer only, --learn_questions everything: choose one")
    if ghost_attention:
        is_instructed = [row["messages"][0]["role"] == "system" for row in rows]
        if not any(is_instructed):
            raise ConversationError(
                "--ghost_attention: no conversation has a system message, which is the instruction"
            )
        rows = [
            {**row, "messages": learn_last_answer(row["messages"])} if instructed else row
            for row, instructed in zip(rows, is_instructed, strict=True)
        ]
    if fills_blanks(model.config):
        if learn_questions:
            raise ValueError(
                "--learn_questions: a model that fills blanks sees the question whole, and cannot learn it"
            )
        return _encode_all_blanks(tokenizer, rows, min(max_length, model.config.max_sequence_length))
    refuse_control_tokens(tokenizer, rows)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    examples, cuts = encode_conversations(tokenizer, rows, ends, max_length, system_in_question=ghost_attention)
    return [
        {
            "input_ids": example["input_ids"],
            "labels": labels_of_whole(example["input_ids"]) if learn_questions else example["labels"],
        }
        for example in examples
    ], cuts


def set_control_ids(model: Any, tokenizer: Any) -> None:
    """Makes `generate` stop at whatever ends the replies that are going to be learned, and tells GLM its control tokens, by
    which it knows the question from the answer."""
    if fills_blanks(model.config):
        control = ControlTokens.of(tokenizer)
        model.generation_config.eos_token_id = control.end
        model.config.sop_token_id, model.config.gmask_token_id = control.start, control.masks["document"]
    else:
        model.generation_config.eos_token_id = reply_end_ids(tokenizer, model.generation_config)


def make_batches(
    model: Any, tokenizer: Any, examples: Sequence[Example], packed_length: int | None = None
) -> tuple[Any, Callable[[list[Example]], Any]]:
    """A data set of the examples, and what makes batches of it: padded, or packed into rows of at most `packed_length` tokens
    in which no example sees another. Positions that restart say where one begins; attention, ALiBi, NTK, LogN and GLM's
    prefixes follow them.

    Raises:
        ValueError: the model takes no positions, so that it could not tell the examples of a packed row apart.
    """
    from datasets import Dataset

    dataset = Dataset.from_list(list(examples))
    if packed_length is None:
        return dataset, DataCollatorForSeq2Seq(tokenizer)
    from trl import pack_dataset

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise ValueError(
            f"{type(base).__name__} takes no position_ids, so that packed examples would see each other: leave --packing out"
        )
    return pack_dataset(dataset, packed_length, "bfd"), flatten_packed


def flatten_packed(rows: list[Example]) -> Any:
    """One row, [1, length], of the examples in packed rows, with `position_ids` that begin at 0 for each."""
    examples = []
    for row in rows:
        end = 0
        for length in row["seq_lengths"]:
            start, end = end, end + length
            examples.append({name: row[name][start:end] for name in ("input_ids", "labels")})
    return DataCollatorWithFlattening()(examples)


# --- GLM --------------------------------------------------------------------------------------------------------------


def _encode_all_blanks(tokenizer: Any, rows: Sequence[Row], max_length: int) -> tuple[list[Example], Counter[str]]:
    examples, cuts = [], Counter[str]()
    for number, row in enumerate(rows, start=1):
        *context, answer = row["messages"]
        if row.get("tools") or not answer.get("loss", True) or any("tool_calls" in one for one in row["messages"]):
            raise ConversationError(
                f"conversation {number}: GLM learns the last answer of a conversation, without tools and with its loss"
            )
        texts = " ".join(message["content"] for message in context), answer["content"]
        try:
            example, cut = _encode_blank(tokenizer, *texts, max_length)
        except ConversationError as error:
            raise ConversationError(f"conversation {number}: {error}") from None
        examples.append(example)
        cuts.update(cut)
    return examples, cuts


def _encode_blank(tokenizer: Any, question: str, answer: str, max_length: int) -> tuple[Example, list[str]]:
    """As `build_inputs_for_generation` with a target, the question cut on the left. What looks like a control token in
    texts is text."""
    control = ControlTokens.of(tokenizer)
    asked, told = (
        tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        for text in (question, answer)
    )
    # The start token stands where the labels have the end, so the mask is all that is added between the two texts.
    room = max_length - len(control.before) - len(control.after) - 1
    if room < 1:
        raise ConversationError(f"of {max_length} tokens none is left for an answer: raise max_length")
    written = [*told, control.end]
    if len(written) >= room:  # the answer alone is too long: the question keeps up to half
        written = written[: room - min(len(asked), room // 2)]
    kept = asked[max(0, len(asked) + len(written) - room) :]
    prefix = [*control.before, *kept, control.masks["document"], *control.after]
    example = {
        "input_ids": [*prefix, control.start, *written[:-1]],
        "labels": [*[IGNORE_INDEX] * len(prefix), *written],
    }
    cuts = [QUESTION] * (len(kept) < len(asked)) + [ANSWER] * (len(written) <= len(told))
    return example, cuts


def readable_control_tokens(tokenizer: Any) -> set[str]:
    """The control tokens that the tokenizer would read in a text. Those of this package read none."""
    if isinstance(tokenizer, ChatTokenizer):
        return set()
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return special | set(tokenizer.all_special_tokens)


def refuse_control_tokens(tokenizer: Any, rows: Sequence[Row], fields: Sequence[str] = ("messages", "tools")) -> None:
    """
    Raises:
        ConversationError: one of these fields of a row has a control token in it, which the tokenizer would read there.
    """
    tokens = readable_control_tokens(tokenizer)
    for number, row in enumerate(rows, start=1):
        text = json.dumps([row.get(name) for name in fields], ensure_ascii=False)
        if found := next((token for token in tokens if token in text), None):
            raise ConversationError(
                f"conversation {number}: {type(tokenizer).__name__} would read the text {found!r} as a control token: cut it "
                "out"
            )
