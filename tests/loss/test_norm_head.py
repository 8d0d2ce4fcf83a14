"""NormHead: the naive formula, gradients, what others read and write, and when its norms are computed."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_cnllm.loss.norm_head import EffectiveWeight, NormHead, normalize_rows, rows_around_mean, weights_stay


@pytest.fixture
def head():
    torch.manual_seed(0)
    return NormHead(8, 11)


def test_forward_and_gradients_equal_the_naive_form(head):
    head.double()
    hidden = torch.randn(3, 5, 8, dtype=torch.double, requires_grad=True)
    weights = torch.randn(3, 5, 11, dtype=torch.double)
    fast = torch.autograd.grad((head(hidden) * weights).sum(), (hidden, head.raw_weight))
    naive = torch.autograd.grad(
        (F.linear(hidden, normalize_rows(head.raw_weight)) * weights).sum(), (hidden, head.raw_weight)
    )
    for got, want in zip(fast, naive, strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)  # the norms are fp32


def test_the_parameter_is_raw_and_the_attribute_effective(head):
    assert [name for name, _ in head.named_parameters()] == ["weight"]
    assert head.get_parameter("weight") is head.raw_weight
    assert torch.equal(head.state_dict()["weight"], head.raw_weight)
    torch.testing.assert_close(head.weight.norm(dim=-1), torch.ones(11))
    hidden = torch.randn(2, 8)
    torch.testing.assert_close(hidden @ head.weight.T, head(hidden))
    assert type(head.weight * 2) is torch.Tensor


def test_on_the_meta_device_the_attribute_is_the_parameter():
    head = NormHead(8, 11, device="meta")  # as while loading, which reads it for every shape it compares
    assert head.weight is head.raw_weight


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.mul_(2),
        lambda weight: weight.copy_(torch.zeros(11, 8)),
        lambda weight: weight.__setitem__(0, 1.0),
        lambda weight: setattr(weight, "data", torch.zeros(11, 8)),
    ],
)
def test_writing_to_the_effective_weight_raises(head, write):
    with torch.no_grad(), pytest.raises(RuntimeError, match="raw_weight"):
        write(head.weight)


def test_reading_and_training_leave_the_parameter_alone(head):
    before = head.raw_weight.detach().clone()
    hidden = torch.randn(4, 8)
    for training in (True, False, True, False):
        head.train(training)
        head(hidden)
    assert torch.equal(head.raw_weight, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head.raw_weight.mul_(torch.rand(11, 1) + 0.5),
        lambda head: head.raw_weight[3].fill_(2.0),
        lambda head: head.load_state_dict({"weight": torch.randn(11, 8)}),
        lambda head: setattr(head, "weight", nn.Parameter(torch.randn(11, 8))),
        lambda head: head.double().float(),
        lambda head: head.raw_weight.data.mul_(torch.rand(11, 1) + 0.5),  # as TRL's SyncRefModelCallback and EMA do
        lambda head: nn.utils.vector_to_parameters(torch.randn(88), head.parameters()),
    ],
)
def test_norms_follow_every_change_of_the_weight(head, change):
    hidden = torch.randn(4, 8)
    head.eval()
    with torch.no_grad():
        head(hidden)
        change(head)
        torch.testing.assert_close(head(hidden), F.linear(hidden, normalize_rows(head.raw_weight)))


def test_functional_calls_have_the_norms_of_their_own_weight(head):
    """Each weight is freed before the next is made, which then has its address."""
    hidden = torch.randn(4, 8)
    head.eval()
    with torch.no_grad():
        for _ in range(4):
            weight = torch.randn(11, 8) * (torch.rand(11, 1) + 0.5)
            logits = torch.func.functional_call(head, {"weight": weight}, (hidden,))
            torch.testing.assert_close(logits, F.linear(hidden, normalize_rows(weight)))
            del weight


def test_norms_are_computed_once_while_weights_stay(head, monkeypatch):
    calls = []
    original = torch.linalg.vector_norm
    monkeypatch.setattr(
        torch.linalg, "vector_norm", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    )
    head.eval()
    with torch.no_grad(), weights_stay():
        for _ in range(5):
            head(torch.randn(1, 8))
        assert len(calls) == 1
        head.raw_weight.mul_(2)
        with weights_stay():
            head(torch.randn(1, 8))
        assert len(calls) == 2
    with torch.no_grad():
        head(torch.randn(1, 8))
    assert len(calls) == 3


def test_zero_rows_and_copies(head):
    with torch.no_grad():
        head.raw_weight[2].zero_()
        assert head(torch.randn(1, 8)).isfinite().all()
    twin = copy.deepcopy(head.eval())
    assert torch.equal(twin.raw_weight, head.raw_weight) and twin.raw_weight is not head.raw_weight
    assert isinstance(twin.weight, EffectiveWeight)


def test_half_precision_rounds_once(head):
    hidden = torch.randn(64, 8, dtype=torch.bfloat16)
    exact = F.linear(hidden.double(), normalize_rows(head.raw_weight.bfloat16().double()))
    error = (head.bfloat16()(hidden).double() - exact).abs().max()
    naive = (F.linear(hidden, normalize_rows(head.raw_weight)).double() - exact).abs().max()
    assert error <= 1.5 * naive


def test_a_frozen_head_backpropagates_after_inference_mode():
    head = NormHead(4, 6).requires_grad_(False).eval()
    hidden_states = torch.randn(2, 4, requires_grad=True)
    with torch.inference_mode():
        head(hidden_states)
    head(hidden_states).sum().backward()
    torch.testing.assert_close(hidden_states.grad, head.weight.sum(0).expand(2, 4))


@pytest.mark.parametrize("count", [1, 2, 3, 10, 11])
def test_new_rows_lie_around_the_mean_of_the_normalized_ones(count):
    torch.manual_seed(0)
    weight = torch.randn(50, 16) * torch.rand(50, 1) + 0.3
    rows = rows_around_mean(weight, count)
    assert rows.shape == (count, 16)
    torch.testing.assert_close(rows.norm(dim=-1), weight.norm(dim=-1).mean().expand(count))
    mean = normalize_rows(weight).mean(dim=0)
    along = normalize_rows(rows) @ mean
    torch.testing.assert_close(along, mean.square().sum().expand(count))
    if count > 1:
        torch.testing.assert_close(normalize_rows(rows).mean(dim=0), mean, atol=1e-6, rtol=0)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("norm", [1e-2, 1.0, 300.0, 30_000.0])
@pytest.mark.parametrize("length", [1.0, 1000.0])
def test_large_rows_and_states_stay_finite_in_fp16(norm, length, autocast):
    """‖h‖ ‖w‖ is up to 500 times what fp16 holds; the logits are not."""
    torch.manual_seed(0)
    head = NormHead(64, 50)
    with torch.no_grad():
        head.raw_weight.copy_(F.normalize(torch.randn(50, 64)) * norm)
        head.raw_weight[0] = 0.0
    hidden = F.normalize(torch.randn(3, 5, 64)) * length
    exact = F.linear(hidden.half().double(), normalize_rows(head.raw_weight.half().double()))
    states = hidden.half().requires_grad_()
    if autocast:
        with torch.autocast("cpu", torch.float16):
            logits = head(states)
    else:
        logits = head.half()(states)
    assert logits.dtype == torch.float16 and logits.isfinite().all()
    assert (logits.double() - exact).abs().max() <= 2e-3 * length
    (logits.float().square().mean() / length**2).backward()
    assert states.grad.isfinite().all() and head.raw_weight.grad.isfinite().all()


def test_ordinary_rows_are_computed_in_fp16_as_ever(head):
    hidden = torch.randn(3, 5, 8).half()
    raw = head.half().raw_weight
    norms = torch.linalg.vector_norm(raw, dim=-1, dtype=torch.float32)
    assert torch.equal(head(hidden), (F.linear(hidden, raw) * norms.reciprocal()).half())


@pytest.mark.parametrize("norm", [1e-2, 1.0, 30_000.0])
def test_effective_rows_in_fp16_have_length_1(norm):
    weight = (F.normalize(torch.randn(20, 64)) * norm).half()
    weight[0] = 0.0
    effective = normalize_rows(weight)
    assert effective.dtype == torch.float16 and torch.equal(effective[0], torch.zeros(64).half())
    torch.testing.assert_close(effective[1:].float().norm(dim=-1), torch.ones(19), atol=2e-3, rtol=0)
