"""Baichuan against the original's numbers, and the features of the Hugging Face stack on both of its architectures."""

import shutil

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    pipeline,
)

from goldens import BACKENDS, GOLDENS, assert_close, cases_of, check_case, golden_cases, golden_model
from hf_cnllm import BaichuanConfig, BaiChuanForCausalLM, BaichuanForCausalLM, BaichuanTokenizer
from hf_cnllm.attention import alibi
from hf_cnllm.attention.alibi import alibi_slopes
from hf_cnllm.attention.reference import alibi_bias_reference

CHECKPOINTS = ("baichuan_7b", "baichuan_13b", "baichuan2_7b", "baichuan2_13b")
SPECIAL_CASES = ("alibi", "normhead_eval", "normhead_eval_train_eval")


def load(name: str, backend: str = "sdpa", **overrides):
    return AutoModelForCausalLM.from_pretrained(GOLDENS / name, attn_implementation=backend, **overrides)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", golden_cases(*CHECKPOINTS, skip=SPECIAL_CASES))
def test_golden(case, backend):
    check_case(golden_model(AutoModelForCausalLM, case, backend), case)


@pytest.mark.parametrize("case", golden_cases("baichuan_13b", "baichuan2_13b", skip=SPECIAL_CASES))
def test_golden_with_short_prompts_folded_too(case, monkeypatch):
    monkeypatch.setattr(alibi, "DENSE_PAIRS", 1)
    check_case(golden_model(AutoModelForCausalLM, case, "sdpa"), case)


@pytest.mark.compiled
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles flex attention for CPUs with g++")
@pytest.mark.parametrize(
    ("name", "cases"),
    [("baichuan2_7b", ("plain", "decode_left_padded")), ("baichuan2_13b", ("packed", "mask3d", "decode"))],
)
def test_flex_attention_compiles_at_changing_sizes(name, cases):
    model = load(name, "flex_attention")
    for case in cases:
        check_case(model, cases_of(name)[case])


@pytest.mark.parametrize("name", ["baichuan_13b", "baichuan2_13b"])
def test_golden_alibi_slopes(name):
    outputs = cases_of(name)["alibi"].outputs
    for heads, key in ((5, "slopes"), (12, "slopes_12"), (32, "slopes_32"), (40, "slopes_40")):
        assert_close(alibi_slopes(heads), outputs[key].flatten(), atol=1e-7)
    # The original's buffer is slope * j; ours is relative, which softmax cannot tell apart.
    positions = torch.arange(8)
    visible = positions[None, :] <= positions[:, None]
    original = outputs["future_mask_8"].reshape(5, 8, 8)
    relative = alibi_bias_reference(alibi_slopes(5), 8, 8)
    difference = (original - relative).masked_fill(~visible, torch.nan)
    constant_along_rows = difference.nan_to_num().sum(-1) / visible.sum(-1)
    assert_close(
        torch.where(visible, difference - constant_along_rows[..., None], 0.0), torch.zeros(5, 8, 8), atol=1e-6
    )
    assert (original[:, ~visible] <= -1e29).all()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_head_loads_and_trains(name):
    ids = torch.randint(10, 90, (2, 7))
    for auto_class, labels in (
        (AutoModelForSequenceClassification, {"labels": torch.tensor([0, 1])}),
        (AutoModelForTokenClassification, {"labels": torch.zeros_like(ids)}),
        (
            AutoModelForQuestionAnswering,
            {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
        ),
    ):
        model = auto_class.from_pretrained(GOLDENS / name)
        loss = model(ids, **labels).loss
        loss.backward()
        assert loss.isfinite() and model.model.embed_tokens.weight.grad.norm() > 0


def test_the_spelling_of_baichuan_7b():
    model = BaiChuanForCausalLM.from_pretrained(GOLDENS / "baichuan_7b")
    assert isinstance(model, BaichuanForCausalLM) and model.config.position_embedding == "rope"


@pytest.mark.parametrize("name", ["baichuan_7b", "baichuan2_13b"])
@torch.no_grad()
def test_document_numbers_in_the_mask(name):
    """A mask of document numbers packs on both architectures, decoding included."""
    model = load(name).eval()
    ids = torch.randint(10, 90, (1, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2]])
    packed = model(ids, attention_mask=mask).logits
    assert_close(packed[:, :4], model(ids[:, :4]).logits)
    alone = model(ids[:, 4:]).logits
    assert_close(packed[:, 4:], alone)
    prefill = model(ids[:, :8], attention_mask=mask[:, :8], use_cache=True)
    last = model(ids[:, 8:], attention_mask=mask, cache=prefill.cache)
    assert_close(last.logits, alone[:, -1:])


@torch.no_grad()
def test_fully_masked_rows_stay_finite():
    for name in CHECKPOINTS:
        for backend in BACKENDS:
            ids = torch.randint(10, 90, (2, 5))
            mask = torch.ones_like(ids)
            mask[1] = 0
            logits = load(name, backend).eval()(ids, attention_mask=mask).logits
            assert logits.isfinite().all(), (name, backend)


def mask_with_fully_masked_rows(kind: str, length: int) -> torch.Tensor:
    """The first third of row 1 is padding, with documents the end of row 0 too."""
    if kind == "3-D":
        mask = torch.ones(2, length, length, dtype=torch.long)
        mask[1, : length // 3] = mask[1, :, : length // 3] = 0
        return mask
    mask = torch.ones(2, length, dtype=torch.long)
    if kind == "documents":
        mask[:, length // 2 :] = 2
        mask[0, -3:] = 0
    mask[1, : length // 3] = 0
    return mask


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in CHECKPOINTS for kind in ("padding", "documents", "3-D")
     if kind != "3-D" or "13b" in name],
)  # fmt: skip
def test_rows_that_look_nowhere_are_the_same_on_every_backend(name, kind):
    """They count in the loss: in max-z, and where the first token has a label. A kernel's own gradient there is noise."""
    ids = torch.randint(10, 90, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = mask_with_fully_masked_rows(kind, ids.shape[1])
    losses, gradients = {}, {}
    for backend in BACKENDS:
        model = load(name, backend, z_loss_weight=0.01)
        with torch.no_grad():
            losses[backend] = model(ids, attention_mask=mask, labels=ids).loss.item()
        if backend != "flex_attention":
            model.train()(ids, attention_mask=mask, labels=ids).loss.backward()
            gradients[backend] = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert losses["sdpa"] == pytest.approx(losses["eager"], abs=2e-5)
    assert losses["flex_attention"] == pytest.approx(losses["eager"], abs=2e-5)
    for key, gradient in gradients["eager"].items():
        torch.testing.assert_close(gradients["sdpa"][key], gradient, atol=1e-5, rtol=1e-3)


def test_a_mask_that_rope_cannot_follow_is_refused():
    with pytest.raises(ValueError, match=r"Pass a mask of shape \[1, 4\]"):
        load("baichuan2_7b")(torch.ones(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 4, 4))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_model_on_the_meta_device_tells_its_shapes(name):
    with torch.device("meta"):
        model = BaichuanForCausalLM(AutoConfig.from_pretrained(GOLDENS / name))
        assert model(torch.zeros(2, 5, dtype=torch.long)).logits.shape == (2, 5, model.config.vocab_size)


def test_nothing_is_left_uninitialized_by_meta_loading():
    model = load("baichuan2_7b")
    reference = BaichuanForCausalLM(model.config)
    for name, buffer in reference.named_buffers():
        assert torch.equal(buffer, dict(model.named_buffers())[name]), name


@torch.no_grad()
def test_pipeline_generates(tmp_path):
    tokenizer_files = GOLDENS.parent / "tokenizers" / "vocab" / "baichuan2_small"
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_files)
    config = BaichuanConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                            num_attention_heads=4, model_max_length=64)  # fmt: skip
    BaichuanForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), max_new_tokens=4)
    assert isinstance(generator.tokenizer, BaichuanTokenizer)
    (out,) = generator("你好，世界")
    assert out["generated_text"].startswith("你好，世界")
    chat = generator([{"role": "user", "content": "你好"}])[0]["generated_text"]
    assert chat[-1]["role"] == "assistant"


@pytest.mark.compiled
@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_static_cache_decoding_compiles_once(name):
    model = load(name).eval()
    ids = torch.randint(10, 90, (2, 7))
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    compile_config = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    compile_config._compile_all_devices = True
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = model.generate(
            ids, max_new_tokens=8, do_sample=False, eos_token_id=None, cache_implementation="static",
            compile_config=compile_config,
        )  # fmt: skip
    assert torch.equal(compiled, expected)


def continuous(model, prompts, **settings):
    settings = ContinuousBatchingConfig(**settings)
    greedily = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    results = model.generate_batch(prompts, generation_config=greedily, continuous_batching_config=settings)
    return [result.generated_tokens for result in results.values()]


@pytest.mark.parametrize("settings", [
    {"num_blocks": 16, "max_batch_tokens": 128},
    {"num_blocks": 24, "max_batch_tokens": 24, "block_size": 16},  # prompts in pieces, and shared beginnings
], ids=("whole", "pieces"))  # fmt: skip
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_continuous_batching_gives_what_generate_gives(name, backend, settings):
    model = redrawn(name, backend)
    prompts = [torch.randint(3, 90, (length,)).tolist() for length in (5, 40, 1, 31)]
    prompts.append(prompts[1][:33] + prompts[0])
    generated = [
        model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None) for ids in prompts
    ]
    expected = [ids[0, len(prompt) :].tolist() for ids, prompt in zip(generated, prompts, strict=True)]
    assert len({token for ids in expected for token in ids}) > 8  # attention has a say
    assert continuous(model, prompts, **settings) == expected


def redrawn(name, backend="sdpa"):
    """A golden's model with weights large enough for positions to decide which token comes next."""
    config = AutoConfig.from_pretrained(GOLDENS / name, model_max_length=128, initializer_range=0.3)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=backend).eval()


def test_continuous_batching_of_alibi_stays_off_flash_attention(monkeypatch):
    """Whose paged kernels have no slopes: transformers would switch to it, and it may be asked for."""
    from transformers.generation.continuous_batching import continuous_api

    for version in (2, 3):
        monkeypatch.setattr(continuous_api, f"is_flash_attn_{version}_available", lambda **options: True)
    model = redrawn("baichuan2_13b")
    assert model.config.position_embedding == "alibi"
    assert [len(ids) for ids in continuous(model, [[5, 6]], num_blocks=8, max_batch_tokens=32)] == [8]
    monkeypatch.setattr(model.config, "_attn_implementation", "flash_attention_2")
    for ask in (lambda: model.generate_batch([[5, 6]]), model.init_continuous_batching):
        with pytest.raises(ValueError, match=r"generate_batch.*no ALiBi with 'flash_attention_2': .*'sdpa'"):
            ask()
