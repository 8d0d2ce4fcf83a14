"""GLM's training objective, autoregressive blank infilling (arXiv 2103.10360, section 2). Blanks are filled in `infilling.py`.

A text loses some spans, each of which leaves a mask token behind (part A). The spans follow in random order (part B), each
after a start token, and are to be written one token after the other:

    text       x₁ x₂ x₃ x₄ x₅ x₆
    input_ids  x₁ x₂ [MASK] x₄ [MASK] │ <sop> x₅ x₆ │ <sop> x₃
    labels                            │  x₅   x₆ <eop> │  x₃  <eop>
    position    0  1    2    3    4   │   4    4  4   │   2    2
    block       0  0    0    0    0   │   1    2  3   │   1    2

The three objectives (section 2.1 and 2.2):

| objective | mask token | spans                                                                               |
|-----------|------------|-------------------------------------------------------------------------------------|
| token     | [MASK]     | lengths from Poisson(3), until at least 15 % of the tokens are masked                |
| sentence  | [sMASK]    | whole sentences, until at least 15 % of the tokens are masked                        |
| document  | [gMASK]    | one span of 50 % to 100 % of the tokens, uniformly                                   |

Where the paper leaves something open, this follows the authors' code: a span has at least one token (Poisson(3) without 0),
two of the token objective's spans have a token between them, and the document's span is the end of the text every other
time, else anywhere.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count, pairwise
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from .conversations import IGNORE_INDEX

MASK_RATE = 0.15
SPAN_LENGTH = 3.0
SENTENCE_ENDS = frozenset(".?!;:。？！；：…\n")

# Shares of the objectives in training. The paper mixes the token objective with one of the others.
MIX = {"token": 0.5, "sentence": 0.25, "document": 0.25}

Span = tuple[int, int]


# --- which spans are masked ------------------------------------------------------------------------------------------


def sample_span_length(rng: random.Random) -> int:
    """From Poisson(3) without 0, by inversion."""
    probability = math.exp(-SPAN_LENGTH)
    threshold = rng.uniform(probability, 1.0)
    length, cumulated = 0, probability
    while cumulated < threshold and probability > 1e-300:  # what is left then is rounding
        length += 1
        probability *= SPAN_LENGTH / length
        cumulated += probability
    return max(length, 1)


def sample_token_spans(length: int, rng: random.Random, rate: float = MASK_RATE) -> list[Span]:
    """Spans of a text of `length` tokens that cover at least `rate` of it, in order, with a token between any two.

    A text too short for the spans that were drawn loses the last of them, but for one.
    """
    lengths: list[int] = []
    while sum(lengths) < rate * length:
        lengths.append(sample_span_length(rng))
    while len(lengths) > 1 and sum(lengths) + len(lengths) - 1 > length:
        lengths.pop()
    lengths = [min(span, length) for span in lengths]
    rng.shuffle(lengths)
    free = length - sum(lengths) - max(len(lengths) - 1, 0)
    places = sorted(rng.randint(0, free) for _ in lengths)
    masked = accumulate(lengths, initial=0)
    starts = map(sum, zip(places, masked, count(), strict=False))  # behind earlier spans, and one token for each
    return [(start, start + span) for start, span in zip(starts, lengths, strict=True)]


def sample_sentence_spans(sentences: Sequence[Span], rng: random.Random, rate: float = MASK_RATE) -> list[Span]:
    """Random sentences that cover at least `rate` of the text, in order.

    Args:
        sentences: all of the text's, in order and without gaps.
    """
    length = sentences[-1][1] - sentences[0][0] if sentences else 0
    chosen: list[Span] = []
    masked = 0
    for start, end in rng.sample(list(sentences), len(sentences)):
        if masked >= rate * length:
            break
        chosen.append((start, end))
        masked += end - start
    return sorted(chosen)


def sample_document_span(length: int, rng: random.Random) -> list[Span]:
    """One span of half to all of a text of `length` tokens."""
    if length == 0:
        return []
    span = rng.randint(math.ceil(length / 2), length)
    start = length - span if rng.random() < 0.5 else rng.randint(0, length - span)
    return [(start, start + span)]


def split_sentences(tokens: Sequence[str]) -> list[Span]:
    """The sentences of a text, given as its tokens' texts: each ends with a token that holds an end mark."""
    ends = [index for index, token in enumerate(tokens, start=1) if not SENTENCE_ENDS.isdisjoint(token)]
    return list(pairwise(sorted({0, *ends, len(tokens)})))


# --- from spans to a training example --------------------------------------------------------------------------------


class ControlTokens(NamedTuple):
    """Ids of a tokenizer's control tokens; `masks` by objective, `before` and `after` surround a text."""

    start: int
    end: int
    masks: dict[str, int]
    before: list[int]
    after: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "ControlTokens":
        """Raises ValueError if the tokenizer knows no mask, start or end token."""
        start = _find(tokenizer, "<|startofpiece|>", "<sop>", "sop")
        end = _find(tokenizer, "<|endofpiece|>", "<eop>", "eop")
        mask, smask, gmask = (_find(tokenizer, f"[{kind}MASK]") for kind in ("", "s", "g"))
        mask = tokenizer.mask_token_id if mask is None else mask
        if start is None or end is None or mask is None:
            raise ValueError(
                f"{type(tokenizer).__name__} is no tokenizer of the GLM line: it has no token for the start or the end of "
                "a span, or no mask token"
            )
        masks = {"token": mask, "sentence": smask or mask, "document": gmask or mask}
        surrounded = tokenizer.cls_token_id is not None
        before = [tokenizer.cls_token_id] if surrounded else []
        ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)  # BERT's vocabulary has no eos
        after = [index for index in ends if index is not None][:1] if surrounded else []
        return cls(start, end, masks, before, after)


def _find(tokenizer: PreTrainedTokenizerBase, *tokens: str) -> int | None:
    """The id of the first of `tokens` that is one of the vocabulary."""
    ids = map(tokenizer.convert_tokens_to_ids, tokens)
    return next((index for index in ids if isinstance(index, int) and index != tokenizer.unk_token_id), None)


class Example(NamedTuple):
    """One row of a batch; `labels` belong to the tokens that predict them (not shifted), -100 for none."""

    input_ids: list[int]
    positions: list[int]
    block_positions: list[int]
    labels: list[int]

    @classmethod
    def of_context(cls, context: Sequence[int]) -> "Example":
        """A row in which no blank is filled yet."""
        length = len(context)
        return cls([*context], [*range(length)], [0] * length, [IGNORE_INDEX] * length)

    def fill(self, place: int, tokens: Sequence[int], labels: Sequence[int] = (), done: int = 0) -> None:
        """Writes `tokens` into the blank at `place`, behind `done` others that are in it already."""
        self.input_ids.extend(tokens)
        self.positions.extend([place] * len(tokens))
        self.block_positions.extend(range(done + 1, done + len(tokens) + 1))
        self.labels.extend(labels)


def make_example(
    tokens: Sequence[int],
    spans: Sequence[Span],
    mask_id: int,
    control: ControlTokens,
    rng: random.Random | None = None,
) -> Example:
    """The row for a text whose `spans` are masked.

    Args:
        spans: ordered, not overlapping, not empty.
        mask_id: stands for each of them.
        rng: shuffles the spans; None keeps their order.
    """
    context, blanks, done = list(control.before), [], 0
    for start, end in spans:
        context += tokens[done:start]
        blanks.append((len(context), tokens[start:end]))
        context.append(mask_id)
        done = end
    context += [*tokens[done:], *control.after]
    if rng is not None:
        rng.shuffle(blanks)

    example = Example.of_context(context)
    for place, span in blanks:
        example.fill(place, [control.start, *span], labels=[*span, control.end])
    return example


def restore_text(input_ids: Sequence[int], positions: Sequence[int], block_positions: Sequence[int]) -> list[int]:
    """The text (with what surrounds it) that a row was made from: every span back in its place."""
    spans: dict[int, list[int]] = {}
    for token, position, block in zip(input_ids, positions, block_positions, strict=True):
        if block == 1:
            spans[position] = []
        elif block > 1:
            spans[position].append(token)
    text = []
    for index, token in enumerate(input_ids[: block_positions.count(0)]):
        text += spans.get(index, [token])
    return text


# --- the collator ----------------------------------------------------------------------------------------------------


@dataclass
class DataCollatorForBlankInfilling:
    """Makes batches for blank infilling from texts, a random objective for each. For Trainer, DataLoader and streams.

    A text is a mapping with `input_ids` (without special tokens) or with `text`. With `text`, tell Trainer
    `remove_unused_columns=False`. A text that would be too long loses tokens at both ends, randomly. If it has a `seed`, its row
    depends on that alone, and not on the rows before it.

    Args:
        tokenizer: any of the GLM line's: GLM, ChatGLM, ChatGLM2, ChatGLM3.
        max_length: longest row, in tokens; for GLM at most `config.max_sequence_length`.
        mix: weights of the objectives `token`, `sentence` and `document`. A text of one sentence has nothing to do for
            the sentence objective and gets the token objective.
        mask_rate: share of the tokens that the token and sentence objectives mask at least.
        shift_labels: False for GLM, whose loss takes labels as they are; True for ChatGLM-6B, whose loss shifts them.
        pad_to_multiple_of: round the batch's length up.
        seed: of the randomness. The workers of a DataLoader have their own, which follow from this one and torch's.
        shuffle_spans: whether the spans of a text follow in random order, as GLM is trained; else from left to right.

    Returns (when called with a list of texts) tensors:
        `input_ids`, `attention_mask` (1 for tokens, 0 for padding, which is on the right) and `labels`,
        [batch, length], and `position_ids` [batch, 2, length].

    Raises:
        ValueError: the mix, the rate or the tokenizer are unfit; a text has neither field; no room for any text; no text of a
            batch has a token.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int = 512
    mix: Mapping[str, float] = field(default_factory=lambda: dict(MIX))
    mask_rate: float = MASK_RATE
    shift_labels: bool = False
    pad_to_multiple_of: int | None = None
    seed: int = 0
    shuffle_spans: bool = True

    def __post_init__(self):
        self.control = ControlTokens.of(self.tokenizer)
        unknown = self.mix.keys() - self.control.masks.keys()
        if unknown or not self.mix or min(self.mix.values()) < 0 or sum(self.mix.values()) <= 0:
            raise ValueError(
                f"`mix` must give weights to some of {', '.join(self.control.masks)}, at least 0 and not all 0, but is "
                f"{dict(self.mix)}"
            )
        if not 0 < self.mask_rate < 1:
            raise ValueError(f"`mask_rate` must be between 0 and 1, but is {self.mask_rate}")
        if self.longest_text < 1:
            raise ValueError(f"`max_length` ({self.max_length}) leaves no room for a text")
        self._worker: int | None = None
        self._rng = random.Random(self.seed)

    @property
    def rng(self) -> random.Random:
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.seed != self._worker:
            self._worker = worker.seed  # torch's, another one for each worker and epoch
            self._rng = random.Random(f"{self.seed}-{worker.seed}")
        return self._rng

    @property
    def longest_text(self) -> int:
        """Tokens of a text that a row has room for."""
        # Each span costs a mask and a start token. There are at most as many spans as masked tokens, and the last span may
        # go beyond the rate; the shifted form has one token more.
        room = self.max_length - len(self.control.before) - len(self.control.after) - 3
        return math.floor(room / (1 + 2 * self.mask_rate))

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [self.make_row(feature)[1] for feature in features]
        if not any(1 in row.block_positions for row in rows):
            raise ValueError(
                f"none of the {len(rows)} texts of a batch has a token, so that nothing is learned: leave empty texts out"
            )
        return self.pad(rows)

    def make_row(self, feature: Mapping[str, Any]) -> tuple[str, Example]:
        """The objective that was drawn for a text, and the row."""
        rng = random.Random(feature["seed"]) if "seed" in feature else self.rng
        tokens = self._tokens(feature, rng)
        objective = rng.choices(list(self.mix), weights=list(self.mix.values()))[0]
        if objective == "sentence":
            sentences = split_sentences([str(token) for token in self.tokenizer.convert_ids_to_tokens(tokens)])
            if len(sentences) > 1:
                spans = sample_sentence_spans(sentences, rng, self.mask_rate)
            else:
                objective = "token"
        if objective == "token":
            spans = sample_token_spans(len(tokens), rng, self.mask_rate)
        elif objective == "document":
            spans = sample_document_span(len(tokens), rng)
        order = rng if self.shuffle_spans else None
        return objective, make_example(tokens, spans, self.control.masks[objective], self.control, order)

    def pad(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """Rows as one batch, padded on the right."""
        if self.shift_labels:
            examples = [self._shift(example) for example in examples]
        length = max(len(example.input_ids) for example in examples)
        if self.pad_to_multiple_of is not None:
            length = math.ceil(length / self.pad_to_multiple_of) * self.pad_to_multiple_of
        pad_id = self.control.end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        input_ids, positions, block_positions, labels = (
            torch.tensor([[*row, *[filling] * (length - len(row))] for row in rows])
            for rows, filling in zip(zip(*examples, strict=True), (pad_id, 0, 0, IGNORE_INDEX), strict=True)
        )
        lengths = torch.tensor([len(example.input_ids) for example in examples])
        return {
            "input_ids": input_ids,
            "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
            "position_ids": torch.stack([positions, block_positions], dim=1),
            "labels": labels,
        }

    def _tokens(self, feature: Mapping[str, Any], rng: random.Random) -> list[int]:
        if "input_ids" in feature:
            tokens = list(feature["input_ids"])
        elif "text" in feature:
            # What looks like a control token in a text is text.
            encoding = self.tokenizer(feature["text"], add_special_tokens=False, split_special_tokens=True)
            tokens = encoding["input_ids"]
        else:
            raise ValueError(f"a text needs a field `input_ids` or `text`, but has {sorted(feature) or 'none'}")
        excess = len(tokens) - self.longest_text
        if excess > 0:
            start = rng.randint(0, excess)
            tokens = tokens[start : start + self.longest_text]
        return [int(token) for token in tokens]

    def _shift(self, example: Example) -> Example:
        """Labels one place later, where a loss that shifts looks for them."""
        if 1 not in example.block_positions:  # a text without tokens has nothing to learn
            return example
        return Example(
            [*example.input_ids, self.control.end],
            [*example.positions, example.positions[-1]],
            [*example.block_positions, example.block_positions[-1] + 1],
            [IGNORE_INDEX, *example.labels],
        )
