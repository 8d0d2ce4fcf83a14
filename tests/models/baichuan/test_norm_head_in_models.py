"""Baichuan2's output head in its models: the original's numbers, resizing, PEFT."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from goldens import BACKENDS, GOLDENS, assert_close, cases_of
from hf_cnllm.loss import norm_head
from hf_cnllm.loss.norm_head import NormHead, normalize_rows


def load(name: str, backend: str = "sdpa", **overrides):
    return AutoModelForCausalLM.from_pretrained(GOLDENS / name, attn_implementation=backend, **overrides)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["baichuan2_7b", "baichuan2_13b"])
@torch.no_grad()
def test_golden_norm_head_without_the_originals_writes(name, backend):
    model = load(name, backend).eval()
    raw = model.lm_head.raw_weight.clone()
    case = cases_of(name)["normhead_eval"]
    for expected in ("logits_first", "logits_second"):
        assert_close(model(case.inputs["input_ids"]).logits, case.outputs[expected])
    assert_close(model.lm_head.weight, case.outputs["lm_head_after"], atol=1e-6)  # what the original left behind
    assert torch.equal(model.lm_head.raw_weight, raw)

    case = cases_of(name)["normhead_eval_train_eval"]
    model.lm_head.raw_weight.mul_(3)
    # The second recorded result of 7B is a bug: it used the weight as it was. Normalized rows have no scale.
    for training in (True, False):
        assert_close(model.train(training)(case.inputs["input_ids"]).logits, case.outputs["logits_train"])


@pytest.mark.parametrize("name", ["baichuan2_7b", "baichuan2_13b"])
@torch.no_grad()
def test_logits_follow_weights_that_are_written_to_without_a_trace(name, monkeypatch):
    """As TRL's `sync_ref_model` and running averages write to a model that stays in evaluation mode."""
    model, ids = load(name).eval(), torch.randint(10, 90, (1, 9))
    model(ids)
    raw = model.lm_head.raw_weight
    raw.data.mul_(0.5).add_(raw.flip(0), alpha=0.5)
    expected = model.model(ids).last_hidden_state @ normalize_rows(raw).T
    assert_close(model(ids).logits, expected)

    calls = []
    norms = norm_head.inverse_row_norms
    monkeypatch.setattr(norm_head, "inverse_row_norms", lambda weight: calls.append(weight) or norms(weight))
    output = model.generate(ids, max_new_tokens=4, eos_token_id=None, do_sample=False, use_cache=False)
    assert len(calls) == 1  # nobody writes while it generates
    assert output[0, -1] == model(output[:, :-1]).logits[0, -1].argmax() and len(calls) == 2


@pytest.mark.parametrize("name", ["baichuan2_7b", "baichuan2_13b"])
def test_resized_embeddings_keep_the_raw_rows(name):
    model = load(name)
    raw = model.lm_head.raw_weight.detach().clone()
    model.resize_token_embeddings(raw.shape[0] + 7, mean_resizing=False)
    assert isinstance(model.lm_head, NormHead) and model.config.vocab_size == raw.shape[0] + 7
    assert torch.equal(model.lm_head.raw_weight[: raw.shape[0]], raw)
    assert model.config.norm_head
    assert model(torch.tensor([[raw.shape[0] + 6]])).logits.shape[-1] == raw.shape[0] + 7


@pytest.mark.parametrize("name", ["baichuan2_7b", "baichuan2_13b"])
def test_peft_trains_the_head_itself_and_refuses_to_merge_into_it(name, tmp_path):
    model = load(name)
    ids = torch.randint(10, 90, (1, 9))
    trained = get_peft_model(model, LoraConfig(r=2, target_modules=["W_pack"], modules_to_save=["lm_head"]))
    trained(ids, labels=ids).loss.backward()
    head = trained.base_model.model.lm_head.modules_to_save["default"]
    assert head.raw_weight.grad.norm() > 0
    with torch.no_grad():
        head.raw_weight.add_(torch.randn_like(head.raw_weight))
    logits = trained.eval()(ids).logits
    trained.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(load(name), tmp_path).eval()
    assert_close(reloaded(ids).logits, logits.detach(), atol=1e-6)
    assert_close(reloaded.merge_and_unload()(ids).logits, logits.detach(), atol=1e-5)

    adapted = get_peft_model(load(name), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    assert adapted(ids).logits.isfinite().all()
    with pytest.raises(RuntimeError, match="cannot be merged"):
        adapted.merge_and_unload()
