"""Runs a golden case (tests/fixtures/goldens) on a model of this package and compares it with the original's numbers.

A family's test file parametrizes over `golden_cases(...)`, takes the model from `golden_model` and calls `check_case`. Cases that a family words in its own way have their own checks in that family's tests.
"""

import json
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

GOLDENS = Path(__file__).parent / "fixtures" / "goldens"
TOLERANCE = 2e-5
BACKENDS = ("eager", "sdpa", "flex_attention")
FORWARD_INPUTS = ("input_ids", "attention_mask", "position_ids", "inputs_embeds")


@dataclass(frozen=True)
class Case:
    """One case of one golden: what the original was given and what it computed."""

    golden: str
    name: str
    raw: dict[str, Any]

    @property
    def path(self) -> Path:
        return GOLDENS / self.golden

    @property
    def config_overrides(self) -> dict[str, Any]:
        return self.raw.get("config_overrides", {})

    @property
    def grad_norms(self) -> dict[str, float]:
        return self.raw.get("train_grad_norms", {})

    @property
    def inputs(self) -> dict[str, Any]:
        return {key: self._tensor(value) for key, value in self.raw["inputs"].items()}

    @property
    def outputs(self) -> dict[str, Any]:
        return {key: self._tensor(value) for key, value in self.raw["outputs"].items()}

    def _tensor(self, value: Any) -> Any:
        if isinstance(value, dict) and "tensor" in value:
            return _tensors(self.golden)[value["tensor"]]
        return value


@cache
def _tensors(golden: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDENS / golden / "expected.safetensors")


@cache
def cases_of(golden: str) -> dict[str, Case]:
    expected = json.loads((GOLDENS / golden / "expected.json").read_text(encoding="utf-8"))
    return {raw["case"]: Case(golden, raw["case"], raw) for raw in expected["cases"]}


def golden_cases(*goldens: str, skip: tuple[str, ...] = ()) -> list:
    """pytest parameters, one per case, but for those named in `skip` (a family's tests check them on their own)."""
    return [
        pytest.param(case, id=f"{golden}-{name}")
        for golden in goldens
        for name, case in cases_of(golden).items()
        if name not in skip
    ]


def golden_model(auto_class, case: Case, backend: str, **overrides):
    """The checkpoint of a case in eval mode, loaded once for all cases that ask for the same.

    Whoever takes it may switch modes and leave gradients, but not touch weights or configuration.
    """
    asked = case.config_overrides | {"attn_implementation": backend} | overrides
    model = _load(auto_class, case.golden, tuple(sorted(asked.items())))
    model.zero_grad()
    return model.eval()


@lru_cache(maxsize=24)  # a golden's cases follow one another, on every backend in turn
def _load(auto_class, golden: str, kwargs: tuple[tuple[str, Any], ...]):
    return auto_class.from_pretrained(GOLDENS / golden, **dict(kwargs))


def assert_close(
    actual: torch.Tensor, expected: torch.Tensor, real: torch.Tensor | None = None, atol: float = TOLERANCE
):
    """`actual` equals `expected` within `atol`, at the positions where `real` [batch, length] is not 0."""
    actual = actual.detach().float()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if real is not None:
        actual, expected = actual[real != 0], expected[real != 0]
    torch.testing.assert_close(actual, expected.float(), atol=atol, rtol=0)


def check_case(model, case: Case, atol: float = TOLERANCE):
    """Checks every output of a case that this function knows; raises on a case it does not know at all."""
    inputs, outputs = case.inputs, case.outputs
    model.eval()
    if "sequences" in outputs:
        check_greedy(model, case)
    elif "prefill" in inputs:
        check_decode(model, case, atol)
    elif {"logits", "loss"} & set(outputs):
        train_only = case.name.startswith("z_loss") or case.name.startswith("train_")
        check_forward(model, case, atol, train=train_only)
        if "train_logits" in outputs:
            check_training_step(model, case, atol)
    else:
        raise AssertionError(f"no check for golden case {case.golden}/{case.name} with outputs {sorted(outputs)}")


def check_forward(model, case: Case, atol: float = TOLERANCE, train: bool = False):
    inputs, outputs = case.inputs, case.outputs
    kwargs = {key: inputs[key] for key in FORWARD_INPUTS if key in inputs}
    if "inputs_embeds" in kwargs:
        kwargs.pop("input_ids", None)
    mask = kwargs.get("attention_mask")
    real = mask if mask is not None and mask.ndim == 2 else None
    model.train(train)
    with torch.set_grad_enabled(bool(case.grad_norms) and train and has_backward(model)):
        result = model(
            **kwargs, labels=inputs.get("labels"), output_hidden_states="hidden_0" in outputs, use_cache=False
        )
    if "logits" in outputs:
        assert_close(result.logits, outputs["logits"], real, atol)
    if "loss" in outputs:
        assert_close(result.loss.reshape(1), outputs["loss"].reshape(1), atol=atol)
    for index, hidden in enumerate(result.hidden_states or ()):
        if f"hidden_{index}" in outputs:
            assert_close(hidden, outputs[f"hidden_{index}"], real, atol)
    if train and case.grad_norms:
        _check_grad_norms(model, result.loss, case, atol)


def check_training_step(model, case: Case, atol: float = TOLERANCE):
    """The labeled case in train mode: logits, loss, and the gradient norm of every parameter."""
    inputs, outputs = case.inputs, case.outputs
    kwargs = {key: inputs[key] for key in FORWARD_INPUTS if key in inputs}
    model.train()
    with torch.set_grad_enabled(has_backward(model)):
        result = model(**kwargs, labels=inputs["labels"], use_cache=False)
    assert_close(result.logits, outputs["train_logits"], atol=atol)
    assert_close(result.loss.reshape(1), outputs["train_loss"].reshape(1), atol=atol)
    _check_grad_norms(model, result.loss, case, atol)


def has_backward(model) -> bool:
    return model.config._attn_implementation != "flex_attention" or model.device.type != "cpu"  # torch has none there


def _check_grad_norms(model, loss: torch.Tensor, case: Case, atol: float):
    if not has_backward(model):
        return
    model.zero_grad()
    loss.backward()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    gradients = {name: parameters[name].grad for name in case.grad_norms}
    norms = {name: gradient.norm().item() for name, gradient in gradients.items() if gradient is not None}
    expected = {
        name: norm for name, norm in case.grad_norms.items() if norm is not None
    }  # None: frozen in the original
    assert norms == pytest.approx(expected, rel=1e-4, abs=atol)
    model.zero_grad()


@torch.no_grad()
def check_decode(model, case: Case, atol: float = TOLERANCE):
    """A prefill, then one token at a time through the cache; with `chunked` in the name the rest in one call."""
    inputs, outputs = case.inputs, case.outputs
    ids, prefill = inputs["input_ids"], inputs["prefill"]
    length = ids.shape[1]
    mask = inputs.get("attention_mask")
    if mask is not None and mask.shape[1] < length:
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], length - mask.shape[1])], dim=1)
    stops = [prefill, length] if case.name.startswith("chunked") else range(prefill, length + 1)
    cache, logits, start = None, [], 0
    for stop in stops:
        result = model(
            ids[:, start:stop],
            attention_mask=None if mask is None else mask[:, :stop],
            cache=cache,
            use_cache=True,
        )
        cache, start = result.cache, stop
        logits.append(result.logits)
    logits = torch.cat(logits, dim=1)
    logits = logits[:, -outputs["logits"].shape[1] :]
    assert_close(logits, outputs["logits"], None if mask is None else mask[:, -logits.shape[1] :], atol)
    if "full_logits" in outputs:
        full = model(ids, attention_mask=mask, use_cache=False).logits
        assert_close(full, outputs["full_logits"], mask, atol)


@torch.no_grad()
def check_greedy(model, case: Case, **generate_kwargs):
    """Greedy ids exactly, with the end-of-sequence token disabled."""
    inputs = case.inputs
    sequences = model.generate(
        inputs["input_ids"],
        attention_mask=inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])),
        max_new_tokens=case.raw["max_new_tokens"],
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **generate_kwargs,
    )
    assert sequences.tolist() == case.outputs["sequences"].tolist()
