"""Blank infilling against causal language modeling (GLM, arXiv 2103.10360): one small model, its text and compute alike.

    python scripts/blank_infilling.py                                # six minutes of two cores
    python scripts/blank_infilling.py --data corpus.txt --hidden-size 256 --layers 6 --steps 10000

GLM's claim is that a mixture of short and long blanks makes one model that understands and writes; its ablations leave out the block
positions and the random order of the spans. Every line of the table is the same GLM, trained for as many steps of as many tokens;
the causal language model is that GLM without blanks: no token sees a later one, and there is one row of positions. Of held-out text

- one word is blanked, with as much text in front of it as behind: how often the model's most probable tokens are that word's, and
  how often it is more probable than nine other words of the text with as many tokens. The causal model sees what is in front, and
  may also choose the word with which all the text is most probable;
- the second half is to be written: its perplexity a token, given the first.

Writes `table.md`, `results.json` and `plot.png` to --output.
"""

import argparse
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import count, groupby
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from tokenizers import Encoding, Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_cnllm import DataCollatorForBlankInfilling, GLMConfig, GLMForConditionalGeneration
from hf_cnllm.data.blank_infilling import Span, make_example
from hf_cnllm.data.conversations import IGNORE_INDEX
from study import Bytes, markdown, read_text, study_arguments, train, write_study

UNKNOWN = "[UNK]"
CONTROL = {
    "pad_token_id": "[PAD]",
    "mask_token_id": "[MASK]",
    "smask_token_id": "[sMASK]",
    "gmask_token_id": "[gMASK]",
    "sop_token_id": "<|startofpiece|>",
    "eop_token_id": "<|endofpiece|>",
}
WORD_TOKENS = 3  # at most, of a word that is blanked
CHOICES = 10  # with the right one

Batch = dict[str, torch.Tensor]


# --- text ------------------------------------------------------------------------------------------------------------


def train_vocabulary(text: str, size: int) -> PreTrainedTokenizerFast:
    """BPE whose tokens are parts of words, of spaces, or single marks."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]|\s+"), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=size, limit_alphabet=size // 2, special_tokens=[UNKNOWN, *CONTROL.values()], show_progress=False
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        pad_token=CONTROL["pad_token_id"],
        mask_token=CONTROL["mask_token_id"],
    )


def words_of(encoding: Encoding, text: str) -> list[Span]:
    """The tokens of every word of two letters and more that has few tokens, all of them known."""
    found = []
    for _, group in groupby(zip(count(), encoding.word_ids, encoding.tokens, encoding.offsets), key=itemgetter(1)):
        places, _, tokens, offsets = zip(*group, strict=True)
        word = text[offsets[0][0] : offsets[-1][1]]
        if len(tokens) <= WORD_TOKENS and len(word) > 1 and word.isalpha() and UNKNOWN not in tokens:
            found.append((places[0], places[-1] + 1))
    return found


class Cloze(NamedTuple):
    """A text with a word in its middle, and words that could be there, the right one first."""

    text: list[int]
    span: Span
    choices: list[tuple[int, ...]]


def make_clozes(ids: list[int], words: list[Span], length: int, number: int) -> list[Cloze]:
    """Raises ValueError if the words are too few to choose from."""
    rng = random.Random(0)
    by_tokens: dict[int, list[tuple[int, ...]]] = {}
    for start, end in words:
        by_tokens.setdefault(end - start, []).append(tuple(ids[start:end]))
    enough = {tokens for tokens, found in by_tokens.items() if len({*found}) >= CHOICES}
    usable = [
        (start, end) for start, end in words if length // 2 <= start <= len(ids) - length and end - start in enough
    ]
    if len(usable) < number:
        raise ValueError(f"the held-out text has {len(usable)} words to blank, but {number} are asked for")
    clozes = []
    for start, end in rng.sample(usable, number):
        first = start - length // 2
        choices = [tuple(ids[start:end])]
        while len(choices) < CHOICES:
            other = rng.choice(by_tokens[end - start])  # frequent words more often
            choices += [other] * (other not in choices)
        clozes.append(Cloze(ids[first : first + length], (start - first, end - first), choices))
    return clozes


# --- what the models read --------------------------------------------------------------------------------------------


class Causal:
    """Texts for the model without blanks. A data collator."""

    def __call__(self, features: Sequence[Mapping[str, torch.Tensor]]) -> Batch:
        ids = torch.stack([feature["input_ids"] for feature in features])
        return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}

    def rows(self, texts: Sequence[Sequence[int]], spans: Sequence[Span], objective: str) -> Batch:
        """Texts of one length, whose spans are to be written."""
        ids = torch.tensor(texts)
        places, bounds = torch.arange(ids.shape[1]), torch.tensor(spans)
        in_span = (places >= bounds[:, :1]) & (places < bounds[:, 1:])
        return {"input_ids": ids[:, :-1], "labels": ids.where(in_span, IGNORE_INDEX)[:, 1:]}


class Blanks:
    """Texts with blanks for GLM. A data collator."""

    def __init__(self, collator: DataCollatorForBlankInfilling, block_positions: bool):
        self.collator, self.block_positions = collator, block_positions

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Batch:
        return self.finish(self.collator(features))

    def finish(self, batch: Batch) -> Batch:
        """Without block positions, as the authors' code has it, all tokens of a blank have its position."""
        return batch if self.block_positions else batch | {"position_ids": batch["position_ids"][:, 0]}

    def rows(self, texts: Sequence[Sequence[int]], spans: Sequence[Span], objective: str) -> Batch:
        """As `Causal.rows`; the end of a blank, which is nothing to a causal model, does not count."""
        control = self.collator.control
        examples = [
            make_example(text, [span], control.masks[objective], control)
            for text, span in zip(texts, spans, strict=True)
        ]
        batch = self.finish(self.collator.pad(examples))
        return batch | {"labels": batch["labels"].masked_fill(batch["labels"] == control.end, IGNORE_INDEX)}


@torch.no_grad()
def read(model: GLMForConditionalGeneration, batch: Batch, size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """[batch] log-probability of a row's labels, and whether all of them are the most probable tokens."""
    sums, right = [], []
    parts = zip(*(tensor.to(model.device).split(size) for tensor in batch.values()), strict=True)
    for part in parts:
        inputs = dict(zip(batch, part, strict=True))
        labels = inputs.pop("labels")
        log_probs = model(**inputs, use_cache=False).logits.log_softmax(-1)
        counts = labels != IGNORE_INDEX
        sums.append((log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * counts).sum(1))
        right.append(((log_probs.argmax(-1) == labels) | ~counts).all(1))
    return torch.cat(sums), torch.cat(right)


def evaluate(model: GLMForConditionalGeneration, form: Causal | Blanks, clozes: list[Cloze], texts: list) -> dict:
    spans = [cloze.span for cloze in clozes]
    answered = read(model, form.rows([cloze.text for cloze in clozes], spans, "token"))[1]
    results = {"word": answered.float().mean().item()}
    filled = [
        [*cloze.text[: cloze.span[0]], *choice, *cloze.text[cloze.span[1] :]]
        for cloze in clozes
        for choice in cloze.choices
    ]

    def chosen(of_span: Callable[[Span], Span]) -> float:
        scored = [of_span(span) for span in spans for _ in range(CHOICES)]
        scores = read(model, form.rows(filled, scored, "token"))[0].view(-1, CHOICES)
        return (scores.argmax(1) == 0).float().mean().item()

    length = len(texts[0])
    results["choice"] = chosen(lambda span: span)
    if isinstance(form, Causal):
        results["choice with what follows"] = chosen(lambda span: (span[0], length))
    halves = [(length // 2, length)] * len(texts)
    log_prob = read(model, form.rows(texts, halves, "document"))[0].sum().item()
    return results | {"perplexity": math.exp(-log_prob / (len(texts) * (length - length // 2)))}


# --- the study -------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A model of the table."""

    blanks: bool = True
    block_positions: bool = True
    shuffled: bool = True


LINES = {
    "causal LM": Line(blanks=False, block_positions=False),
    "GLM": Line(),
    "GLM without block positions": Line(block_positions=False),
    "GLM without shuffled spans": Line(shuffled=False),
}
MEASURES = {
    "word": ("the word itself", "{:.1%}"),
    "choice": (f"the word of {CHOICES}", "{:.1%}"),
    "choice with what follows": ("with what follows", "{:.1%}"),
    "perplexity": ("perplexity of the second half", "{:.2f}"),
}


def main() -> None:
    parser = study_arguments(__doc__, "blank_infilling")
    parser.add_argument("--vocabulary", type=int, default=1024, help="tokens, trained on the text")
    parser.add_argument("--length", type=int, default=128, help="longest row in tokens")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate")
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--words", type=int, default=400, help="blanked for the test")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()

    parts = [bytes(part.numpy()).decode(errors="replace") for part in read_text(args.data)]
    tokenizer = train_vocabulary(parts[0], args.vocabulary)
    training, held_out = (tokenizer.backend_tokenizer.encode(part) for part in parts)
    training_ids = torch.tensor(training.ids, dtype=torch.int32)
    length = DataCollatorForBlankInfilling(tokenizer, args.length).longest_text
    try:
        clozes = make_clozes(held_out.ids, words_of(held_out, parts[1]), length, args.words)
    except ValueError as error:
        parser.error(f"--data: {error}")
    texts = [cloze.text for cloze in clozes]
    width = row_width(DataCollatorForBlankInfilling(tokenizer, args.length), Bytes(training_ids, length), args.batch)

    results: dict[str, list[dict]] = {}
    for seed in args.seeds:
        for name, line in LINES.items():
            torch.manual_seed(seed)
            model = make_model(args, tokenizer, line)
            collator = DataCollatorForBlankInfilling(tokenizer, args.length, shuffle_spans=line.shuffled, seed=seed)
            form = Blanks(collator, line.block_positions) if line.blanks else Causal()
            losses = train(
                model, Bytes(training_ids, length if line.blanks else width + 1), args.output, seed=seed,
                data_collator=form, max_steps=args.steps, learning_rate=args.rate, warmup_steps=args.steps // 20,
                per_device_train_batch_size=args.batch, logging_steps=max(1, args.steps // 40),
            )  # fmt: skip
            found = evaluate(model.eval(), form, clozes, texts)
            results.setdefault(name, []).append({"seed": seed, **found, "losses": losses})
            told = ", ".join(f"{key} {value:.3f}" for key, value in found.items())
            print(f"{name}, seed {seed}: loss {losses[-1][1]:.3f}, {told}", flush=True)

    head = [f"mean of {len(args.seeds)} seeds, lowest and highest", *(title for title, _ in MEASURES.values())]
    rows = [
        [name, *(cell([run[key] for run in runs if key in run], form) for key, (_, form) in MEASURES.items())]
        for name, runs in results.items()
    ]
    write_study(args.output, markdown(head, rows), {"width": width, "models": results}, draw(results))


def row_width(collator: DataCollatorForBlankInfilling, dataset: Bytes, batch: int, batches: int = 50) -> int:
    """Tokens of GLM's rows, with blanks and padding: what a row of the causal model has, for equal compute."""
    rng = random.Random(0)
    widths = [
        collator([dataset[rng.randrange(len(dataset))] for _ in range(batch)])["input_ids"].shape[1]
        for _ in range(batches)
    ]
    return round(statistics.fmean(widths))


def make_model(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, line: Line
) -> GLMForConditionalGeneration:
    config = GLMConfig(
        vocab_size=len(tokenizer), hidden_size=args.hidden_size, num_layers=args.layers, num_attention_heads=4,
        max_sequence_length=args.length, block_position_encoding=line.block_positions, embedding_dropout_prob=0.0,
        attention_dropout_prob=0.0, output_dropout_prob=0.0,
        **{field: tokenizer.convert_tokens_to_ids(token) for field, token in CONTROL.items()},
    )  # fmt: skip
    return GLMForConditionalGeneration(config)


def cell(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    return f"{form.format(statistics.fmean(values))} ({form.format(min(values))} to {form.format(max(values))})"


def draw(results: Mapping[str, list[dict]]) -> Figure:
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axes, (key, (title, _)) in zip(figure.subplots(1, len(MEASURES), sharey=True), MEASURES.items(), strict=True):
        for number, (name, runs) in enumerate(results.items()):
            values = [run[key] for run in runs if key in run]
            if values:
                axes.barh(name, statistics.fmean(values), color=f"C{number}", alpha=0.5)
            axes.scatter(values, [name] * len(values), color=f"C{number}")
        axes.set(title=title)
        axes.yaxis.set_inverted(True)
    return figure


if __name__ == "__main__":
    main()
