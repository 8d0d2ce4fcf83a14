"""Qwen v1 against the original's numbers, compiled, in training and in a pipeline."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    CompileConfig,
    StaticCache,
    pipeline,
)

from goldens import BACKENDS, GOLDENS, assert_close, cases_of, check_case, golden_cases, golden_model
from hf_cnllm import QWenConfig, QWenLMHeadModel, QWenTokenizer
from qwen_models import generate, load

CHECKPOINTS = ("qwen", "qwen_72b", "qwen_bias", "qwen_early")
BUGS_OF_THE_ORIGINAL = ("chunked_orig_bug",)


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


def test_an_odd_number_of_rotated_dimensions_is_completed_to_pairs():
    model = load(rotary_pct=0.3)  # 4.8 of 16, cut to 4
    assert model.transformer.rotary_emb.inv_freq.shape[-1] == 2
    model = load(rotary_pct=0.35)  # 5.6, cut to 5: three frequencies that turn six dimensions
    angles = torch.arange(7)[:, None] / 10_000 ** (torch.tensor([0.0, 2.0, 4.0]) / 5)
    query = torch.randn(1, 3, 7, 16)
    a, b, rest = query.split([3, 3, 10], dim=-1)
    expected = torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), rest], dim=-1)
    rotary, attention = model.transformer.rotary_emb, model.transformer.h[0].attn
    rotated = attention._rotate(query, query, *rotary(query, torch.arange(7)[None], rotary.plain_inv_freq))
    assert_close(rotated[0], expected)
    with torch.no_grad():
        assert model(torch.randint(0, 151, (1, 70))).logits.isfinite().all()


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


@pytest.mark.slow
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
