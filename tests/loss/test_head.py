"""Training without logits gives the loss and gradients of training with them, and stands aside where it must."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.loss.loss_utils import ForMaskedLMLoss

from hf_cnllm import BaichuanConfig, BaichuanForCausalLM
from hf_cnllm.loss import head
from hf_cnllm.loss.head import loss_and_logits
from hf_cnllm.loss.lazy_logits import LazyTensor

VOCAB, LENGTH = 97, 12


def make_model(norm_head=True, **overrides) -> BaichuanForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    fields = {"vocab_size": VOCAB, "model_max_length": 64, "z_loss_weight": 0.02, "loss_chunk_size": 5}
    return BaichuanForCausalLM(BaichuanConfig(norm_head=norm_head, **sizes | fields | overrides)).train()


@pytest.fixture
def batch():
    input_ids = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = input_ids.clone()
    labels[:, :3] = -100
    return {"input_ids": input_ids, "labels": labels}


def is_unread(outputs) -> bool:
    return isinstance(outputs.logits, LazyTensor) and outputs.logits._computed is None


def train_step(model, batch, **kwargs):
    model.zero_grad()
    outputs = model(**batch, **kwargs)
    outputs.loss.backward()
    return outputs, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same_step(model, batch, unread=True, **kwargs):
    """`model` and its twin with logits agree on loss, logits and every gradient."""
    config = model.config if not hasattr(model, "get_base_model") else model.get_base_model().config
    outputs, gradients = train_step(model, batch, **kwargs)
    assert is_unread(outputs) == unread
    config.loss_chunk_size = None
    plain, plain_gradients = train_step(model, batch, **kwargs)
    assert type(plain.logits) is torch.Tensor
    torch.testing.assert_close(outputs.loss, plain.loss)
    torch.testing.assert_close(outputs.logits.detach(), plain.logits.detach())
    torch.testing.assert_close(gradients, plain_gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm_head", [False, True], ids=["linear", "norm"])
def test_training_step(norm_head, batch):
    assert_same_step(make_model(norm_head), batch)


def test_gradient_accumulation_count(batch):
    assert_same_step(make_model(), batch, num_items_in_batch=torch.tensor(50))


def test_tied_embeddings(batch):
    assert_same_step(make_model(norm_head=False, tie_word_embeddings=True), batch)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, batch):
    model = make_model()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_same_step(model, batch)


def test_lora_leaves_the_frozen_head_alone(batch, monkeypatch):
    needs = []
    original = head.chunked_causal_lm_loss

    def spy(hidden_states, weight, *args, **kwargs):
        needs.append((hidden_states.requires_grad, weight.requires_grad))
        return original(hidden_states, weight, *args, **kwargs)

    monkeypatch.setattr(head, "chunked_causal_lm_loss", spy)
    model = get_peft_model(make_model(), LoraConfig(target_modules=["W_pack"], r=2, init_lora_weights=False))
    assert_same_step(model, batch)
    assert needs == [(True, False)]


def test_lora_on_the_head_itself_takes_the_plain_path(batch):
    model = get_peft_model(make_model(norm_head=False), LoraConfig(target_modules=["W_pack", "lm_head"], r=2))
    assert_same_step(model, batch, unread=False)


def test_autocast(batch):
    model = make_model()
    with torch.autocast("cpu", torch.bfloat16):
        outputs, gradients = train_step(model, batch)
        assert is_unread(outputs) and outputs.logits.dtype == torch.bfloat16
        model.config.loss_chunk_size = None
        plain, plain_gradients = train_step(model, batch)
    torch.testing.assert_close(outputs.loss, plain.loss, rtol=1e-2, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, plain_gradients[name], rtol=0, atol=0.05 * plain_gradients[name].norm().item()
        )


def test_logits_that_are_read_are_differentiable(batch):
    """A loss of the user's own beside the model's: distillation, say."""
    model, gradients = make_model(), []
    for chunk_size in (5, None):
        model.config.loss_chunk_size = chunk_size
        model.zero_grad()
        outputs = model(**batch)
        (outputs.loss + outputs.logits.float().log_softmax(-1).square().mean()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_unshifted_loss(batch):
    model = make_model(norm_head=False, z_loss_weight=0.0)
    model.loss_function = ForMaskedLMLoss
    assert_same_step(model, batch)


def test_tuple_outputs(batch):
    loss, logits, *_ = make_model()(**batch, return_dict=False)
    assert loss.ndim == 0 and logits.shape == (2, LENGTH, VOCAB)


@pytest.mark.parametrize("where", ["evaluation", "no_grad", "logits_to_keep", "no labels", "frozen", "loss", "hook"])
def test_plain_path(where, batch):
    model, kwargs = make_model(norm_head=False), {}
    if where == "evaluation":
        model.eval()
    if where == "logits_to_keep":
        kwargs = {"logits_to_keep": 4, "shift_labels": batch["labels"][:, :4]}
    if where == "no labels":
        batch.pop("labels")
    if where == "frozen":
        model.requires_grad_(False)
    if where == "loss":
        model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.square().mean()
    if where == "hook":
        model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    with torch.set_grad_enabled(where != "no_grad"):
        outputs = model(**batch, **kwargs)
    assert type(outputs.logits) is torch.Tensor
    if where == "loss":
        torch.testing.assert_close(outputs.loss, outputs.logits.square().mean())


def test_head_of_another_dtype_is_refused_as_ever(batch):
    model = make_model(norm_head=False)
    model.lm_head.bfloat16()
    with pytest.raises(RuntimeError, match="dtype"):
        model(**batch)


def test_chunk_size_zero_is_refused(batch):
    model = make_model()
    model.config.loss_chunk_size = 0
    with pytest.raises(ValueError, match="loss_chunk_size"):
        model(**batch)


@pytest.mark.compiled
def test_compiled_training_step_has_no_graph_break(batch):
    model = make_model(norm_head=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)


def test_head_with_bias_and_a_config_without_the_field():
    """Any `PreTrainedModel` may use it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).train()
    head, hidden_states = nn.Linear(8, VOCAB), torch.randn(2, LENGTH, 8, requires_grad=True)
    labels = torch.randint(VOCAB, (2, LENGTH))
    loss, logits = loss_and_logits(model, head, hidden_states, labels)
    assert isinstance(logits, LazyTensor)
    expected = model.loss_function(head(hidden_states), labels, VOCAB)
    torch.testing.assert_close(loss, expected)
    inputs = [hidden_states, *head.parameters()]
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs))


def trained_weights(folder, batch_size, unread, **arguments):
    """One optimizer step of Trainer over the same eight examples, in micro-batches."""
    input_ids = torch.randint(VOCAB, (8, LENGTH), generator=torch.Generator().manual_seed(2))
    examples = [{"input_ids": row, "labels": row.masked_fill(torch.arange(LENGTH) < 4, -100)} for row in input_ids]

    class Spy(Trainer):
        def compute_loss(self, *args, **kwargs):
            loss, outputs = super().compute_loss(*args, **kwargs | {"return_outputs": True})
            unread.append(is_unread(outputs))
            return loss

    model = make_model(z_loss_weight=0.5)
    training = TrainingArguments(
        folder,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=8 // batch_size,
        max_steps=1,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **arguments,
    )
    Spy(model, training, train_dataset=examples).train()
    return dict(model.named_parameters())


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer_accumulates_to_one_big_batch_and_reads_no_logits(bf16, tmp_path):
    unread = []
    whole = trained_weights(tmp_path, 8, unread, bf16=bf16)
    accumulated = trained_weights(tmp_path, 2, unread, bf16=bf16)
    assert unread == [True] * 5
    torch.testing.assert_close(accumulated, whole, rtol=0, atol=2e-3 if bf16 else 1e-6)
