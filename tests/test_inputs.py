"""The matrix family × input: one meaning of `attention_mask` everywhere, and one sentence for whatever is no input.

The truth is always a row alone, without padding.
"""

from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModel

from goldens import GOLDENS
from test_features import FAMILIES, families, forward, load, prompt

MASK_DTYPES = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)
BACKENDS = ("eager", "sdpa")
NO_MASK = r"`attention_mask` (holds|has shape|is of)"
any_family = st.sampled_from(FAMILIES)
quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def model(row, backend="eager"):
    return _models(row.checkpoint, backend)


@cache
def _models(name, backend):
    return load(next(row for row in FAMILIES if row.checkpoint == name), backend, dtype=torch.float32)


@cache
@torch.no_grad()
def _alone(name, ids):
    row, ids = next(row for row in FAMILIES if row.checkpoint == name), torch.tensor([ids])
    return forward(row, model(row), ids, use_cache=False).logits[0]


def alone(row, ids):
    return _alone(row.checkpoint, tuple(ids.tolist()))


@quick
@given(data=st.data())
@torch.no_grad()
def test_padding_on_any_side_in_any_dtype(data):
    row, backend = data.draw(any_family), data.draw(st.sampled_from(BACKENDS))
    rows = [prompt(row, data.draw(st.integers(4, 9)), seed)[0] for seed in range(data.draw(st.integers(1, 3)))]
    length = max(map(len, rows)) + data.draw(st.integers(0, 2))
    ids, mask = torch.zeros(2, len(rows), length, dtype=torch.long)
    for at, tokens in enumerate(rows):
        start = data.draw(st.integers(0, length - len(tokens)))
        ids[at, start : start + len(tokens)], mask[at, start : start + len(tokens)] = tokens, 1
    logits = model(row, backend)(ids, attention_mask=mask.to(data.draw(st.sampled_from(MASK_DTYPES)))).logits
    for at, tokens in enumerate(rows):
        torch.testing.assert_close(logits[at][mask[at] == 1], alone(row, tokens), atol=1e-4, rtol=0)


@quick
@given(data=st.data())
@torch.no_grad()
def test_whole_numbers_pack_in_every_family(data):
    row, backend = data.draw(any_family), data.draw(st.sampled_from(BACKENDS))
    rows = [prompt(row, data.draw(st.integers(3, 7)), seed)[0] for seed in range(data.draw(st.integers(2, 4)))]
    numbers = data.draw(st.lists(st.integers(1, 6), min_size=len(rows), max_size=len(rows), unique=True))
    around = data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    ids = torch.nn.functional.pad(torch.cat(rows), around)[None]
    mask = torch.cat([torch.full_like(tokens, number) for tokens, number in zip(rows, numbers, strict=True)])
    mask = torch.nn.functional.pad(mask, around)[None]
    dtype = data.draw(st.sampled_from(MASK_DTYPES[1:]))
    logits = model(row, backend)(ids, attention_mask=mask.to(dtype), use_cache=False).logits
    for tokens, number in zip(rows, numbers, strict=True):
        torch.testing.assert_close(logits[mask == number], alone(row, tokens), atol=1e-4, rtol=0)


@quick
@given(
    row=any_family,
    wrong=st.one_of(
        st.integers(-(2**20), -1), st.integers(10, 2**20), st.floats(0.01, 0.99), st.just(float("nan")), st.just(1.5)
    ),
    place=st.integers(0, 8),
    backend=st.sampled_from(BACKENDS),
)
def test_values_that_no_mask_has_are_refused_in_the_same_words(row, wrong, place, backend):
    ids = prompt(row, 9)
    mask = torch.ones(1, 9, dtype=torch.float64 if isinstance(wrong, float) else torch.int64)
    mask[0, place] = wrong
    with pytest.raises(
        ValueError, match=r"`attention_mask` holds .*, but must hold 0 for what is not seen and 1 for what is"
    ):
        model(row, backend)(ids, attention_mask=mask)


@families
@pytest.mark.parametrize(
    "change",
    [
        lambda mask: mask[:, 1:],
        lambda mask: mask.repeat(1, 2),
        lambda mask: mask[:, :0],
        lambda mask: mask[:1],
        lambda mask: mask.repeat(2, 1),
        lambda mask: mask[0],
        lambda mask: mask[:, None],
        lambda mask: mask[:, :, None],
        lambda mask: mask[:, None, None],
        lambda mask: mask[:, None, None, None],
        lambda mask: mask.to(torch.complex64),
        lambda mask: mask.tolist(),
        lambda mask: mask.numpy(),
        lambda mask: "1111",
        lambda mask: torch.where(mask.cumsum(1) > 1, 0.0, -torch.inf),
        lambda mask: torch.full((2, 1, 9, 9), float("nan")),
        lambda mask: torch.full((2, 1, 9, 9), 2),
    ],
)
def test_masks_of_another_form_are_refused_in_the_same_words(row, change):
    ids = prompt(row, 9).repeat(2, 1)
    with pytest.raises(ValueError, match=NO_MASK):
        model(row)(ids, attention_mask=change(torch.ones_like(ids)))


def test_a_4d_mask_of_floats_that_are_0_and_1_would_be_added_to_scores():
    row = next(row for row in FAMILIES if row.checkpoint == "qwen")
    pairs = torch.ones(1, 1, 9, 9).tril()
    with pytest.raises(ValueError, match=r"pass `attention_mask.bool\(\)`"):
        model(row)(prompt(row, 9), attention_mask=pairs)
    with torch.no_grad():
        logits = model(row)(prompt(row, 9), attention_mask=pairs.bool()).logits[0]
    torch.testing.assert_close(logits, alone(row, prompt(row, 9)[0]), atol=1e-4, rtol=0)


@families
def test_generate_does_not_continue_packed_rows(row):
    mask = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2]])
    with pytest.raises(ValueError, match="`generate` continues one sequence in each row"):
        model(row).generate(prompt(row, 9), attention_mask=mask)


@families
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_in_double_precision(row, side):
    double = load(row, "eager", dtype=torch.float64)
    tokens = prompt(row, 7)[0]
    ids = torch.nn.functional.pad(tokens, (3, 0) if side == "left" else (0, 3))[None]
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (3, 0) if side == "left" else (0, 3))[None]
    logits = double(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[mask == 1].float(), alone(row, tokens), atol=1e-3, rtol=0)


@families
@pytest.mark.parametrize(
    "change",
    [
        lambda ids: ids.tolist(),
        lambda ids: ids.numpy(),
        lambda ids: "ids",
        lambda ids: ids.to(torch.int16),
        lambda ids: ids.to(torch.uint8),
        lambda ids: ids.bool(),
        lambda ids: ids.float(),
        lambda ids: ids.to(torch.complex64),
        lambda ids: ids[0],
        lambda ids: ids[0, 0],
        lambda ids: ids[None],
        lambda ids: ids[:0],
        lambda ids: ids[:, :0],
        lambda ids: ids - 1000,
        lambda ids: ids + 10**6,
    ],
)
def test_what_is_no_batch_of_ids_is_refused_in_one_sentence(row, change):
    with pytest.raises(ValueError, match="`input_ids") as error:
        model(row)(change(prompt(row, 9)))
    assert len(str(error.value)) < 250


@families
@pytest.mark.parametrize(
    "change",
    [
        lambda positions: positions.float(),
        lambda positions: positions * float("nan"),
        lambda positions: positions.bool(),
        lambda positions: positions.tolist(),
        lambda positions: positions.to(torch.int16),
        lambda positions: positions + 2**40,
        lambda positions: positions - 2**40,
        lambda positions: positions[..., 1:],
        lambda positions: positions.flatten(),
        lambda positions: positions.repeat(2, *[1] * (positions.ndim - 1)),
    ],
)
def test_what_are_no_positions_is_refused_in_one_sentence(row, change):
    positions = torch.arange(9)[None]
    if row.prompt_end:
        positions = torch.stack([positions, torch.zeros_like(positions)], dim=1)
    with pytest.raises(ValueError, match="`position_ids`") as error:
        model(row)(prompt(row, 9), position_ids=change(positions))
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("row", [row for row in FAMILIES if row.prompt_end], ids=lambda row: row.checkpoint)
def test_positions_in_blanks_are_not_negative(row):
    positions = torch.arange(9)[None]
    if model(row).config.block_position_encoding:
        positions = torch.stack([positions, torch.zeros_like(positions)], dim=1)
    with pytest.raises(ValueError, match="`position_ids` holds -3"):
        model(row)(prompt(row, 9), position_ids=positions - 3)


@torch.no_grad()
def test_positions_of_relative_models_may_begin_anywhere():
    row = next(row for row in FAMILIES if row.checkpoint == "chatglm2_6b")
    ids = prompt(row, 9)
    logits = model(row)(ids, position_ids=torch.arange(-100, -91)[None].int()).logits[0]
    torch.testing.assert_close(logits, alone(row, ids[0]), atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_context_length_of_glm():
    row = next(row for row in FAMILIES if row.needs_mask)
    ids = prompt(row, 9).repeat(2, 1)
    for lengths in (torch.tensor([7, 7]), torch.tensor(7), torch.tensor([7.0, 7.0])):
        assert model(row)(ids, attention_mask=lengths).logits.isfinite().all()
    for wrong in (torch.tensor([-1, 7]), torch.tensor([7, 10]), torch.tensor([0.5, 7]), torch.tensor(float("nan"))):
        with pytest.raises(ValueError, match="`attention_mask` holds"):
            model(row)(ids, attention_mask=wrong)


@torch.no_grad()
def test_a_p_tuning_prefix_is_seen_by_every_packed_sequence():
    tuned = AutoModel.from_pretrained(GOLDENS / "chatglm2_6b_ptuning", dtype=torch.float32).eval()
    rows = [torch.randint(5, 60, (1, length)) for length in (3, 5)]
    numbers = torch.tensor([[1] * 3 + [2] * 5])
    for dtype in (torch.long, torch.uint8):
        logits = tuned(torch.cat(rows, dim=1), attention_mask=numbers.to(dtype), use_cache=False).logits
        for number, ids in enumerate(rows, start=1):
            torch.testing.assert_close(logits[numbers == number], tuned(ids).logits[0], atol=1e-4, rtol=0)
