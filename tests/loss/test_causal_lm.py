"""The causal-LM loss against transformers' own and the original's max-z; the chunked form against the naive one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_cnllm.loss import causal_lm
from hf_cnllm.loss.causal_lm import causal_lm_loss, chunked_causal_lm_loss, reference_causal_lm_loss

VOCAB = 37


def make_batch(batch=3, length=9, vocab=VOCAB, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, length, vocab, generator=generator, dtype=torch.float64).mul(3).to(dtype)
    labels = torch.randint(vocab, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) < 0.3] = -100
    return logits.requires_grad_(), labels


def original_max_z(logits, weight):
    return weight * (logits[..., :-1, :].max(-1).values ** 2).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_items", [None, 40, torch.tensor(40)])
def test_without_max_z_it_is_transformers_loss(dtype, num_items):
    logits, labels = make_batch(dtype=dtype)
    ours = causal_lm_loss(logits, labels, VOCAB, num_items_in_batch=num_items)
    theirs = ForCausalLMLoss(logits, labels, VOCAB, num_items_in_batch=num_items)
    torch.testing.assert_close(ours, theirs)
    assert ours.dtype == torch.float32
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_max_z_counts_every_shifted_position():
    logits, labels = make_batch()
    ours = causal_lm_loss(logits, labels, VOCAB, z_loss_weight=0.05)
    expected = causal_lm_loss(logits, labels, VOCAB) + original_max_z(logits, 0.05)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


def test_shift_labels_replace_labels():
    logits, labels = make_batch()
    aligned = logits[:, :-1].detach()
    torch.testing.assert_close(
        causal_lm_loss(aligned, None, VOCAB, shift_labels=labels[:, 1:], z_loss_weight=0.05),
        causal_lm_loss(logits.detach(), labels, VOCAB, z_loss_weight=0.05),
    )


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_accumulated_micro_batches_equal_one_big_batch(micro_batches):
    """Of any shares of counted labels; at the end of some there is padding that the big batch has not."""
    logits, labels = make_batch(batch=8)
    labels[:] = torch.randint(VOCAB, labels.shape)
    for row in range(8):
        labels[row, : row // 2] = -100
    num_items = (labels[:, 1:] != -100).sum()
    options = {"num_items_in_batch": num_items, "z_loss_weight": 0.05}
    whole = causal_lm_loss(logits, labels, VOCAB, **options)
    pad = torch.nn.functional.pad
    padded = pad(logits, (0, 0, 0, 2), value=9.0), pad(labels, (0, 2), value=-100)
    parts = sum(
        causal_lm_loss(*part, VOCAB, **options)
        for part in zip(*(one.chunk(micro_batches) for one in padded), strict=True)
    )
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (parts, whole)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("z_loss_weight", [0.0, 1.0])
@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0), 7, torch.tensor(7)])
@pytest.mark.parametrize("length", [1, 5])
def test_no_counted_label_is_what_transformers_makes_of_it(length, num_items, z_loss_weight):
    """NaN, or 0 in a part of a batch; weights stay as they are."""
    logits, labels = make_batch(length=length)
    nothing = logits, torch.full_like(labels, -100), VOCAB, num_items
    loss = causal_lm_loss(*nothing, z_loss_weight=z_loss_weight)
    torch.testing.assert_close(loss, ForCausalLMLoss(*nothing).to(loss.dtype), equal_nan=True)
    loss.backward()
    assert not logits.grad.any()


def test_vocab_size_must_match():
    logits, labels = make_batch()
    with pytest.raises(ValueError, match="vocab_size is 36"):
        causal_lm_loss(logits, labels, VOCAB - 1)


# --- the chunked form -------------------------------------------------------------------------------------------------

TOLERANCES = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Relative error of loss and gradients against fp64. Half precision: what rounding the inputs' products once costs."""


def make_head_batch(batch=3, length=9, hidden=16, vocab=VOCAB, dtype=torch.float64, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    labels = torch.randint(vocab, (batch, length), generator=generator)
    return randn(batch, length, hidden), randn(vocab, hidden), randn(vocab) if bias else None, labels


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def loss_and_gradients(loss_function, hidden_states, weight, bias, labels, scale=1.0, **kwargs):
    inputs = [tensor for tensor in (hidden_states, weight, bias) if tensor is not None]
    loss = loss_function(hidden_states, weight, labels, bias=bias, **kwargs)
    return [loss.detach(), *torch.autograd.grad(loss * scale, inputs)]


def in_fp64(*tensors):
    return [tensor if tensor is None else tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("z_loss_weight", [0.0, 0.05])
@pytest.mark.parametrize("normalize", [False, True], ids=["linear", "norm"])
def test_chunked_equals_reference(normalize, z_loss_weight, bias, dtype, monkeypatch):
    hidden_states, weight, bias, labels = make_head_batch(dtype=dtype, bias=bias)
    labels[:, 2:6] = -100
    options = {"normalize": normalize, "z_loss_weight": z_loss_weight, "scale": 3.0}
    expected = loss_and_gradients(reference_causal_lm_loss, *in_fp64(hidden_states, weight, bias), labels, **options)
    for chunk_size, rows_at_a_time in ((1, 7), (7, 1), (512, 8192)):
        monkeypatch.setattr(causal_lm, "ROWS_AT_A_TIME", rows_at_a_time)
        actual = loss_and_gradients(
            chunked_causal_lm_loss, hidden_states, weight, bias, labels, chunk_size=chunk_size, **options
        )
        assert [tensor.dtype for tensor in actual[1:]] == [dtype] * len(actual[1:])
        errors = list(map(relative_error, actual, expected))
        assert max(errors) < TOLERANCES[dtype], errors


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3),
    length=st.integers(1, 8),
    hidden=st.integers(1, 9),
    vocab=st.integers(1, 40),
    chunk_size=st.integers(1, 30),
    ignored=st.floats(0, 1),
    normalize=st.booleans(),
    z_loss_weight=st.sampled_from([0.0, 0.3]),
    aligned=st.booleans(),
    num_items=st.sampled_from([None, 5, torch.tensor(7)]),
    seed=st.integers(0, 1000),
)
def test_chunked_equals_reference_at_any_size(
    batch, length, hidden, vocab, chunk_size, ignored, normalize, z_loss_weight, aligned, num_items, seed
):
    hidden_states, weight, _, labels = make_head_batch(batch, length, hidden, vocab, seed=seed)
    labels[torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)) < ignored] = -100
    options = {"normalize": normalize, "z_loss_weight": z_loss_weight, "num_items_in_batch": num_items}
    if aligned:
        labels, options["shift_labels"] = None, labels
    actual = loss_and_gradients(
        chunked_causal_lm_loss, hidden_states, weight, None, labels, chunk_size=chunk_size, **options
    )
    expected = loss_and_gradients(reference_causal_lm_loss, hidden_states, weight, None, labels, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12, equal_nan=True)
    assert all(gradient.isfinite().all() for gradient in actual[1:])


def test_chunked_gradients_by_finite_differences():
    hidden_states, weight, bias, labels = make_head_batch(batch=2, length=4, hidden=5, vocab=7, bias=True)
    labels[0, 2] = -100

    def loss(hidden_states, weight, bias):
        return chunked_causal_lm_loss(
            hidden_states, weight, labels, normalize=True, bias=bias, z_loss_weight=0.1, chunk_size=3
        )

    assert torch.autograd.gradcheck(loss, (hidden_states, weight, bias))


def test_confident_predictions_lose_no_precision():
    """The gradient p - 1 of a target that is all but certain is small: it must not be rounded as the number 1 is."""
    hidden_states, weight, _, labels = make_head_batch(batch=1, length=2, hidden=4, vocab=8)
    labels[0, 1] = 3
    hidden_states, weight = hidden_states.detach(), weight.detach()
    hidden_states[0, 0] = weight[3] * 12 / weight[3].norm() ** 2
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [hidden_states.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        actual, naive = (
            loss_and_gradients(function, *inputs, None, labels)[2][3]
            for function in (chunked_causal_lm_loss, reference_causal_lm_loss)
        )
        exact = loss_and_gradients(reference_causal_lm_loss, *in_fp64(*inputs), None, labels)[2][3]
        assert relative_error(actual, exact) < 1.5 * relative_error(naive, exact) + torch.finfo(dtype).eps


def test_chunk_size_and_token_order_do_not_matter_in_bf16():
    hidden_states, weight, _, labels = make_head_batch(batch=8, length=64, hidden=32, vocab=500, dtype=torch.bfloat16)
    exact = loss_and_gradients(reference_causal_lm_loss, *in_fp64(hidden_states, weight), None, labels)
    error = {
        size: relative_error(
            loss_and_gradients(chunked_causal_lm_loss, hidden_states, weight, None, labels, chunk_size=size)[2],
            exact[2],
        )
        for size in (4, 512)
    }
    assert error[4] < 1.2 * error[512] + 1e-3, "summed in bf16, a hundred chunks would lose digits"


@pytest.mark.parametrize("frozen", ["hidden_states", "weight", "both"])
def test_nothing_is_computed_for_what_is_frozen(frozen):
    hidden_states, weight, _, labels = make_head_batch()
    _, *expected = loss_and_gradients(reference_causal_lm_loss, hidden_states, weight, None, labels)
    hidden_states.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden_states")
    loss = chunked_causal_lm_loss(hidden_states, weight, labels, chunk_size=4)
    if frozen == "both":
        assert not loss.requires_grad
        return
    assert [gradient is None for gradient in loss_node(loss).gradients] == [
        frozen == "hidden_states",
        frozen == "weight",
        True,
    ]
    loss.backward()
    trained, gradient = (weight, expected[1]) if frozen == "hidden_states" else (hidden_states, expected[0])
    torch.testing.assert_close(trained.grad, gradient)


def test_strides_make_no_difference():
    hidden_states, weight, _, labels = make_head_batch()
    strided = [torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in (hidden_states, weight, labels)]
    assert not any(tensor.is_contiguous() for tensor in strided)
    torch.testing.assert_close(chunked_causal_lm_loss(*strided), chunked_causal_lm_loss(hidden_states, weight, labels))


def test_no_grad_takes_no_gradients(monkeypatch):
    hidden_states, weight, _, labels = make_head_batch()
    expected = reference_causal_lm_loss(hidden_states, weight, labels)
    monkeypatch.setattr(torch, "zeros_like", None)  # the gradients' buffers
    with torch.no_grad():
        torch.testing.assert_close(chunked_causal_lm_loss(hidden_states, weight, labels), expected)


def loss_node(loss):
    """The node of the chunked loss in the graph behind `loss`."""
    node = loss.grad_fn
    while not hasattr(node, "gradients"):
        node = node.next_functions[0][0]
    return node


@pytest.mark.parametrize("normalize", [False, True], ids=["linear", "norm"])
def test_autocast(normalize):
    """Weights stay fp32 and get fp32 gradients, the matmuls run in bf16: as close to the truth as the plain path.

    (Without max-z: rounding may move the maximum to another entry, in one path as in the other, but not in both.)
    """
    hidden_states, weight, _, labels = make_head_batch(batch=4, length=32, hidden=64, vocab=300, dtype=torch.float32)
    options = {"normalize": normalize}
    exact = loss_and_gradients(reference_causal_lm_loss, *in_fp64(hidden_states, weight), None, labels, **options)
    with torch.autocast("cpu", torch.bfloat16):
        chunked, plain = (
            loss_and_gradients(function, hidden_states, weight, None, labels, **options)
            for function in (chunked_causal_lm_loss, reference_causal_lm_loss)
        )
    for actual, naive, truth in zip(chunked, plain, exact, strict=True):
        assert actual.dtype == torch.float32
        assert relative_error(actual, truth) < 1.2 * relative_error(naive, truth) + 1e-4


def test_fp16_gradients_do_not_underflow_under_loss_scaling():
    hidden_states, weight, _, labels = make_head_batch(batch=64, length=65, hidden=8, dtype=torch.float16)
    scale = 2.0**12
    options = {"scale": scale, "chunk_size": 512}
    actual = loss_and_gradients(chunked_causal_lm_loss, hidden_states, weight, None, labels, **options)
    options.pop("chunk_size")
    expected = loss_and_gradients(reference_causal_lm_loss, *in_fp64(hidden_states, weight), None, labels, **options)
    assert actual[1].isfinite().all() and actual[2].isfinite().all()
    assert max(map(relative_error, actual, expected)) < TOLERANCES[torch.float16]


@pytest.mark.parametrize("row_norm", [1.0, 300.0, 30_000.0])
def test_large_rows_of_a_norm_head_stay_finite_in_fp16(row_norm):
    hidden_states, weight, _, labels = make_head_batch(hidden=64, dtype=torch.float16)
    with torch.no_grad():
        hidden_states *= 20
        weight *= row_norm / weight.float().norm(dim=-1, keepdim=True)
    options = {"normalize": True, "z_loss_weight": 1e-4, "scale": 2.0**8}
    actual = loss_and_gradients(chunked_causal_lm_loss, hidden_states, weight, None, labels, **options, chunk_size=4)
    expected = loss_and_gradients(reference_causal_lm_loss, *in_fp64(hidden_states, weight), None, labels, **options)
    assert all(tensor.isfinite().all() for tensor in actual)
    for index in (0, 1, 2) if row_norm <= 300 else (0, 1):  # the weight's own gradient is below fp16's smallest number
        assert relative_error(actual[index], expected[index]) < 2 * TOLERANCES[torch.float16]


def test_backward_twice():
    hidden_states, weight, _, labels = make_head_batch()
    loss = chunked_causal_lm_loss(hidden_states, weight, labels, normalize=True, z_loss_weight=0.1)
    loss.backward(retain_graph=True)
    once = [tensor.grad.clone() for tensor in (hidden_states, weight)]
    (2 * loss).backward()
    torch.testing.assert_close([hidden_states.grad, weight.grad], [3 * gradient for gradient in once])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inside_a_checkpoint(use_reentrant):
    hidden_states, weight, _, labels = make_head_batch()

    def loss(hidden_states):
        return chunked_causal_lm_loss(hidden_states.tanh(), weight, labels, chunk_size=4)

    plain, recomputed = loss(hidden_states), checkpoint(loss, hidden_states, use_reentrant=use_reentrant)
    gradients = []
    for value in (plain, recomputed):
        hidden_states.grad = weight.grad = None
        value.backward()
        gradients.append((hidden_states.grad, weight.grad))
    torch.testing.assert_close(*gradients)


def test_accumulated_chunked_micro_batches_equal_one_big_batch():
    hidden_states, weight, _, labels = make_head_batch(batch=4)
    labels[0, :4] = labels[2, :2] = -100
    num_items = (labels[:, 1:] != -100).sum()
    options = {"normalize": True, "z_loss_weight": 0.05, "num_items_in_batch": num_items}
    whole = reference_causal_lm_loss(hidden_states, weight, labels, **options)
    parts = sum(
        chunked_causal_lm_loss(h, weight, y, chunk_size=3, **options)
        for h, y in zip(hidden_states.split(1), labels.split(1), strict=True)
    )
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(*(torch.autograd.grad(loss, (hidden_states, weight)) for loss in (parts, whole)))


def test_large_logits_stay_finite():
    hidden_states, weight, _, labels = make_head_batch(dtype=torch.float32)
    inputs = [hidden_states.detach().mul(1e4).requires_grad_(), weight]
    actual = loss_and_gradients(chunked_causal_lm_loss, *inputs, None, labels)
    expected = loss_and_gradients(reference_causal_lm_loss, *in_fp64(*inputs), None, labels)
    assert max(map(relative_error, actual, expected)) < 1e-5


def test_compiled_graphs_get_the_naive_form():
    hidden_states, weight, _, labels = make_head_batch()
    with torch.compiler.set_stance("default"):
        compiled = torch.compile(chunked_causal_lm_loss, backend="aot_eager", fullgraph=True)
        loss = compiled(hidden_states, weight, labels, normalize=True, z_loss_weight=0.1)
    torch.testing.assert_close(
        loss, chunked_causal_lm_loss(hidden_states, weight, labels, normalize=True, z_loss_weight=0.1)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 0}, "chunk_size"),
        ({"chunk_size": -3}, "chunk_size"),
        ({"chunk_size": None}, "chunk_size"),
        ({"label_smoothing": 0.1}, "label_smoothing"),
        ({"labels": torch.zeros(3, 8, dtype=torch.long)}, "labels of shape"),
        ({"weight": torch.zeros(VOCAB, 15, dtype=torch.float64)}, "does not fit"),
        ({"weight": torch.zeros(VOCAB, 16)}, "the head's weight is torch.float32"),
    ],
)
def test_bad_input_is_refused(change, message):
    hidden_states, weight, _, labels = make_head_batch()
    arguments = {"hidden_states": hidden_states, "weight": weight, "labels": labels} | change
    with pytest.raises(ValueError, match=message):
        chunked_causal_lm_loss(**arguments)


def test_label_out_of_range_is_refused():
    hidden_states, weight, _, labels = make_head_batch()
    for label in (VOCAB, -1):
        labels[1, 3] = label
        with pytest.raises((RuntimeError, IndexError)):
            chunked_causal_lm_loss(hidden_states, weight, labels)


def test_label_smoothing_is_refused_on_logits_too():
    logits, labels = make_batch()
    with pytest.raises(ValueError, match="label_smoothing"):
        causal_lm_loss(logits, labels, VOCAB, label_smoothing=0.1)


def test_second_derivatives_are_refused():
    hidden_states, weight, _, labels = make_head_batch()
    loss = chunked_causal_lm_loss(hidden_states, weight, labels)
    with pytest.raises(RuntimeError, match="loss_chunk_size = None"):
        torch.autograd.grad(loss, weight, create_graph=True)
