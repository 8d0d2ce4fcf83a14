"""Golden cases of ChatGLM-6B, which are worded in the original's way: masks are 4-D and True where masked."""

import copy

import pytest
import torch

from goldens import Case, assert_close, has_backward

DEEP = ("chatglm_6b", "chatglm_6b_150k")  # 28 layers, for which the goldens allow ten times as much


def tolerance(case: Case) -> float:
    if case.name.endswith("_fp16"):
        return 0.2  # 28 layers of half precision: the original itself is 0.09 away from its own fp32
    return 2e-4 if case.golden in DEEP else 2e-5


def check_chatglm1_case(model, case: Case):
    """Checks every output of a case; of padded batches in every way that the inputs can be given."""
    model.eval()
    if "sequences" in case.outputs:
        check_greedy(model, case)
    elif "prefill" in case.inputs:
        check_decode(model, case)
    else:
        check_forward(model, case)


def real_tokens(model, case: Case) -> torch.Tensor:
    """1 where a token of the case is no padding, [batch, length]."""
    ids = case.inputs["input_ids"]
    return (ids != model.config.pad_token_id).long() if "left_padded" in case.name else torch.ones_like(ids)


def check_forward(model, case: Case):
    inputs, outputs, atol = case.inputs, case.outputs, tolerance(case)
    ids, real = inputs["input_ids"], real_tokens(model, case)
    if case.name.endswith("_fp16"):
        model = copy.deepcopy(model).half()
    given = {}
    if "attention_mask" in inputs:
        given = {"attention_mask": ~inputs["attention_mask"], "position_ids": inputs["position_ids"]}
    with torch.no_grad():
        result = model(ids, labels=inputs.get("labels"), output_hidden_states=True, use_cache=False, **given)
        assert_close(result.logits, outputs["logits"], real, atol)
        if "loss" in outputs:
            assert_close(result.loss.reshape(1), outputs["loss"], atol=atol)
        for index, hidden in enumerate(result.hidden_states):
            if f"hidden_{index}" in outputs:
                assert_close(hidden, outputs[f"hidden_{index}"], atol=atol)
        if "built_position_ids" in inputs:  # what the original made of the ids is the same when it is given
            explicit = {
                "attention_mask": ~inputs["built_attention_mask"],
                "position_ids": inputs["built_position_ids"],
            }
            assert_close(model(ids, use_cache=False, **explicit).logits, outputs["logits"], atol=atol)
        if case.name == "left_padded":
            for positions in ({}, {"position_ids": inputs["position_ids"]}):
                assert_close(model(ids, attention_mask=real, **positions).logits, outputs["logits"], real, atol)
    if "train_loss" in outputs and has_backward(model):
        check_gradients(model, case, atol)


def check_gradients(model, case: Case, atol: float):
    """The loss in train mode, the norm of every gradient, and that what the original froze has none."""
    model.train()
    loss = model(case.inputs["input_ids"], labels=case.inputs["labels"], use_cache=False).loss
    assert_close(loss.reshape(1), case.outputs["train_loss"], atol=atol)
    loss.backward()
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name in case.grad_norms or parameter.grad is not None
    }
    norms = {name: None if gradient is None else gradient.norm().item() for name, gradient in gradients.items()}
    trained = {name: norm for name, norm in case.grad_norms.items() if norm is not None}
    assert {name for name, norm in norms.items() if norm is not None} == trained.keys()
    assert {name: norms[name] for name in trained} == pytest.approx(trained, rel=1e-4, abs=atol)


@torch.no_grad()
def check_decode(model, case: Case):
    """A prefill, then the rest with the original's positions: token by token, and at once."""
    inputs, outputs, atol = case.inputs, case.outputs, tolerance(case)
    ids, positions, prefill = inputs["input_ids"], inputs["step_position_ids"], inputs["prefill"]
    steps = range(prefill + 1, ids.shape[1] + 1)
    for stops in (steps, [ids.shape[1]]):
        result = model(ids[:, :prefill], use_cache=True)
        logits, start = [result.logits], prefill
        for stop in stops:
            result = model(
                ids[:, start:stop],
                position_ids=positions[..., start - prefill : stop - prefill],
                cache=result.cache,
                use_cache=True,
            )
            logits.append(result.logits)
            start = stop
        assert_close(torch.cat(logits, dim=1), outputs["logits"], atol=atol)
    assert_close(model(ids, use_cache=False).logits, outputs["full_logits"], atol=atol)


def check_greedy(model, case: Case):
    inputs, real = case.inputs, real_tokens(model, case)
    given = [{}] + ([{"position_ids": inputs["position_ids"]}] if "position_ids" in inputs else [])
    for positions in given:
        sequences = model.generate(
            inputs["input_ids"],
            attention_mask=real,
            max_new_tokens=case.raw["max_new_tokens"],
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **positions,
        )
        assert sequences.tolist() == case.outputs["sequences"].tolist()
