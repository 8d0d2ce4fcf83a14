"""The causal-LM loss against transformers' own, the originals' max-z formula, and one big batch."""

import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_cnllm.losses import causal_lm_loss

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
    logits, labels = make_batch(batch=8)
    labels[:] = torch.randint(VOCAB, labels.shape)
    labels[:, :4] = -100
    num_items = (labels[:, 1:] != -100).sum()
    whole = causal_lm_loss(logits, labels, VOCAB, z_loss_weight=0.05)
    parts = sum(
        causal_lm_loss(*part, VOCAB, num_items_in_batch=num_items, z_loss_weight=0.05)
        for part in zip(logits.chunk(micro_batches), labels.chunk(micro_batches), strict=True)
    )
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (parts, whole)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)])
@pytest.mark.parametrize("length", [1, 5])
def test_no_counted_label_is_zero_cross_entropy(length, num_items):
    logits, labels = make_batch(length=length)
    loss = causal_lm_loss(logits, torch.full_like(labels, -100), VOCAB, num_items_in_batch=num_items)
    assert loss.item() == 0
    loss.backward()
    assert not logits.grad.any()
    with_max_z = causal_lm_loss(logits, torch.full_like(labels, -100), VOCAB, z_loss_weight=1.0)
    assert with_max_z.isfinite()


def test_vocab_size_must_match():
    logits, labels = make_batch()
    with pytest.raises(ValueError, match="vocab_size is 36"):
        causal_lm_loss(logits, labels, VOCAB - 1)
