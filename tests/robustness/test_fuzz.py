"""Random batches, paddings, masks, caches and beams, against one unpadded row of the eager model in fp32.

The truth is always the plainest call there is: one row, a mask of ones (GLM is causal without one), no positions, no cache.
"""

import random
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, DynamicCache, StaticCache

from goldens import GOLDENS
from robustness.tally import SEED, Tally, sample_or_whole

PART = "fuzz"
BACKENDS = ("eager", "sdpa")
TOLERANCE = 1e-4


class Subject(NamedTuple):
    """A golden model, the ids of plain tokens, and what a prompt ends with."""

    golden: str
    auto_class: Any
    plain_ids: range
    prompt_end: tuple[int, ...] = ()
    options: tuple[tuple[str, int], ...] = ()

    @property
    def sees_all_of_a_prompt(self) -> bool:
        return bool(self.prompt_end)


_GLM_TOKENS = {
    "mask_token_id": 150,
    "gmask_token_id": 151,
    "smask_token_id": 152,
    "sop_token_id": 153,
    "eop_token_id": 154,
}
_GLM130B_TOKENS = {"mask_token_id": 150, "gmask_token_id": 151, "smask_token_id": 152, "bos_token_id": 154}
SUBJECTS = {
    subject.golden: subject
    for subject in (
        Subject("baichuan_7b", AutoModelForCausalLM, range(5, 190)),
        Subject("baichuan2_13b", AutoModelForCausalLM, range(5, 190)),
        Subject("chatglm_6b_3layer", AutoModel, range(5, 139), (141, 144)),
        Subject("chatglm2_6b", AutoModel, range(5, 120)),
        Subject("chatglm3_6b_int4", AutoModel, range(5, 120)),
        Subject("glm", AutoModelForSeq2SeqLM, range(5, 145), (151, 153), tuple(_GLM_TOKENS.items())),
        Subject("glm130b", AutoModelForSeq2SeqLM, range(5, 145), (151, 154), tuple(_GLM130B_TOKENS.items())),
        Subject("qwen", AutoModelForCausalLM, range(5, 140)),
    )
}
every_subject = pytest.mark.parametrize("golden", SUBJECTS)


@cache
def model_of(golden: str, backend: str = "eager") -> Any:
    subject = SUBJECTS[golden]
    options = {"attn_implementation": backend, "dtype": torch.float32, **dict(subject.options)}
    return subject.auto_class.from_pretrained(GOLDENS / golden, **options).eval()


def random_row(subject: Subject, generator: random.Random, answer: int = 0, longest: int = 9) -> list[int]:
    """A prompt of the family, and `answer` tokens behind it."""
    context = [generator.choice(subject.plain_ids) for _ in range(generator.randint(2, longest))]
    return [*context, *subject.prompt_end, *(generator.choice(subject.plain_ids) for _ in range(answer))]


@torch.no_grad()
def truth(golden: str, row: list[int]) -> torch.Tensor:
    ids = torch.tensor([row])
    return model_of(golden)(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].float()


def padded(rows: list[list[int]], sides: list[str], more: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows as a batch with 0 for padding, each on its side, and the 0/1 mask."""
    length = max(map(len, rows)) + more
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for at, (row, side) in enumerate(zip(rows, sides, strict=True)):
        start = length - len(row) if side == "left" else 0 if side == "right" else (length - len(row)) // 2
        ids[at, start : start + len(row)] = torch.tensor(row)
        mask[at, start : start + len(row)] = 1
    return ids, mask


def positions_of(subject: Subject, rows: list[list[int]], mask: torch.Tensor) -> torch.Tensor:
    """[batch, length], or [batch, 2, length] where a prompt ends in a blank: the places of its tokens, and those behind it
    in the blank."""
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    if not subject.sees_all_of_a_prompt:
        return places
    blanks = torch.tensor([[row.index(subject.prompt_end[0])] for row in rows])
    return torch.stack([places.minimum(blanks), (places - blanks).clamp(min=0)], dim=1)


def is_close(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    return logits.shape == expected.shape and bool(torch.allclose(logits.float(), expected, atol=TOLERANCE, rtol=0))


def sweep(
    tally: Tally, golden: str, row: str, count: int, one: Callable[[Subject, random.Random, Tally], None]
) -> None:
    tally.part, tally.name = PART, row
    for number in range(count):
        one(SUBJECTS[golden], random.Random(f"{SEED} {golden} {row} {number}"), tally)
    tally.check()


# --- padding and masks ------------------------------------------------------------------------------------------------

MASK_DTYPES = (
    *(torch.bool, torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)


def one_padded_batch(subject: Subject, generator: random.Random, tally: Tally) -> None:
    rows = [random_row(subject, generator, generator.randint(0, 5)) for _ in range(generator.randint(1, 4))]
    sides = [generator.choice(("left", "right", "both")) for _ in rows]
    ids, mask = padded(rows, sides, generator.randint(0, 3))
    dtype, backend = generator.choice(MASK_DTYPES), generator.choice(BACKENDS)

    @torch.no_grad()
    def answer() -> torch.Tensor:
        return model_of(subject.golden, backend)(ids, attention_mask=mask.to(dtype)).logits

    tally.judge(
        f"{subject.golden}, {backend}, padding {sides}, {dtype}, lengths {[len(row) for row in rows]} of {ids.shape[1]}",
        answer,
        lambda logits: all(
            is_close(logits[at][mask[at] != 0], truth(subject.golden, row)) for at, row in enumerate(rows)
        ),
    )


@sample_or_whole
@every_subject
def test_padded_batches(golden, whole, tally):
    sweep(tally, golden, "padded batches, masks of every dtype", 300 if whole else 25, one_padded_batch)
    assert not tally.counts["refused"], dict(tally.errors)


def one_packed_row(subject: Subject, generator: random.Random, tally: Tally) -> None:
    """Whole numbers in the mask: each is a sequence of its own. Refused where a family does not declare it."""
    # Within Qwen's trained length: beyond it LogN counts columns, whatever stands in them (docs/qwen.md).
    rows = [random_row(subject, generator, generator.randint(0, 2), longest=5) for _ in range(generator.randint(2, 4))]
    ids = torch.tensor([[index for row in rows for index in row]])
    mask = torch.tensor([[number for number, row in enumerate(rows, start=1) for _ in row]])
    before, behind = generator.randint(0, 2), generator.randint(0, 2)
    ids, mask = (torch.nn.functional.pad(tensor, (before, behind)) for tensor in (ids, mask))
    dtype, backend = generator.choice(MASK_DTYPES[1:]), generator.choice(BACKENDS)

    @torch.no_grad()
    def answer() -> torch.Tensor:
        return model_of(subject.golden, backend)(ids, attention_mask=mask.to(dtype), use_cache=False).logits

    tally.judge(
        f"{subject.golden}, {backend}, packed lengths {[len(row) for row in rows]}, {dtype}",
        answer,
        lambda logits: all(
            is_close(logits[mask == number], truth(subject.golden, row)) for number, row in enumerate(rows, start=1)
        ),
    )


@sample_or_whole
@every_subject
def test_packed_rows(golden, whole, tally):
    sweep(tally, golden, "packed rows", 200 if whole else 15, one_packed_row)


NO_MASKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "-1 for padding": lambda mask: torch.where(mask == 0, -1, mask),
    "negative": lambda mask: -mask,
    "one negative": lambda mask: _put(mask, -3),
    "halves": lambda mask: mask * 0.5,
    "one and a half": lambda mask: _put(mask.float(), 1.5),
    "NaN": lambda mask: _put(mask.float(), float("nan")),
    "infinity": lambda mask: _put(mask.float(), float("inf")),
    "minus infinity": lambda mask: _put(mask.float(), -float("inf")),
    "additive zeros and minus infinity": lambda mask: torch.where(mask == 0, -torch.inf, 0.0),
    "additive zeros and the smallest": lambda mask: (1.0 - mask) * torch.finfo(torch.float32).min,
    "complex": lambda mask: mask.to(torch.complex64),
    "one too short": lambda mask: mask[:, 1:],
    "one too long": lambda mask: torch.cat([mask, mask[:, -1:]], dim=1),
    "of twice the length": lambda mask: mask.repeat(1, 2),
    "empty": lambda mask: mask[:, :0],
    "a row short": lambda mask: mask[1:],
    "a row too long": lambda mask: torch.cat([mask, mask[:1]]),
    "of one row": lambda mask: mask[:1],
    "a scalar": lambda mask: mask[0, 0],
    "1-D": lambda mask: mask[0],
    "3-D of one query": lambda mask: mask[:, None],
    "3-D, transposed": lambda mask: mask[:, :, None],
    "4-D of one query": lambda mask: mask[:, None, None],
    "4-D of another length": lambda mask: torch.ones(len(mask), 1, mask.shape[1], mask.shape[1] - 1).bool(),
    "5-D": lambda mask: mask[:, None, None, None],
    "a list": lambda mask: mask.tolist(),
    "a numpy array": lambda mask: mask.numpy(),
    "a string": lambda mask: "1111",
}


def _put(mask: torch.Tensor, value: float) -> torch.Tensor:
    mask = mask.clone()
    mask[0, -1] = value
    return mask


@every_subject
def test_what_is_no_mask(golden, tally):
    """Other values, lengths and ranks: refused, or what they must mean."""
    tally.part, tally.name = PART, "odd masks"
    subject, generator = SUBJECTS[golden], random.Random(SEED)
    rows = [random_row(subject, generator, 3), random_row(subject, generator, 1)]
    ids, mask = padded(rows, ["left", "left"])
    for backend in BACKENDS:
        for name, change in NO_MASKS.items():
            if (golden, name) == ("glm", "a scalar"):
                continue  # one length of context for all rows, as in the original

            @torch.no_grad()
            def answer(change: Callable = change, backend: str = backend) -> torch.Tensor:
                return model_of(golden, backend)(ids, attention_mask=change(mask)).logits

            tally.judge(
                f"{golden}, {backend}, mask {name}",
                answer,
                lambda logits: all(
                    is_close(logits[at][mask[at] != 0], truth(golden, row)) for at, row in enumerate(rows)
                ),
            )
    tally.check()


@every_subject
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_masks_of_any_numbers(golden, data):
    """A mask of arbitrary numbers is the one of 0 and 1, a packed row, or refused."""
    row = random_row(SUBJECTS[golden], random.Random(SEED), 2)
    numbers = st.one_of(
        st.integers(-3, 4), st.floats(-2, 3, width=16), st.sampled_from([0.0, 1.0, float("nan"), float("inf")])
    )
    values = data.draw(st.lists(numbers, min_size=len(row), max_size=len(row)))
    mask = torch.tensor([values], dtype=torch.float64)
    whole = bool(mask.isfinite().all()) and bool((mask == mask.round()).all()) and bool((mask >= 0).all())
    model = model_of(golden, data.draw(st.sampled_from(BACKENDS)))
    if whole and SUBJECTS[golden].sees_all_of_a_prompt:
        return  # what is cut out of a prompt may hold no start any more
    with torch.no_grad():
        if not whole:
            with pytest.raises((ValueError, TypeError)):
                model(torch.tensor([row]), attention_mask=mask)
            return
        try:
            logits = model(torch.tensor([row]), attention_mask=mask, use_cache=False).logits[0]
        except ValueError:
            return
    for number in set(values) - {0}:
        places = [at for at, value in enumerate(values) if value == number]
        if places != list(range(places[0], places[-1] + 1)):
            return  # a sequence in pieces: its positions are the family's own affair
        assert is_close(logits[places], truth(golden, [row[at] for at in places])), values


# --- caches -----------------------------------------------------------------------------------------------------------


def one_chunked_prefill(subject: Subject, generator: random.Random, tally: Tally) -> None:
    """In parts through a cache; a prompt that sees all of itself is one part."""
    answer_length = generator.randint(1, 8)
    rows = [random_row(subject, generator, answer_length) for _ in range(generator.randint(1, 3))]
    ids, mask = padded(rows, ["left"] * len(rows))
    first = ids.shape[1] - answer_length if subject.sees_all_of_a_prompt else 1
    stops = sorted(
        {*generator.sample(range(first, ids.shape[1]), generator.randint(0, ids.shape[1] - first)), ids.shape[1]}
    )
    stops = [first, *stops] if subject.sees_all_of_a_prompt else stops
    kind, backend = generator.choice(("new", "dynamic", "static")), generator.choice(BACKENDS)
    dtype, positions = generator.choice(MASK_DTYPES), positions_of(subject, rows, mask)
    model = model_of(subject.golden, backend)

    @torch.no_grad()
    def answer() -> torch.Tensor:
        cache: Any = None
        if kind == "dynamic":
            cache = DynamicCache(config=model.config)
        elif kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=ids.shape[1])
        logits, start = [], 0
        for stop in dict.fromkeys(stops):
            given = mask[:, :stop].to(dtype)
            options = {"position_ids": positions[..., start:stop]} if subject.sees_all_of_a_prompt else {}
            output = model(ids[:, start:stop], attention_mask=given, past_key_values=cache, use_cache=True, **options)
            cache, start = output.past_key_values if cache is None else cache, stop
            logits.append(output.logits)
        return torch.cat(logits, dim=1)

    tally.judge(
        f"{subject.golden}, {backend}, {kind} cache, {dtype}, parts {stops}, lengths {[len(row) for row in rows]}",
        answer,
        lambda logits: all(
            is_close(logits[at][mask[at] != 0], truth(subject.golden, row)) for at, row in enumerate(rows)
        ),
    )


@sample_or_whole
@every_subject
def test_chunked_prefill(golden, whole, tally):
    sweep(tally, golden, "parts through a cache", 200 if whole else 15, one_chunked_prefill)


# --- generation -------------------------------------------------------------------------------------------------------


@cache
def generated_alone(golden: str, row: tuple[int, ...], beams: int, new: int) -> tuple[int, ...]:
    return tuple(_generate(model_of(golden), torch.tensor([row]), beams, new)[0].tolist())


def _generate(model: Any, ids: torch.Tensor, beams: int, new: int, **options: Any) -> torch.Tensor:
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(ids, max_new_tokens=new, num_beams=beams, **options)[:, ids.shape[1] :]


def one_generation(subject: Subject, generator: random.Random, tally: Tally) -> None:
    rows = [random_row(subject, generator) for _ in range(generator.randint(1, 4))]
    ids, mask = padded(rows, ["left"] * len(rows), generator.randint(0, 3))
    beams, new = generator.choice((1, 1, 2, 3)), generator.randint(1, 6)
    backend, dtype = generator.choice(BACKENDS), generator.choice(MASK_DTYPES)
    options = generator.choice(
        (
            {},
            {"use_cache": False},
            {"cache_implementation": "static", "disable_compile": True},
            {"cache_implementation": "dynamic"},
        )
    )
    tally.judge(
        f"{subject.golden}, {backend}, {beams} beams, {options}, {dtype}, lengths {[len(row) for row in rows]}",
        lambda: _generate(
            model_of(subject.golden, backend), ids, beams, new, attention_mask=mask.to(dtype), **options
        ),
        lambda found: (
            found.tolist() == [list(generated_alone(subject.golden, tuple(row), beams, new)) for row in rows]
        ),
    )


@sample_or_whole
@every_subject
def test_generation(golden, whole, tally):
    sweep(tally, golden, "greedy and beam search in batches", 120 if whole else 8, one_generation)


# --- inputs that are none -------------------------------------------------------------------------------------------------

ODD_INPUTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a list": lambda ids: ids.tolist(),
    "a numpy array": lambda ids: ids.numpy(),
    "a tuple of numpy rows": lambda ids: tuple(numpy.array(row) for row in ids.tolist()),
    "int16": lambda ids: ids.to(torch.int16),
    "int8": lambda ids: ids.clamp(max=100).to(torch.int8),
    "uint8": lambda ids: ids.to(torch.uint8),
    "bool": lambda ids: ids.bool(),
    "floats": lambda ids: ids.float(),
    "halves": lambda ids: ids + 0.5,
    "complex": lambda ids: ids.to(torch.complex64),
    "1-D": lambda ids: ids[0],
    "3-D": lambda ids: ids[None],
    "a scalar": lambda ids: ids[0, 0],
    "no rows": lambda ids: ids[:0],
    "no columns": lambda ids: ids[:, :0],
    "negative": lambda ids: ids - 1000,
    "too large": lambda ids: ids + 10**6,
    "a string": lambda ids: "ids",
    "None": lambda ids: None,
    "int32": lambda ids: ids.to(torch.int32),
}
# Errors from the inside say nothing to whom they meet.
UNHELPFUL = (
    IndexError,
    AttributeError,
    AssertionError,
    UnboundLocalError,
    ZeroDivisionError,
    StopIteration,
    RuntimeError,
)


@every_subject
def test_odd_ids(golden, tally):
    """Refused in one sentence about `input_ids`, or read for what they are."""
    tally.part, tally.name = PART, "odd ids"
    row = random_row(SUBJECTS[golden], random.Random(SEED), 2)
    with torch.no_grad():
        expected = model_of(golden)(torch.tensor([row])).logits[0]  # without a mask, which odd ids would not fit
    unhelpful = []
    for name, change in ODD_INPUTS.items():

        @torch.no_grad()
        def answer(change: Callable = change, name: str = name) -> torch.Tensor:
            try:
                return model_of(golden)(change(torch.tensor([row]))).logits
            except Exception as error:
                if (
                    isinstance(error, UNHELPFUL)
                    or not str(error)
                    or len(str(error)) > 400
                    or "input" not in str(error)
                ):
                    unhelpful.append(f"{golden}, ids as {name}: {type(error).__name__}: {error}"[:200])
                raise

        tally.judge(
            f"{golden}, ids as {name}", answer, lambda logits: is_close(logits.reshape(expected.shape), expected)
        )
    assert not unhelpful, "\n".join(unhelpful)
    tally.check()


ODD_POSITIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "as they are": lambda positions: positions,
    "int32": lambda positions: positions.to(torch.int32),
    "negative": lambda positions: positions - 100,
    "floats": lambda positions: positions.float(),
    "halves": lambda positions: positions + 0.5,
    "NaN": lambda positions: positions * float("nan"),
    "a length short": lambda positions: positions[..., 1:],
    "a length too long": lambda positions: torch.cat([positions, positions[..., -1:]], dim=-1),
    "1-D": lambda positions: positions.flatten(),
    "4-D": lambda positions: positions[None, None, None],
    "of two rows": lambda positions: positions.repeat(2, *[1] * (positions.ndim - 1)),
    "bool": lambda positions: positions.bool(),
    "a list": lambda positions: positions.tolist(),
    "complex": lambda positions: positions.to(torch.complex64),
}


@every_subject
def test_odd_positions(golden, tally):
    tally.part, tally.name = PART, "odd positions"
    subject = SUBJECTS[golden]
    row = random_row(subject, random.Random(SEED), 2)
    expected = truth(golden, row)
    positions = positions_of(subject, [row], torch.ones(1, len(row), dtype=torch.long))
    for name, change in ODD_POSITIONS.items():
        tally.judge(
            f"{golden}, positions {name}",
            torch.no_grad()(
                lambda change=change: model_of(golden)(
                    torch.tensor([row]), attention_mask=torch.ones(1, len(row)), position_ids=change(positions)
                ).logits[0]
            ),
            lambda logits: is_close(logits, expected),
        )
    tally.check()


@every_subject
def test_odd_caches(golden, tally):
    """Tuples of older versions, other models' and other batches' caches, things that are none."""
    tally.part, tally.name = PART, "odd caches"
    row = torch.tensor([random_row(SUBJECTS[golden], random.Random(SEED), 2)])
    model = model_of(golden)
    with torch.no_grad():
        expected = model(row).logits[0]
    filled = model(row, use_cache=True).past_key_values
    layer = (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    other = DynamicCache()
    other.update(torch.zeros(1, 7, 3, 5), torch.zeros(1, 7, 3, 5), 0)
    odd = {
        "an empty tuple": (),
        "a tuple of layers": (layer,) * len(filled.layers),
        "a list of layers": [layer] * len(filled.layers),
        "another model's": other,
        "a dictionary": {"keys": layer},
        "a string": "cache",
        "a number": 3,
        "True": True,
    }
    for name, cache_like in odd.items():
        tally.judge(
            f"{golden}, cache {name}",
            torch.no_grad()(lambda cache_like=cache_like: model(row, past_key_values=cache_like).logits[0]),
            lambda logits: is_close(logits, expected),
        )
    two = row.repeat(2, 1)
    tally.judge(
        f"{golden}, cache of one row", torch.no_grad()(lambda: model(two, past_key_values=filled).logits[0]), bool
    )
    tally.check()
