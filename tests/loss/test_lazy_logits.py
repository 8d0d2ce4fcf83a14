"""Lazy logits are the head's output in every way, and cost nothing until they are read."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_cnllm.loss.lazy_logits import LazyTensor, lazy_logits
from hf_cnllm.loss.norm_head import NormHead

HIDDEN, VOCAB = 8, 21
HEADS = {
    "linear": lambda: nn.Linear(HIDDEN, VOCAB, bias=False),
    "bias": lambda: nn.Linear(HIDDEN, VOCAB),
    "norm": lambda: NormHead(HIDDEN, VOCAB),
}


@pytest.fixture(params=HEADS)
def head(request):
    torch.manual_seed(0)
    return HEADS[request.param]()


@pytest.fixture
def hidden_states():
    return torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(1)).requires_grad_()


def is_waiting(logits) -> bool:
    return isinstance(logits, LazyTensor) and logits._computed is None


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x**3).sum()

    @staticmethod
    def backward(ctx, grad):
        return grad * 3 * ctx.saved_tensors[0] ** 2


def set_column(logits):
    logits[..., 3] = -1.0
    return logits.square().sum()


USES = {
    "square": lambda logits: logits.square().sum(),
    "shifted loss": lambda logits: nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), torch.arange(8)),
    "fp64": lambda logits: logits.double().logsumexp(-1).sum(),
    "in place": lambda logits: logits.div_(2.0).square().sum(),
    "in place, part": set_column,
    "function of the user's": Cube.apply,
    "checkpoint": lambda logits: checkpoint(torch.sum, logits.exp(), use_reentrant=False),
    "reentrant checkpoint": lambda logits: checkpoint(lambda x: x.exp().sum(), logits, use_reentrant=True),
    "read twice": lambda logits: logits.argmax(-1).sum() * logits.sum(),
    "beside another": lambda logits: torch.cat([logits, logits.clone()]).square().sum(),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_values_and_gradients(head, hidden_states, use):
    def result_and_gradients(logits):
        head.zero_grad()
        hidden_states.grad = None
        result = use(logits)
        result.backward()
        return result, hidden_states.grad, *(parameter.grad for parameter in head.parameters())

    actual, expected = map(result_and_gradients, (lazy_logits(head, hidden_states), head(hidden_states)))
    torch.testing.assert_close(actual, expected)


def test_second_derivative(head, hidden_states):
    head, hidden_states = head.double(), hidden_states.detach().double().requires_grad_()

    def penalty(logits):
        return torch.autograd.grad(logits.square().sum(), hidden_states, create_graph=True)[0].square().sum()

    actual, expected = (
        torch.autograd.grad(penalty(logits), list(head.parameters()))
        for logits in (lazy_logits(head, hidden_states), head(hidden_states))
    )
    torch.testing.assert_close(actual, expected)


def test_a_tied_weight_gets_its_gradient_once(head):
    """The hidden states come from the same matrix: the way back from the logits ends at them."""
    ids, weight = torch.arange(10).view(2, 5), next(head.parameters())

    def gradient(make_logits):
        hidden_states = nn.functional.embedding(ids, weight).tanh()
        return torch.autograd.grad(make_logits(hidden_states).square().sum(), weight)[0]

    torch.testing.assert_close(gradient(lambda hidden: lazy_logits(head, hidden)), gradient(head))


class Sink(torch.autograd.Function):
    """One node behind all outputs of a model, as DistributedDataParallel puts it."""

    @staticmethod
    def forward(ctx, *outputs):
        ctx.set_materialize_grads(False)
        return tuple(output.clone() for output in outputs)

    @staticmethod
    def backward(ctx, *gradients):
        return gradients


def test_unread_logits_cost_nothing_in_backward(head, hidden_states):
    calls = []
    logits = lazy_logits(head, hidden_states)
    loss, unread = Sink.apply(hidden_states.square().sum(), logits)
    head.register_forward_pre_hook(lambda *_: calls.append(1))
    loss.backward()
    assert not calls and is_waiting(unread)
    torch.testing.assert_close(hidden_states.grad, 2 * hidden_states.detach())


def test_nothing_is_computed_before_reading(head, hidden_states):
    logits = lazy_logits(head, hidden_states)
    assert logits.shape == (2, 5, VOCAB) and logits.dtype == torch.float32 and logits.device.type == "cpu"
    assert logits.requires_grad and not logits.is_leaf and len(logits) == 2 and logits.numel() == 10 * VOCAB
    copies = [logits.double(), logits.to(torch.bfloat16), logits.clone(), logits.float()]
    assert all(map(is_waiting, [logits, *copies]))
    torch.testing.assert_close(copies[0].detach(), head(hidden_states).double().detach())
    assert not is_waiting(logits)


def test_leaves_torch_as_an_ordinary_tensor(head, hidden_states, tmp_path):
    logits, expected = lazy_logits(head, hidden_states), head(hidden_states).detach()
    assert logits.tolist() == expected.tolist()
    assert (logits.detach().numpy() == expected.numpy()).all()
    assert type(pickle.loads(pickle.dumps(logits))) is torch.Tensor
    assert torch.equal(copy.deepcopy(logits.detach()), expected)
    torch.save({"logits": logits}, tmp_path / "logits.pt")
    assert torch.equal(torch.load(tmp_path / "logits.pt")["logits"], expected)
    assert lazy_logits(head, hidden_states).data_ptr() != 0
    assert repr(lazy_logits(head, hidden_states)).startswith("LazyTensor([[[")


def test_autocast_state_is_that_of_the_forward_pass(head, hidden_states):
    with torch.autocast("cpu", torch.bfloat16):
        logits, expected = lazy_logits(head, hidden_states), head(hidden_states)
    assert logits.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(logits.detach(), expected)
    inputs = [hidden_states, *head.parameters()]
    for actual, wanted in zip(
        torch.autograd.grad(logits.float().square().sum(), inputs),
        torch.autograd.grad(expected.float().square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)


def test_reading_after_an_optimizer_step_is_refused(head, hidden_states):
    logits, read = lazy_logits(head, hidden_states), lazy_logits(head, hidden_states)
    before = read.detach()
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    head(hidden_states).sum().backward()
    optimizer.step()
    assert torch.equal(read.detach(), before)
    with pytest.raises(RuntimeError, match=r"before optimizer\.step"):
        logits.sum()


def test_change_between_copy_and_reading_is_refused(head, hidden_states):
    logits = lazy_logits(head, hidden_states)
    clone = logits.clone()
    logits.mul_(2.0)
    with pytest.raises(RuntimeError, match="in place"):
        clone.sum()
