"""The matrix family × feature: what users of the Hugging Face stack do, on every family of the package.

Each row of `FAMILIES` is a tiny golden checkpoint in the original layout; each test is one feature. What is special to
one family is in that family's own tests.
"""

import copy
import importlib.util
import inspect
import json
from dataclasses import dataclass, field

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    QuantizedCache,
    StaticCache,
    set_seed,
)

import hf_cnllm  # noqa: F401
from goldens import GOLDENS
from hf_cnllm.hub.publishing import needs_package


@dataclass(frozen=True)
class Row:
    """One family.

    Attributes:
        prompt_end: what a prompt ends with (ChatGLM-6B generates after [gMASK] <sop>).
        needs_mask: without an `attention_mask` the model is causal (GLM).
        tolerance: of logits; GLM-130B's are five times as large.
    """

    checkpoint: str
    prompt_end: tuple[int, ...] = ()
    overrides: dict = field(default_factory=dict)
    auto_class: type = AutoModelForCausalLM
    needs_mask: bool = False
    tolerance: float = 2e-5


GLM_TOKENS = {"mask_token_id": 5, "sop_token_id": 6, "eop_token_id": 7, "smask_token_id": 8, "gmask_token_id": 9}
GLM130B_TOKENS = {"mask_token_id": 150, "gmask_token_id": 151, "smask_token_id": 152, "bos_token_id": 154}
NO_DROPOUT = {"embedding_dropout_prob": 0.0, "attention_dropout_prob": 0.0, "output_dropout_prob": 0.0}


FAMILIES = [
    Row("baichuan_7b"),
    Row("baichuan_13b"),
    Row("baichuan2_7b"),
    Row("baichuan2_13b"),
    Row("qwen", overrides={"use_dynamic_ntk": True, "use_logn_attn": True}),
    Row("chatglm_6b_3layer", prompt_end=(141, 144)),
    Row("chatglm2_6b"),
    Row("chatglm3_6b"),
    Row(
        "glm", prompt_end=(9, 6), overrides=GLM_TOKENS | NO_DROPOUT, auto_class=AutoModelForSeq2SeqLM, needs_mask=True
    ),
    Row(
        "glm130b",
        prompt_end=(151, 154),
        overrides=GLM130B_TOKENS | {"hidden_dropout": 0.0, "attention_dropout": 0.0},
        auto_class=AutoModelForSeq2SeqLM,
        tolerance=1e-4,
    ),
]
TUNED = [Row("chatglm_6b_ptuning", prompt_end=(141, 144)), Row("chatglm2_6b_ptuning")]
families = pytest.mark.parametrize("row", FAMILIES, ids=lambda row: row.checkpoint)
tuned_too = pytest.mark.parametrize("row", [*FAMILIES, *TUNED], ids=lambda row: row.checkpoint)
# Prefix language models pack by the numbers in the mask, which their own tests show: their positions have two rows.
causal_families = pytest.mark.parametrize(
    "row", [row for row in FAMILIES if not row.prompt_end], ids=lambda row: row.checkpoint
)
backends = pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
NEW_TOKENS = 6


def load(row: Row, backend: str = "sdpa", **kwargs):
    model = row.auto_class.from_pretrained(
        GOLDENS / row.checkpoint, attn_implementation=backend, **row.overrides, **kwargs
    )
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def prompt(row: Row, length: int, seed: int = 0, low: int = 10) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    body = torch.randint(low, 100, (1, length - len(row.prompt_end)), generator=generator)
    return torch.cat([body, torch.tensor([row.prompt_end], dtype=torch.long)], dim=1)


def padded_batch(row: Row, side: str) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Three prompts of different lengths, alone and as one padded batch with its mask."""
    alone = [prompt(row, length, seed=length) for length in (9, 6, 4)]
    width = max(ids.shape[1] for ids in alone)
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for index, single in enumerate(alone):
        length = single.shape[1]
        part = slice(width - length, width) if side == "left" else slice(0, length)
        ids[index, part], mask[index, part] = single[0], 1
    return alone, ids, mask


def forward(row: Row, model, ids, **kwargs):
    if row.needs_mask:
        kwargs.setdefault("attention_mask", torch.ones_like(ids))
    return model(ids, **kwargs)


def generate(model, ids, **kwargs):
    kwargs.setdefault("attention_mask", torch.ones_like(ids))
    return model.generate(ids, max_new_tokens=NEW_TOKENS, **{"do_sample": False, **kwargs})


@families
@backends
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_batch_gives_the_logits_of_its_rows(row, backend, side):
    model = load(row, backend)
    alone, ids, mask = padded_batch(row, side)
    logits = model(ids, attention_mask=mask).logits
    for index, single in enumerate(alone):
        torch.testing.assert_close(
            logits[index][mask[index] == 1], forward(row, model, single).logits[0], atol=row.tolerance, rtol=0
        )


@families
@backends
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generating_a_left_padded_batch_gives_the_rows_own_continuations(row, backend, cache):
    model = load(row, backend)
    alone, ids, mask = padded_batch(row, "left")
    batch = generate(model, ids, attention_mask=mask, cache_implementation=cache, disable_compile=True)
    for index, single in enumerate(alone):
        assert batch[index, ids.shape[1] :].tolist() == generate(model, single)[0, single.shape[1] :].tolist()


@families
@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beam_search_with_and_without_cache_agree(row, mode):
    model = load(row)
    ids = prompt(row, 7)
    assert torch.equal(generate(model, ids, **mode), generate(model, ids, use_cache=False, **mode))


@families
def test_sampling_repeats_with_its_seed(row):
    model = load(row)
    ids = prompt(row, 7)
    sampled = []
    for _ in range(2):
        set_seed(3)
        sampled.append(generate(model, ids, do_sample=True, num_return_sequences=3))
    assert torch.equal(*sampled) and sampled[0].shape[0] == 3


@tuned_too
def test_generating_in_the_midst_of_training_with_gradient_checkpointing(row):
    """Without gradients layers keep the cache, and with it a P-tuning prefix."""
    model = load(row)
    ids = prompt(row, 9)
    scores = {"return_dict_in_generate": True, "output_logits": True}
    expected = torch.stack(generate(model, ids, **scores).logits)
    model.train().gradient_checkpointing_enable()
    torch.testing.assert_close(
        torch.stack(generate(model, ids, **scores).logits), expected, atol=row.tolerance, rtol=0
    )


@families
@torch.no_grad()
def test_classifier_free_guidance(row):
    model, ids, other = load(row), prompt(row, 9), prompt(row, 7, seed=1)
    options = {"guidance_scale": 1.5, "negative_prompt_ids": other, "use_cache": False, "output_scores": True}
    options |= {"negative_prompt_attention_mask": torch.ones_like(other), "return_dict_in_generate": True}
    output = generate(model, ids, **options)
    for step, scores in enumerate(output.scores):
        new = output.sequences[:, 9 : 9 + step]
        mine, others = (
            forward(row, model, torch.cat([start, new], dim=1)).logits[:, -1].log_softmax(-1) for start in (ids, other)
        )
        torch.testing.assert_close(scores, others + 1.5 * (mine - others), atol=10 * row.tolerance, rtol=0)
    if row.prompt_end:
        with pytest.raises(ValueError, match=r"`guidance_scale` .* pass `use_cache=False`"):
            generate(model, ids, **options | {"use_cache": True})


@tuned_too
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_text_goes_on_with_its_cache(row, kind):
    """All ids at every turn; of causal families, and with positions, the new ones alone will do."""
    model, ids = load(row), prompt(row, 9)
    options = {"return_dict_in_generate": True, "output_logits": True, "disable_compile": True}
    room = 30 + model.learned_keys
    cache = StaticCache(model.config, max_cache_len=room) if kind == "static" else DynamicCache(config=model.config)
    first = generate(model, ids, cache=cache, **options)
    text = torch.cat([first.sequences, prompt(row, 9)[:, :3]], dim=1)
    new, mask = text[:, 14:], torch.ones_like(text)
    whole, earlier = generate(model, text, **options), copy.deepcopy(cache)
    assert torch.equal(generate(model, text, cache=cache, **options).sequences, whole.sequences)
    if row.prompt_end:
        with pytest.raises(ValueError, match=r"4 new tokens behind the 14 in `cache`.*pass all ids of the text"):
            generate(model, new, attention_mask=mask, cache=earlier, **options)
        positions = model.positions_of_prompt(text, None)[..., -4:]
        options["position_ids"] = positions if positions.shape[1] == 2 else positions[:, 0]
    going_on = generate(model, new, attention_mask=mask, cache=earlier, **options)
    torch.testing.assert_close(
        torch.stack(going_on.logits), torch.stack(whole.logits), atol=10 * row.tolerance, rtol=0
    )


@tuned_too
def test_a_cache_in_fp8_is_about_as_good(row):
    """Its scale is that of what is written first: a P-tuning prefix alone, much smaller than the text, would not do."""
    if "fp8" not in inspect.getsource(QuantizedCache):
        pytest.skip("this transformers has no such cache")
    model, ids = load(row), prompt(row, 9)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "prefix_encoder" in name:
                weight.mul_(0.01)
    options = {"return_dict_in_generate": True, "output_logits": True, "min_new_tokens": 2}
    exact = generate(model, ids, **options).logits
    rounded = generate(model, ids, cache_implementation="quantized", cache_config={"backend": "fp8"}, **options).logits
    # The prompt's own keys are not rounded.
    torch.testing.assert_close(rounded[0], exact[0], atol=row.tolerance, rtol=0)
    assert (rounded[1] - exact[1]).norm() < 0.2 * exact[1].norm()


@tuned_too
@torch.no_grad()
def test_weights_that_are_offloaded_come_for_each_module(row):
    model, ids = load(row), prompt(row, 9)
    expected = forward(row, model, ids).logits
    torch.testing.assert_close(
        forward(row, cpu_offload(model, "cpu"), ids).logits, expected, atol=row.tolerance, rtol=0
    )


@tuned_too
@pytest.mark.parametrize("assistant", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}, "self"])
def test_assisted_decoding_gives_greedy_ids(row, assistant):
    model = load(row)
    ids = prompt(row, 9)
    kwargs = {"assistant_model": load(row)} if assistant == "self" else assistant
    assert torch.equal(generate(model, ids, **kwargs), generate(model, ids))


@families
@torch.no_grad()
def test_two_interleaved_generations_do_not_disturb_each_other(row):
    model = load(row)
    runs = [prompt(row, length, seed=length) for length in (8, 41)]
    expected = [generate(model, ids) for ids in runs]
    caches, states = [None, None], list(runs)
    for _ in range(NEW_TOKENS):
        for index in range(2):
            ids = states[index] if caches[index] is None else states[index][:, -1:]
            positions = {}
            if row.prompt_end:  # what a token fills is not seen from the token
                all_of_them = model.positions_of_prompt(states[index], None, check=False)
                positions = {"position_ids": all_of_them[..., -ids.shape[1] :]}
            mask = torch.ones_like(states[index])
            output = model(ids, attention_mask=mask, cache=caches[index], use_cache=True, **positions)
            caches[index] = output.cache
            states[index] = torch.cat([states[index], output.logits[:, -1:].argmax(-1)], dim=1)
    for state, want in zip(states, expected, strict=True):
        assert torch.equal(state, want)


@families
@torch.no_grad()
def test_logits_to_keep_keeps_the_last(row):
    model = load(row)
    ids = prompt(row, 9)
    last = forward(row, model, ids, logits_to_keep=2).logits
    torch.testing.assert_close(last, forward(row, model, ids).logits[:, -2:], atol=row.tolerance, rtol=0)


@families
@torch.no_grad()
def test_saving_after_use_gives_back_the_checkpoint_bit_for_bit(row, tmp_path):
    model = load(row)
    ids = prompt(row, 9)
    before = model(ids).logits
    model.train()
    model(ids)
    model.eval().save_pretrained(tmp_path)
    original, saved = (
        load_file(GOLDENS / row.checkpoint / "model.safetensors"),
        load_file(tmp_path / "model.safetensors"),
    )
    ignored = [name for name in original if name not in saved]
    assert all("inv_freq" in name or "masked_bias" in name or "logn" in name for name in ignored), ignored
    assert all(torch.equal(saved[name], original[name]) for name in saved)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == needs_package("AutoConfig")
    again = row.auto_class.from_pretrained(tmp_path).eval()
    assert type(again) is type(model)
    assert torch.equal(again(ids).logits, before)


@families
def test_lora_with_gradient_checkpointing_trains_and_merges(row, tmp_path):
    torch.manual_seed(0)
    model = load(row)
    base_logits = model(prompt(row, 9)).logits.detach()
    # PEFT knows the family's default targets from the table.
    peft_model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False))
    peft_model.gradient_checkpointing_enable()
    peft_model.enable_input_require_grads()
    peft_model.train()
    ids = prompt(row, 12)
    peft_model(ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in peft_model.named_parameters() if p.requires_grad}
    assert gradients and all(g is not None and g.abs().sum() > 0 for g in gradients.values())
    peft_model.gradient_checkpointing_disable()
    peft_model.zero_grad()
    peft_model(ids, labels=ids).loss.backward()
    for name, p in peft_model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, gradients[name], atol=1e-6, rtol=1e-4)

    peft_model.eval().save_pretrained(tmp_path)
    adapted = peft_model(prompt(row, 9)).logits.detach()
    assert (adapted - base_logits).abs().max() > 1e-3
    reloaded = PeftModel.from_pretrained(load(row), tmp_path).eval()
    torch.testing.assert_close(reloaded(prompt(row, 9)).logits, adapted, atol=row.tolerance, rtol=0)
    merged = reloaded.merge_and_unload()
    torch.testing.assert_close(merged(prompt(row, 9)).logits, adapted, atol=row.tolerance, rtol=0)


@families
def test_a_tuned_prefix_needs_no_cache(row):
    model = get_peft_model(load(row), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    ids = prompt(row, 9)
    assert torch.equal(generate(model, ids), generate(model, ids, use_cache=False))


@causal_families
@pytest.mark.parametrize("method", [PrefixTuningConfig, PromptTuningConfig])
@pytest.mark.parametrize("how", ["chunks", "static", "turns"])
def test_what_prompt_learning_would_cut_is_refused(row, method, how):
    model = get_peft_model(load(row), method(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    ids, cache = prompt(row, 9), DynamicCache(config=model.config)
    if how == "turns":
        ids = torch.cat([generate(model, ids, cache=cache), prompt(row, 5)], dim=1)
        if cache.get_seq_length() == 0:
            pytest.skip("PEFT generates with a cache of its own")
    options = {
        "chunks": {"prefill_chunk_size": 4},
        "static": {"cache_implementation": "static", "disable_compile": True},
        "turns": {"cache": cache},
    }[how]
    with pytest.raises(ValueError, match="PEFT's prompt learning"):
        generate(model, ids, **options)


@tuned_too
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_gradients_of_each_example_by_torch_func(row, training):
    model = load(row).train(training)
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    ids = torch.cat([prompt(row, 9, seed=seed) for seed in range(3)])

    def loss(weights, example):
        inputs = {"labels": example[None], "use_cache": False}
        if row.needs_mask:
            inputs["attention_mask"] = torch.ones_like(example[None])
        return torch.func.functional_call(model, weights, (example[None],), inputs).loss

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, ids)
    for index in range(3):
        model.zero_grad()
        forward(row, model, ids[index : index + 1], labels=ids[index : index + 1]).loss.backward()
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                torch.testing.assert_close(gradients[name][index], weight.grad, atol=row.tolerance, rtol=1e-4)


@families
def test_accumulated_gradients_equal_those_of_one_batch(row):
    """`num_items_in_batch`, as Trainer passes it, makes two half batches add up to the whole."""
    model = load(row).train()
    ids = torch.cat([prompt(row, 10, seed=seed) for seed in range(4)])
    labels = ids.clone()
    labels[0, :4] = labels[2, :4] = -100
    counted = (labels[:, 1:] != -100).sum()
    if hasattr(model.config, "z_loss_weight"):
        model.config.z_loss_weight = 0.01
    losses, norms = [], []
    for parts in ((slice(0, 4),), (slice(0, 2), slice(2, 4))):
        model.zero_grad()
        total = 0.0
        for part in parts:
            loss = model(ids[part], labels=labels[part], num_items_in_batch=counted).loss
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append({name: p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert norms[0] == pytest.approx(norms[1], rel=1e-3, abs=1e-5)


@families
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("num_items", "expected"), [(None, torch.nan), (7, 0.0)])
def test_a_batch_without_labels_has_the_loss_that_llama_gives_it(row, training, num_items, expected):
    """In training it is computed in chunks, in evaluation from the logits."""
    model = load(row).train(training)
    ids = prompt(row, 8)
    loss = forward(row, model, ids, labels=torch.full_like(ids, -100), num_items_in_batch=num_items).loss
    torch.testing.assert_close(loss.item(), expected, equal_nan=True)
    loss.backward()
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@causal_families
def test_packed_documents_by_position_ids_do_not_see_each_other(row):
    model = load(row)
    first, second = prompt(row, 6, seed=1), prompt(row, 5, seed=2)
    positions = torch.cat([torch.arange(6), torch.arange(5)])[None]
    with torch.no_grad():
        packed = model(torch.cat([first, second], dim=1), position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed[:, :6], model(first).logits, atol=row.tolerance, rtol=0)
        torch.testing.assert_close(packed[:, 6:], model(second).logits, atol=row.tolerance, rtol=0)


@families
def test_an_empty_input_is_refused(row):
    with pytest.raises(ValueError, match="length 0"):
        load(row)(torch.empty(1, 0, dtype=torch.long))


@families
@pytest.mark.compiled
@pytest.mark.slow
def test_the_forward_pass_compiles_without_a_graph_break(row):
    model = load(row)
    ids = prompt(row, 9)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        logits, expected = (forward(row, run, ids, use_cache=False).logits for run in (compiled, model))
        torch.testing.assert_close(logits, expected, atol=row.tolerance, rtol=0)


@families
@pytest.mark.parametrize("bad", ["id", "length", "nothing"])
def test_inputs_that_cannot_be_are_named(row, bad):
    model = load(row)
    too_large = model.config.vocab_size
    inputs, complaint = {
        "id": ({"input_ids": torch.tensor([[10, too_large]])}, rf"`input_ids\[0, 1\]` is {too_large}"),
        "length": ({"input_ids": torch.empty(1, 0, dtype=torch.long)}, "length 0"),
        "nothing": ({}, "exactly one of input_ids or inputs_embeds"),
    }[bad]
    with pytest.raises(ValueError, match=complaint):
        model(**inputs)


@families
@pytest.mark.parametrize("shape", [(8,), (1, 5), (3, 8), (1, 1, 1, 8, 8)])
@torch.no_grad()
def test_a_mask_that_does_not_fit_is_refused(row, shape):
    with pytest.raises(ValueError, match="`attention_mask`"):
        load(row)(prompt(row, 8), attention_mask=torch.ones(shape, dtype=torch.long))


@families
@torch.no_grad()
def test_a_mask_shorter_than_the_cache_is_refused(row):
    model = load(row)
    cache = forward(row, model, prompt(row, 8), use_cache=True).cache
    with pytest.raises(ValueError, match=r"`attention_mask` has shape .*9"):
        model(torch.tensor([[20]]), attention_mask=torch.ones(1, 4, dtype=torch.long), cache=cache)


@families
@pytest.mark.parametrize(
    ("backend", "error"), [("sdpaa", "is not supported"), ("flash_attention_2", "FlashAttention2 has been toggled on")]
)
def test_a_backend_that_is_misspelt_or_not_installed_is_named(row, backend, error):
    if backend == "flash_attention_2" and importlib.util.find_spec("flash_attn"):
        pytest.skip("flash-attn is installed")
    with pytest.raises((ValueError, ImportError), match=error):
        load(row, backend)
