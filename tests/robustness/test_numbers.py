"""Numbers at the ends of what a format holds: they come out right, or an error says that they cannot."""

import random
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from goldens import GOLDENS
from hf_cnllm import FAMILIES
from hf_cnllm.families import Shape
from robustness.test_fuzz import SUBJECTS, padded, random_row, truth

PART = "numbers"
MAGNITUDES = [10.0**exponent for exponent in range(-8, 5)]


@cache
def float_model(magnitude: float) -> Any:
    """A ChatGLM2 with all its layers' weights of about one size, each row's largest at a place of its own."""
    family = next(family for family in FAMILIES if "chatglm2" in family.architectures)
    torch.manual_seed(0)
    model = AutoModel.from_config(family.make_config("chatglm2", Shape(32, 1, 2, 32, 64)))
    with torch.no_grad():
        for name, weight in layer_weights(model).items():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) * magnitude)
    return model


def layer_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2}


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_weights(bits, tally, tmp_path):
    """No weight is off by more than half a step (and the rounding of the scale), whatever its size; none changes sign."""
    tally.part, tally.name = PART, "INT8 and INT4 weights over 13 magnitudes"
    for magnitude in MAGNITUDES:
        before = {name: weight.detach().clone() for name, weight in layer_weights(float_model(magnitude)).items()}

        def answer(magnitude: float = magnitude) -> dict[str, torch.Tensor]:
            model = AutoModel.from_config(float_model(magnitude).config)
            model.load_state_dict(float_model(magnitude).state_dict())
            return layer_weights(model.quantize(bits).dequantize())

        for name, weight in before.items():
            tally.judge(
                f"{bits} bits, weights of {magnitude:g}, {name}",
                lambda name=name, answer=answer: answer()[name],
                lambda found, weight=weight: _is_within_a_step(found.detach(), weight, bits),
            )
    tally.check()


def _is_within_a_step(found: torch.Tensor, weight: torch.Tensor, bits: int) -> bool:
    step = weight.abs().amax(dim=-1, keepdim=True) / (2 ** (bits - 1) - 1)
    largest = weight.abs() == weight.abs().amax(dim=-1, keepdim=True)
    return bool(
        ((found - weight).abs() <= 0.6 * step).all() and (found[largest].sign() == weight[largest].sign()).all()
    )


BROKEN = {"NaN": float("nan"), "infinity": float("inf"), "minus infinity": -float("inf")}
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True},
    "beams": {"do_sample": False, "num_beams": 2},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "greedy without a cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("golden", SUBJECTS)
def test_broken_weights_end_generation(golden, tally):
    """NaN logits have no largest: no way of generating may answer with tokens."""

    tally.part, tally.name = PART, "generation with NaN and infinite weights"
    subject = SUBJECTS[golden]
    ids = torch.tensor([random_row(subject, random.Random(golden))])
    for what, value in BROKEN.items():
        options = {"dtype": torch.float32, **dict(subject.options)}
        model = subject.auto_class.from_pretrained(GOLDENS / golden, **options).eval()
        name, parameter = next((n, p) for n, p in model.named_parameters() if p.ndim == 1 and p.is_floating_point())
        with torch.no_grad():
            parameter.fill_(value)
        for way, how in WAYS.items():
            tally.judge(
                f"{golden}, {name} of {what}, {way}",
                lambda model=model, how=how: model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, pad_token_id=0, **how
                ),
                lambda found: False,
            )
    tally.check()


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norm_head(dtype, training, tally):
    """Rows and hidden states of large norms: logits, loss and gradients are those in fp32, which normalizes the rows."""
    tally.part, tally.name = PART, "NormHead in half precision"
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    for norm in (1e-3, 1.0, 30.0, 300.0, 3000.0, 30_000.0):

        def outcome(in_dtype: torch.dtype, norm: float = norm) -> list[torch.Tensor]:
            model = AutoModelForCausalLM.from_pretrained(GOLDENS / "baichuan2_13b", dtype=torch.float32).train(
                training
            )
            parameters = dict(model.named_parameters())
            raw, last_norm = parameters["lm_head.weight"], parameters["model.norm.weight"]
            with torch.no_grad():
                raw.mul_(norm / raw.norm(dim=-1, keepdim=True))
                last_norm.mul_(20)
            model = model.to(in_dtype)
            output = model(ids, labels=ids)
            output.loss.backward()
            # With respect to the weights' directions: the gradient of a row shrinks as its norm grows.
            gradient = raw.grad.float() * norm if in_dtype != torch.float16 or norm <= 300 else torch.zeros(())
            return [model(ids).logits.detach().float(), output.loss.detach().float(), gradient]

        expected = outcome(torch.float32)
        tally.judge(
            f"{dtype}, training={training}, rows of norm {norm:g}",
            lambda outcome=outcome: outcome(dtype),
            lambda found, expected=expected: (
                all(
                    bool(ours.isfinite().all()) and (not ours.ndim or _is_near(ours, theirs))
                    for ours, theirs in zip(found, expected, strict=True)
                )
                and _is_near(found[1], expected[1])
            ),
        )
    tally.check()


def _is_near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 0.1 * expected.abs().max())


@pytest.mark.parametrize("golden", SUBJECTS)
def test_left_padding_in_double_precision(golden, tally):

    tally.part, tally.name = PART, "padding in fp64"
    subject, generator = SUBJECTS[golden], random.Random(golden)
    for backend in ("eager", "sdpa"):
        for side in ("left", "right", "both"):
            rows = [random_row(subject, generator, 4), random_row(subject, generator)]
            ids, mask = padded(rows, [side, side], 2)

            def answer(backend: str = backend, ids: torch.Tensor = ids, mask: torch.Tensor = mask) -> torch.Tensor:
                options = {"attn_implementation": backend, "dtype": torch.float64, **dict(subject.options)}
                model = subject.auto_class.from_pretrained(GOLDENS / golden, **options).eval()
                with torch.no_grad():
                    return model(ids, attention_mask=mask).logits

            tally.judge(
                f"{golden}, {backend}, {side}",
                answer,
                lambda logits, mask=mask, rows=rows: (
                    all(
                        torch.allclose(logits[at][mask[at] != 0].float(), truth(golden, row), atol=1e-3)
                        for at, row in enumerate(rows)
                    )
                    and bool(logits.isfinite().all())
                ),
            )
    tally.check()
