"""Qwen v1 against the original's numbers, and its long-context features in every way of generating."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    pipeline,
)
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.utils import logging

from goldens import BACKENDS, GOLDENS, assert_close, cases_of, check_case, golden_cases, golden_model
from hf_cnllm import QWenConfig, QWenLMHeadModel, QWenTokenizer
from hf_cnllm._compat import CACHE

CHECKPOINTS = ("qwen", "qwen_72b", "qwen_bias", "qwen_early")
BUGS_OF_THE_ORIGINAL = ("chunked_orig_bug",)
WIDTH, LENGTHS = 70, (70, 40, 20)  # trained length 32: the factors are 7, 3 and 1
NEW_TOKENS = 8


def load(name: str = "qwen", backend: str = "sdpa", **overrides):
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / name, attn_implementation=backend, **overrides)
    model.generation_config.pad_token_id = 0
    return model.eval()


@pytest.fixture(scope="module")
def batch():
    """Left-padded prompts of `LENGTHS` and their mask."""
    ids = torch.randint(3, 148, (len(LENGTHS), WIDTH), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(WIDTH) >= WIDTH - torch.tensor(LENGTHS)[:, None]).long()
    return ids * mask, mask


def generate(model, ids, mask=None, **kwargs):
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **kwargs}
    return model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **kwargs)


# --- the original's numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", golden_cases(*CHECKPOINTS, skip=BUGS_OF_THE_ORIGINAL))
def test_golden(case, backend):
    if (case.golden, case.name) == ("qwen_early", "left_padded"):
        return check_the_mask_is_obeyed(case, backend)
    check_case(golden_model(AutoModelForCausalLM, case, backend), case)


@torch.no_grad()
def check_the_mask_is_obeyed(case, backend):
    """The first revision ignored attention_mask; only its unpadded row is right."""
    model = load(case.golden, backend)
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    logits = model(ids, attention_mask=mask).logits
    assert mask[0].all()
    assert_close(logits[0], case.outputs["logits"][0])
    for row, single in enumerate(mask):
        real = single.bool()
        assert_close(logits[row][real], model(ids[row : row + 1, real]).logits[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["qwen", "qwen_72b", "qwen_bias"])
@torch.no_grad()
def test_a_chunk_with_a_cache_answers_like_the_full_forward(name, backend):
    """In the original, a chunk was not causal within itself."""
    case, model = cases_of(name)["chunked_orig_bug"], load(name, backend)
    ids, prefill = case.inputs["input_ids"], case.inputs["prefill"]
    first = model(ids[:, :prefill], use_cache=True)
    rest = model(ids[:, prefill:], cache=first.cache).logits
    full = model(ids).logits
    assert_close(torch.cat([first.logits, rest], dim=1), full)
    assert_close(full[:, :prefill], case.outputs["logits"][:, :prefill])


def test_an_odd_number_of_rotated_dimensions_is_completed_to_pairs():
    model = load(rotary_pct=0.3)  # 4.8 of 16, cut to 4
    assert model.transformer.rotary_emb.inv_freq.shape[-1] == 2
    model = load(rotary_pct=0.35)  # 5.6, cut to 5: three frequencies that turn six dimensions
    angles = torch.arange(7)[:, None] / 10_000 ** (torch.tensor([0.0, 2.0, 4.0]) / 5)
    query = torch.randn(1, 3, 7, 16)
    a, b, rest = query.split([3, 3, 10], dim=-1)
    expected = torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), rest], dim=-1)
    rotary, attention = model.transformer.rotary_emb, model.transformer.h[0].attn
    rotated = attention._rotate(query, query, *rotary(query, torch.arange(7)[None], rotary.plain))
    assert_close(rotated[0], expected)
    with torch.no_grad():
        assert model(torch.randint(0, 151, (1, 70))).logits.isfinite().all()


# --- dynamic NTK, in every way of generating ----------------------------------------------------------------------


WAYS_OF_GENERATING = {
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "chunks within the trained length": {"prefill_chunk_size": 16},
    "chunks past the trained length": {"prefill_chunk_size": 40},
}


@pytest.mark.parametrize("way", WAYS_OF_GENERATING)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_the_same_in_every_way(way, beams, batch):
    if beams > 1 and "chunks" in way:
        beams = 2
    model = load()
    expected = generate(model, *batch, num_beams=beams)
    assert torch.equal(generate(model, *batch, num_beams=beams, **WAYS_OF_GENERATING[way]), expected)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_each_row_of_a_batch_has_its_own_factor(backend, batch):
    """Without LogN, which counts columns as the original does, padding leaves no trace."""
    model = load(backend=backend, use_logn_attn=False)
    ids, mask = batch
    generated = generate(model, ids, mask)
    for row, length in enumerate(LENGTHS):
        alone = generate(model, ids[row : row + 1, -length:])
        assert generated[row, WIDTH:].tolist() == alone[0, length:].tolist()


def test_positions_of_ones_own_make_logn_blind_to_padding_too(batch):
    model = load()
    ids, mask = batch
    generated = generate(model, ids, mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    for row, length in enumerate(LENGTHS):
        alone = generate(model, ids[row : row + 1, -length:])
        assert generated[row, WIDTH:].tolist() == alone[0, length:].tolist()


def test_several_samples_of_a_prompt_share_its_factor(batch):
    model = load()
    ids, mask = batch
    torch.manual_seed(0)
    several = generate(model, ids, mask, do_sample=True, num_return_sequences=2)
    torch.manual_seed(0)
    repeated = generate(model, ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0), do_sample=True)
    assert torch.equal(several, repeated)


@pytest.mark.parametrize("length", [28, 32, 41, 64])  # the candidates may reach past 32 and 64, the prompt does not
@pytest.mark.parametrize("assistant", ["lookup", "same model", "other weights", "other family"])
def test_assisted_decoding_gives_greedy_ids(assistant, length, batch):
    model, ids = load(), batch[0][:1, :length]
    kwargs = {"prompt_lookup_num_tokens": 4}
    if assistant != "lookup":
        torch.manual_seed(0)
        helper = load() if assistant != "other family" else LlamaForCausalLM(
            LlamaConfig(vocab_size=151, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
        ).eval()  # fmt: skip
        if assistant == "other weights":
            torch.nn.init.normal_(helper.lm_head.weight)
        kwargs = {"assistant_model": helper}
    assert torch.equal(generate(model, ids, **kwargs), generate(model, ids))


@torch.no_grad()
def test_a_loop_by_hand_equals_generate_while_others_run(batch):
    model = load()
    prompts = [batch[0][:1, :length] for length in (70, 20, 40)]
    expected = [generate(model, prompt) for prompt in prompts]
    outputs = [model(prompt, use_cache=True) for prompt in prompts]
    sequences = list(prompts)
    for step in range(NEW_TOKENS):
        for index, output in enumerate(outputs):
            token = output.logits[:, -1:].argmax(-1)
            sequences[index] = torch.cat([sequences[index], token], dim=1)
            if step < NEW_TOKENS - 1:
                outputs[index] = model(token, cache=output.cache)
    for sequence, want in zip(sequences, expected, strict=True):
        assert torch.equal(sequence, want)


def new_cache(kind: str, model):
    return {
        "model's own": lambda: None,
        "lazy": lambda: DynamicCache(),
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=100),
    }[kind]()


@pytest.mark.parametrize("kind", ["model's own", "lazy", "dynamic", "static"])
@torch.no_grad()
def test_rows_take_their_factor_along_when_a_cache_is_rearranged(kind, batch):
    model = load()
    ids, mask = batch
    cache = model(ids, attention_mask=mask, cache=new_cache(kind, model), use_cache=True).cache
    tokens, mask = torch.tensor([[5], [6], [7]]), torch.cat([mask, mask.new_ones(3, 1)], dim=1)

    def step(cache, rows):
        return model(tokens[rows], attention_mask=mask[rows], cache=cache).logits

    expected = step(copy.deepcopy(cache), torch.arange(3))
    operations = {"reorder_cache": (torch.tensor([2, 0, 1]),) * 2}
    if kind != "static":
        operations["batch_repeat_interleave"] = (2, torch.tensor([0, 0, 1, 1, 2, 2]))
        operations["batch_select_indices"] = (torch.tensor([1, 2]),) * 2
    for operation, (argument, rows) in operations.items():
        changed = copy.deepcopy(cache)
        getattr(changed, operation)(argument)
        assert_close(step(changed, rows), expected[rows])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_a_generation_keeps_the_factor_of_its_first_call(kind, batch):
    model, ids = load(), batch[0][:1]
    for first in (20, 50):  # the factor is 1 resp. 3, that of the whole is 7
        cache = new_cache(kind, model)
        model(ids[:, :first], cache=cache)
        rest = model(ids[:, first:], cache=cache).logits
        assert_close(rest, model(ids, prompt_lengths=first).logits[:, first:])
        if kind == "static":  # `reset` does not empty a dynamic cache before transformers 5.17 or so
            cache.reset()
            assert_close(model(ids, cache=cache).logits, model(ids).logits)


def test_a_conversation_continues_on_its_cache(batch):
    model, ids = load(), batch[0][:1]
    first = generate(model, ids[:, :40], return_dict_in_generate=True)
    turn = torch.cat([first.sequences, ids[:, 40:60]], dim=1)
    continued = generate(model, turn, cache=first[CACHE])
    recomputed = generate(model, turn, prompt_lengths=torch.tensor([40]))
    assert torch.equal(continued, recomputed)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@torch.no_grad()
def test_packed_documents_are_as_if_alone(backend, batch):
    model, ids = load(backend=backend), batch[0][:1]
    documents = (40, 20, 10)
    positions = torch.cat([torch.arange(length) for length in documents])[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    alone = [model(document, use_cache=False).logits for document in ids.split(documents, dim=1)]
    assert_close(packed, torch.cat(alone, dim=1))


@torch.no_grad()
def test_a_mask_of_four_dimensions_tells_lengths_too(batch):
    model = load()
    ids, mask = batch
    causal = torch.ones(WIDTH, WIDTH, dtype=torch.bool).tril()[None, None] & mask[:, None, None, :].bool()
    causal |= torch.eye(WIDTH, dtype=torch.bool)  # rows that see nothing are not defined
    real = mask.bool()
    assert_close(model(ids, attention_mask=causal).logits[real], model(ids, attention_mask=mask).logits[real])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["qwen", "qwen_72b", "qwen_bias"])
@pytest.mark.parametrize("case_name", ["left_padded", "long_batched_left_padded"])
@torch.no_grad()
def test_padding_before_the_first_token_is_as_in_the_original(case_name, name, backend):
    """The last of it predicts the first token, so the loss may depend on it."""
    case = cases_of(name)[case_name]
    model = load(name, backend, **case.config_overrides)
    logits = model(case.inputs["input_ids"], attention_mask=case.inputs["attention_mask"]).logits
    assert_close(logits, case.outputs["logits"])


def test_left_padded_training_is_the_same_on_every_backend(batch):
    ids, mask = batch
    losses, gradients = {}, {}
    for backend in BACKENDS:
        model = load(backend=backend).train()
        trains = backend != "flex_attention"  # torch has no backward pass for it on CPUs
        with torch.set_grad_enabled(trains):
            loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        losses[backend] = loss.item()
        if trains:
            loss.backward()
            gradients[backend] = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert losses["sdpa"] == pytest.approx(losses["eager"], abs=2e-5)
    assert losses["flex_attention"] == pytest.approx(losses["eager"], abs=2e-5)
    for key, gradient in gradients["eager"].items():
        torch.testing.assert_close(gradients["sdpa"][key], gradient, atol=1e-5, rtol=1e-3)


def test_neither_ntk_nor_logn_acts_in_training(batch):
    ids = batch[0][:1]
    plain = load(use_dynamic_ntk=False, use_logn_attn=False).train()
    assert torch.equal(load().train()(ids).logits, plain(ids).logits)
    assert not torch.equal(load()(ids).logits, load().train()(ids).logits)


@pytest.mark.compiled
@torch.no_grad()
def test_forward_compiles_to_one_graph(batch):
    ids, mask = batch
    for model in (load(), load(window_sizes=[8, None])):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(
            compiled(ids, attention_mask=mask).logits[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()]
        )
        cache, reference = (StaticCache(config=model.config, max_cache_len=90) for _ in range(2))
        for filled in (cache, reference):
            model(ids, attention_mask=mask, cache=filled)
        for token in range(3):
            tokens = torch.full((3, 1), token)
            mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
            step = compiled(tokens, attention_mask=mask, cache=cache).logits
            assert_close(step, model(tokens, attention_mask=mask, cache=reference).logits)
        mask = batch[1]


@pytest.mark.compiled
@pytest.mark.slow
@pytest.mark.parametrize("windows", [None, [8, None]])
def test_static_cache_decoding_compiles_once(windows, batch):
    compile_config = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    compile_config._compile_all_devices = True
    model = load(window_sizes=windows)
    # transformers' static sliding layers count in a Python number, so windows cost recompilations at first.
    with torch._dynamo.config.patch(error_on_recompile=windows is None):
        compiled = generate(model, *batch, cache_implementation="static", compile_config=compile_config)
    assert torch.equal(compiled, generate(model, *batch))


# --- windows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("windows", [[8, None], [None, 8], [8, 16], [5, 5]])
@torch.no_grad()
def test_windows_hide_what_is_behind_them(windows, backend, batch):
    model = load(backend=backend, window_sizes=windows)
    ids, mask = batch
    real = mask.bool()
    reference = load(backend="eager")
    distance = torch.arange(WIDTH)[:, None] - torch.arange(WIDTH)
    for block, window in zip(reference.transformer.h, windows, strict=True):
        if window is not None:
            hidden = torch.zeros(WIDTH, WIDTH).masked_fill(distance >= window, torch.finfo(torch.float32).min)
            block.attn.register_forward_pre_hook(
                lambda module, args, kwargs, hidden=hidden: (args, kwargs | {"attention_mask": kwargs["attention_mask"] + hidden}),
                with_kwargs=True,
            )  # fmt: skip
    assert_close(model(ids, attention_mask=mask).logits[real], reference(ids, attention_mask=mask).logits[real])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("windows", [[8, None], [16, 8], [5, 5]])
def test_windows_in_every_way_of_generating(windows, backend, batch):
    model = load(backend=backend, window_sizes=windows)
    expected = generate(model, *batch, use_cache=False)
    cache = generate(model, *batch, return_dict_in_generate=True)[CACHE]
    kept = max(window for window in windows if window)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [
        kept - 1 if window else WIDTH + NEW_TOKENS - 1 for window in windows
    ]
    for way in ({}, *WAYS_OF_GENERATING.values()):
        assert torch.equal(generate(model, *batch, **way), expected), way
    prompt = batch[0][:1, :41]
    assert torch.equal(generate(model, prompt, prompt_lookup_num_tokens=4), generate(model, prompt))


def test_kernels_that_take_a_window_get_each_layers_own(batch):
    """Flash attention needs a GPU; what it is called with does not."""
    calls = []

    def recording(module, query, key, value, attention_mask, scaling, sliding_window=None, **kwargs):
        calls.append((module.layer_idx, sliding_window, query.clone(), attention_mask, scaling))
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("recording", recording)
    AttentionMaskInterface.register("recording", flash_attention_mask)
    ids, mask = batch
    load(backend="recording", window_sizes=[8, None], use_dynamic_ntk=False)(ids, attention_mask=mask)
    load(backend="recording", use_logn_attn=False, use_dynamic_ntk=False)(ids, attention_mask=mask)
    (layer, window, scaled, given, scaling), (_, none, *_), (_, off, plain, *_) = calls[0], calls[1], calls[2]
    assert (layer, window, none, off, scaling) == (0, 8, None, None, 16**-0.5)
    assert torch.equal(given, mask.bool())
    factor = torch.log(torch.arange(1, WIDTH + 1)) / torch.log(torch.tensor(32.0))
    torch.testing.assert_close(scaled, plain * factor.clamp(min=1)[:, None])


def test_a_windowed_model_trains_from_scratch():
    torch.manual_seed(0)
    model = QWenLMHeadModel(
        QWenConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                   seq_length=16, window_sizes=[4, None], no_bias=False)
    )  # fmt: skip
    assert model.config.use_dynamic_ntk and model.config.use_logn_attn
    ids = torch.randint(0, 50, (2, 24))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


# --- continuous batching ------------------------------------------------------------------------------------------


CONTINUOUS = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("overrides", "lengths"),
    [({}, (30, 20, 9)), ({"use_dynamic_ntk": False, "window_sizes": [8, None]}, (70, 28, 9))],
)
def test_continuous_batching_gives_what_generate_gives(overrides, lengths, backend, batch):
    model = load(backend=backend, **overrides)
    prompts = [row[:length].tolist() for row, length in zip(batch[0].clamp(min=1), lengths, strict=True)]
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=128)
    outputs = model.generate_batch(prompts, generation_config=CONTINUOUS, continuous_batching_config=small)
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        model.set_attn_implementation(backend)
        assert output.generated_tokens == generate(model, torch.tensor([prompt]))[0, len(prompt) :].tolist()


def test_continuous_batching_refuses_what_it_cannot_do_right():
    model = load()
    with pytest.raises(ValueError, match=r"a prompt of 33 tokens needs: it is longer than `seq_length` \(32\)"):
        model.generate_batch([[5] * 33], generation_config=CONTINUOUS)
    with pytest.raises(ValueError, match="max_prompt_length"):
        model.init_continuous_batching(generation_config=CONTINUOUS)
    model = load(use_dynamic_ntk=False, window_sizes=[4, 8])
    with pytest.raises(ValueError, match="`window_sizes` holds several"):
        model.generate_batch([[5] * 9], generation_config=CONTINUOUS)


# --- configurations and checkpoints -------------------------------------------------------------------------------


def test_every_original_key_is_read():
    config = AutoConfig.from_pretrained(GOLDENS / "qwen_early")
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (48, 2, 3)
    assert (config.intermediate_size, config.max_position_embeddings, config.vocab_size) == (112, 256, 151)
    assert (config.eos_token_id, config.head_dim, config.rms_norm_eps) == (148, 16, 1e-6)
    config = AutoConfig.from_pretrained(GOLDENS / "qwen_72b")
    assert config.rope_theta == config.rotary_emb_base == 1_000_000
    assert (config.use_dynamic_ntk, config.use_flash_attn, config.onnx_safe) == (False, False, None)
    assert AutoConfig.from_pretrained(GOLDENS / "qwen_72b", rotary_emb_base=500).rope_theta == 500
    assert QWenConfig(vocab_size=151_851, padded_vocab_size=151_936).vocab_size == 151_936


@pytest.mark.parametrize(
    ("flag", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_the_originals_dtype_flags(flag, dtype, tmp_path):
    model = load(**{flag: True})
    assert model.dtype == dtype and model.transformer.rotary_emb.inv_freq.dtype == torch.float32
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == dtype
    assert load(**{flag: True}, dtype=torch.float64).dtype == torch.float64


def test_windows_have_transformers_names_too(tmp_path):
    config = QWenConfig(num_hidden_layers=3, window_sizes=[8, None, 16])
    assert config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert config.sliding_window == 16
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).window_sizes == [8, None, 16]
    config.sliding_window = 4
    assert config.window_sizes == [4, None, 4]
    config.sliding_window = None
    assert config.window_sizes is None
    config.sliding_window = 4
    assert config.window_sizes == [4, 4, 4]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rotary_pct": 0}, r"`rotary_pct` must be in \(0, 1\], got 0"),
        ({"rotary_pct": 1.5}, "`rotary_pct` must be in"),
        ({"rotary_pct": 0.125}, "`rotary_pct` .* gives 2 rotated dimensions. It must be at least 3"),
        ({"rotary_pct": 0.01, "use_dynamic_ntk": False}, "gives 0 rotated dimensions. It must be at least 1"),
        ({"kv_channels": 15}, "gives 15 rotated dimensions.* needs one more"),
        ({"seq_length": None}, "`use_dynamic_ntk` is on, but `seq_length`, the trained length, is missing"),
        ({"seq_length": None, "use_dynamic_ntk": False}, "`use_logn_attn` is on, but `seq_length`"),
        ({"seq_length": 0}, "`seq_length` must be a positive number"),
        ({"seq_length": 1}, "`use_logn_attn` needs a `seq_length` of at least 2"),
        ({"window_sizes": [8]}, "`window_sizes` has 1 entries, but there are 2 layers"),
        ({"window_sizes": [8, 0]}, "`window_sizes` must hold positive numbers or None, got 0"),
        ({"window_sizes": ["wide", None]}, "window_sizes"),
        ({"intermediate_size": 111}, r"`intermediate_size` \(111\) must be even"),
        ({"num_attention_heads": 0}, "`num_attention_heads` must be a positive number"),
        ({"bf16": True, "fp32": True}, "Only one of `bf16`, `fp16` and `fp32`"),
        ({"rope_theta": 1_000_000}, "`rotary_emb_base` has two values, 10000 and 1000000"),
        ({"n_embd": 96}, "`hidden_size` has two values, 48 and 96"),
        ({"pos_emb": "alibi"}, "`pos_emb` is 'alibi', but Qwen models have 'rotary'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "`rope_scaling` is .*, but Qwen models have None"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "`rope_parameters` is .*Qwen models have"),
        ({"rope_parameters": {"rope_theta": 1_000_000}}, "`rope_parameters` is .*`rotary_emb_base`"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "`layer_types` is .* follows from `window_sizes`"),
        ({"model_type": "baichuan"}, "baichuan"),
    ],
)
def test_a_config_that_cannot_work_is_refused_with_its_field(change, complaint, tmp_path):
    config = json.loads((GOLDENS / "qwen" / "config.json").read_text()) | change
    config = {key: value for key, value in config.items() if value is not None or key == "window_sizes"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match=complaint):
        QWenConfig.from_pretrained(tmp_path)


def test_overrides_are_checked_like_the_file():
    with pytest.raises(Exception, match="`window_sizes` has 3 entries"):
        AutoConfig.from_pretrained(GOLDENS / "qwen", window_sizes=[1, 2, 3])


def test_the_originals_buffers_are_ignored(tmp_path):
    weights = load_file(GOLDENS / "qwen" / "model.safetensors")
    weights["transformer.rotary_emb.inv_freq"] = torch.full((8,), 7.0)
    for layer in range(2):
        for name, shape in {
            "rotary_emb.inv_freq": (8,),
            "logn_tensor": (1, 64, 1, 1),
            "masked_bias": (),
            "bias": (1, 1, 9, 9),
        }.items():
            weights[f"transformer.h.{layer}.attn.{name}"] = torch.full(shape, 7.0)
    shutil.copy(GOLDENS / "qwen" / "config.json", tmp_path)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    rotary = model.transformer.rotary_emb
    assert torch.equal(rotary.inv_freq, rotary.compute_inv_freq())
    ids = torch.randint(0, 151, (1, 70))
    assert torch.equal(model.eval()(ids).logits, load()(ids).logits)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_head_loads_and_trains(name):
    ids = torch.randint(1, 150, (2, 7))
    for auto_class, labels in (
        (AutoModelForSequenceClassification, torch.tensor([0, 1])),
        (AutoModelForTokenClassification, torch.zeros_like(ids)),
    ):
        model = auto_class.from_pretrained(GOLDENS / name, pad_token_id=0)
        loss = model(ids, labels=labels).loss
        loss.backward()
        assert loss.isfinite() and model.transformer.wte.weight.grad.norm() > 0


# --- bad input ----------------------------------------------------------------------------------------------------


def test_ids_and_caches_that_do_not_belong_to_the_model_are_refused(batch):
    model, ids = load(), batch[0][:1, :9]
    with pytest.raises(ValueError, match=r"input_ids\[0, 0\]` is 151"):
        model(torch.tensor([[151]]))
    other = LlamaForCausalLM(LlamaConfig(vocab_size=151, hidden_size=32, intermediate_size=16, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=4))  # fmt: skip
    with pytest.raises(ValueError, match="filled by another model"):
        model(ids, cache=other(ids, use_cache=True)[CACHE])
    with pytest.raises(ValueError, match="`prompt_lengths` holds 3 lengths, but the inputs are 1 sequences"):
        model(ids, prompt_lengths=torch.tensor([9, 9, 9]))
    with pytest.raises(ValueError, match="holds 1 sequences, but the inputs are 2"):
        model(ids[:, :1].repeat(2, 1), cache=model(ids, use_cache=True).cache)


@torch.no_grad()
def test_far_past_its_positions_a_model_works_and_warns_once_without_ntk(batch, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging.get_logger("hf_cnllm.models.qwen.modeling_qwen"), "warning", warnings.append)
    logging.get_logger("transformers").warning_once.cache_clear()
    ids = batch[0][:1].repeat(1, 5)  # 350 tokens; max_position_embeddings is 256
    assert load()(ids).logits.isfinite().all()
    assert warnings == []
    model = load(use_dynamic_ntk=False)
    cache = None
    for step in (ids, ids[:, :1], ids[:, :2]):
        outputs = model(step, cache=cache, use_cache=True)
        assert outputs.logits.isfinite().all()
        cache = outputs.cache
    assert len(warnings) == 1 and "past `max_position_embeddings` (256)" in warnings[0]


def test_pipeline_generates(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(GOLDENS.parent / "tokenizers" / "vocab" / "qwen_small")
    QWenLMHeadModel(
        QWenConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                   num_attention_heads=4, seq_length=16)
    ).save_pretrained(tmp_path)  # fmt: skip
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), max_new_tokens=4)
    assert isinstance(generator.tokenizer, QWenTokenizer)
    (out,) = generator("你好，世界，" * 9)
    assert out["generated_text"].startswith("你好，世界")
    chat = generator([{"role": "user", "content": "你好"}])[0]["generated_text"]
    assert chat[-1]["role"] == "assistant"
