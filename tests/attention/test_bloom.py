"""transformers' own BLOOM through the folded kernel: the numbers of its eager attention, without the bias."""

import copy

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_cnllm
from hf_cnllm import use_folded_alibi
from hf_cnllm.attention import alibi


@pytest.fixture(autouse=True)
def fold_short_prompts_too(monkeypatch):
    monkeypatch.setattr(alibi, "DENSE_PAIRS", 1)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=97, hidden_size=40, n_layer=2, n_head=5, hidden_dropout=0.0, attention_dropout=0.0)
    eager = BloomForCausalLM(config).eval()
    fast = BloomForCausalLM(copy.deepcopy(config)).eval()
    fast.load_state_dict(eager.state_dict())
    return eager, use_folded_alibi(fast)


@pytest.mark.parametrize("mask", ["none", "ones", "left", "right", "inside"])
def test_logits_and_gradients_equal_eager(pair, mask):
    ids = torch.randint(0, 97, (2, 33))
    attention_mask = None if mask == "none" else torch.ones_like(ids)
    if mask in ("left", "right", "inside"):
        attention_mask[1, {"left": slice(0, 5), "right": slice(28, 33), "inside": slice(9, 12)}[mask]] = 0
    real = torch.ones_like(ids) if attention_mask is None else attention_mask
    labels = ids.masked_fill(real == 0, -100)
    if mask == "left":
        labels[1, 5] = -100  # predicted by padding
    results = []
    for model in pair:
        model.train()
        output = model(ids, attention_mask=attention_mask, labels=labels)
        output.loss.backward()
        results.append((output.logits[real == 1], {n: p.grad.clone() for n, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0], atol=2e-5, rtol=0)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}])
def test_generation_equals_eager(pair, mode):
    ids = torch.randint(3, 97, (1, 9))
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 3, **mode}
    eager, fast = (model.generate(ids, **settings) for model in pair)
    assert torch.equal(eager, fast)


def test_a_left_padded_batch_generates_its_rows(pair):
    ids = torch.randint(3, 97, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    batch = pair[1].generate(ids, attention_mask=mask, **settings)
    assert torch.equal(batch[1:, 9:], pair[0].generate(ids[1:, 4:], **settings)[:, 5:])


def test_it_may_be_called_twice_and_saves_as_before(pair, tmp_path):
    fast = use_folded_alibi(pair[1])
    fast.save_pretrained(tmp_path)
    again = BloomForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "eager"
    ids = torch.randint(0, 97, (1, 7))
    torch.testing.assert_close(again(ids).logits, fast(ids).logits, atol=2e-5, rtol=0)


def test_other_models_are_refused():
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(TypeError, match="BLOOM"):
        use_folded_alibi(llama)


def test_the_name_of_the_first_release_works():
    assert hf_cnllm.accelerate is use_folded_alibi
