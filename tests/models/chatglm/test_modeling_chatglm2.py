"""ChatGLM2 and ChatGLM3 against the originals' numbers, and what is special to them."""

import copy
import logging

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CompileConfig,
    ContinuousBatchingConfig,
    GenerationConfig,
    StaticCache,
    pipeline,
)

import hf_cnllm
from goldens import BACKENDS, GOLDENS, TOLERANCE, assert_close, cases_of, check_case, golden_cases, golden_model
from hf_cnllm._compat import INSTALLED
from hf_cnllm.models.chatglm import modeling_chatglm2
from hf_cnllm.models.chatglm.modeling_chatglm2 import RotaryEmbedding

CHECKPOINTS = ("chatglm2_6b", "chatglm2_6b_32k", "chatglm2_6b_mha", "chatglm3_6b", "chatglm3_6b_32k")
PTUNING = ("chatglm2_6b_ptuning", "chatglm3_6b_ptuning")
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def load(name: str, backend: str = "sdpa", **overrides):
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / name, attn_implementation=backend, **overrides)
    return model.eval()


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [0, 0, 0, 12, 13, 14, 15]])
    return ids, (ids != 0).long()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", golden_cases(*CHECKPOINTS, *PTUNING, skip=("rope_table",)))
def test_golden(case, backend):
    check_case(golden_model(AutoModelForCausalLM, case, backend), case)


@pytest.mark.parametrize("name", [*CHECKPOINTS, *PTUNING])
@torch.no_grad()
def test_golden_keys_and_values_in_the_cache(name):
    case = cases_of(name)["decode"]
    cache = load(name)(case.inputs["input_ids"], use_cache=True).cache
    for states, key in ((cache.layers[0].keys, "past_key_0"), (cache.layers[0].values, "past_value_0")):
        assert_close(states.permute(2, 0, 1, 3), case.outputs[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_golden_rotary_angles_are_fp32_in_any_dtype(dtype):
    case = cases_of("chatglm2_6b")["rope_table"]
    config = hf_cnllm.ChatGLMConfig(kv_channels=128)
    rotary = RotaryEmbedding(config).to(dtype)
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), case.inputs["rows"][None])
    assert_close(torch.stack([cos[0, :, 0, ::2], sin[0, :, 0, 1::2]], dim=-1), case.outputs["fp32"], atol=1e-6)


@torch.no_grad()
def test_casting_the_model_does_not_spoil_large_positions():
    ids, positions = torch.arange(5, 13)[None], torch.arange(9000, 9008)[None]
    expected = load("chatglm2_6b")(ids, position_ids=positions).logits
    rounded = load("chatglm2_6b").half().float()  # the scripts' `.half()`, undone: only the weights may have lost bits
    assert_close(rounded(ids, position_ids=positions).logits, expected, atol=2e-2)


@pytest.mark.parametrize(
    "auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, hf_cnllm.ChatGLMForConditionalGeneration]
)
def test_every_door_gives_the_generation_model_under_its_original_name(auto_class, tmp_path):
    model = auto_class.from_pretrained(GOLDENS / "chatglm3_6b")
    assert type(model) is modeling_chatglm2.ChatGLMForConditionalGeneration
    assert isinstance(model, hf_cnllm.ChatGLMForConditionalGeneration) and model.can_generate()
    model.save_pretrained(tmp_path)
    assert model.config.architectures == ["ChatGLMForConditionalGeneration"]
    assert type(auto_class.from_pretrained(tmp_path)) is type(model)
    assert type(copy.deepcopy(model)) is type(model)


def test_the_backbone_loads_from_the_whole_checkpoint(caplog):
    with caplog.at_level(logging.WARNING, logger="transformers"):
        backbone, info = hf_cnllm.ChatGLMModel.from_pretrained(GOLDENS / "chatglm2_6b", output_loading_info=True)
    assert type(backbone) is modeling_chatglm2.ChatGLMModel
    assert not info["missing_keys"] and not info["unexpected_keys"] and not caplog.records
    whole = load("chatglm2_6b")
    ids = torch.arange(5, 12)[None]
    assert torch.equal(backbone.eval()(ids).last_hidden_state, whole.transformer(ids).last_hidden_state)


def test_a_class_of_the_other_architecture_is_refused():
    config = hf_cnllm.ChatGLMConfig(architecture="chatglm", hidden_size=8, num_attention_heads=2, num_layers=1)
    with pytest.raises(ValueError, match="this configuration's `architecture` is 'chatglm'"):
        modeling_chatglm2.ChatGLMModel(config)

    class Other(hf_cnllm.ChatGLMModel):
        pass

    with pytest.raises(TypeError, match="must derive from the classes of one architecture"):
        Other(config)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_classifier_reads_the_last_real_token(side):
    model = AutoModelForSequenceClassification.from_pretrained(GOLDENS / "chatglm3_6b", num_labels=3).eval()
    ids, mask = left_padded()
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    logits = model(ids, attention_mask=mask).logits
    for row in range(2):
        alone = ids[row : row + 1, mask[row] == 1]
        hidden = model.transformer(alone).last_hidden_state[:, -1]
        assert_close(logits[row : row + 1], model.classifier_head(hidden).detach())
        assert_close(logits[row : row + 1], model(alone).logits.detach())
    model.train()
    model(ids, attention_mask=mask, labels=torch.tensor([0, 2])).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    # As in the original: one label is regression, float labels of several classes are several labels.
    one = AutoModelForSequenceClassification.from_pretrained(GOLDENS / "chatglm3_6b", num_labels=1).eval()
    scores = one(ids, attention_mask=mask, labels=torch.tensor([0.5, -1.0]))
    expected = torch.nn.functional.mse_loss(scores.logits.squeeze(), torch.tensor([0.5, -1.0]))
    assert_close(scores.loss, expected.detach())


def test_longer_than_the_trained_length_is_allowed_and_mentioned_once(caplog):
    model = load("chatglm2_6b")
    ids = torch.randint(5, 150, (1, 70), generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING, logger="transformers"):
        logits = model(ids).logits
        model(ids)
    assert sum("seq_length" in record.message for record in caplog.records) <= 1
    assert_close(model(ids[:, :64]).logits, logits[:, :64].detach())


def test_a_cache_of_another_batch_is_refused():
    model = load("chatglm2_6b")
    cache = model(torch.tensor([[5, 6]]), use_cache=True).cache
    with pytest.raises(ValueError, match="holds 1 sequences, but the inputs are 2"):
        model(torch.tensor([[5], [6]]), cache=cache)


def test_text_generation_pipeline(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(GOLDENS.parent / "tokenizers" / "vocab" / "chatglm3_small")
    config = hf_cnllm.ChatGLMConfig(vocab_size=len(tokenizer), hidden_size=32, ffn_hidden_size=48, kv_channels=8,
                                    num_layers=1, num_attention_heads=4)  # fmt: skip
    hf_cnllm.ChatGLMForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), max_new_tokens=4)
    (out,) = generator("你好，世界")
    assert out["generated_text"].startswith("你好，世界")
    chat = generator([{"role": "user", "content": "你好"}])[0]["generated_text"]
    assert chat[-1]["role"] == "assistant"


@pytest.mark.compiled
@pytest.mark.slow
@pytest.mark.parametrize("name", ["chatglm3_6b", "chatglm2_6b_ptuning"])
def test_generate_with_a_compiled_static_cache(name):
    model = load(name)
    ids, mask = left_padded()
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    compiled = CompileConfig(backend="aot_eager", fullgraph=True)
    compiled._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": compiled}
    with torch._dynamo.config.patch(error_on_recompile=True):
        generated = model.generate(ids, attention_mask=mask, **static, **GREEDY)
    assert torch.equal(generated, expected)


@pytest.mark.compiled
@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_compiles_at_changing_sizes():
    """With transformers' masks torch's compiler for CPUs gives up at the second batch."""
    model, reference = load("chatglm2_6b", "flex_attention"), load("chatglm2_6b")
    for batch, length in ((4, 9), (3, 7), (1, 12)):
        ids = torch.randint(5, 150, (batch, length), generator=torch.Generator().manual_seed(length))
        mask = torch.ones_like(ids)
        mask[-1, : length // 2] = 0
        expected = reference.generate(ids, attention_mask=mask, **GREEDY)
        for cache in ({}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}):
            assert torch.equal(model.generate(ids, attention_mask=mask, **cache, **GREEDY), expected), cache


# P-tuning v2


@pytest.mark.parametrize("projection", [False, True])
def test_p_tuning_trains_the_prefix_encoder_and_nothing_else(projection):
    model = load("chatglm2_6b", pre_seq_len=4, prefix_projection=projection)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".prefix_encoder." in name}
    ids, mask = left_padded()
    model.train()(ids, attention_mask=mask, labels=ids).loss.backward()
    assert all((parameter.grad is not None) == (name in trained) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PTUNING)
def test_p_tuned_batches_generate_as_their_rows_do_with_every_cache(name, backend):
    model = load(name, backend)
    ids, mask = left_padded()
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    alone = model.generate(ids[1:, 3:], **GREEDY)
    assert expected[1, 3:].tolist() == alone[0].tolist()
    for variant in (
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"cache": StaticCache(config=model.config, max_cache_len=40)},
    ):
        assert torch.equal(model.generate(ids, attention_mask=mask, **variant, **GREEDY), expected), variant
    beams = {"num_beams": 3, "attention_mask": mask}
    assert torch.equal(model.generate(ids, **beams, **GREEDY), model.generate(ids, use_cache=False, **beams, **GREEDY))
    if Version("5.18") > INSTALLED:  # crops the assistant's cache as if the learned keys were tokens
        with pytest.raises(ValueError, match="Pass a mask of shape"):
            model.generate(ids[1:, 3:], assistant_model=copy.deepcopy(model), **GREEDY)
        return
    assisted = model.generate(ids[1:, 3:], assistant_model=copy.deepcopy(model), **GREEDY)
    assert torch.equal(assisted, alone)


def test_a_static_cache_that_was_reset_gets_the_prefix_again():
    model = load("chatglm2_6b_ptuning")
    cache = StaticCache(config=model.config, max_cache_len=40)
    ids = torch.arange(5, 11)[None]
    first = model.generate(ids, cache=cache, **GREEDY)
    cache.reset()
    assert torch.equal(model.generate(ids, cache=cache, **GREEDY), first)


def test_continuous_batching_gives_greedy_ids_and_refuses_a_prefix():
    prompts = [[5, 6, 7, 8], [9, 10, 11]]
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    batching = {"inputs": prompts, "generation_config": settings, "continuous_batching_config": small}
    model = load("chatglm3_6b")
    results = model.generate_batch(**batching)
    for ids, result in zip(prompts, results.values(), strict=True):
        assert result.generated_tokens == model.generate(torch.tensor([ids]), **GREEDY)[0, len(ids) :].tolist()
    with pytest.raises(ValueError, match=r"generate_batch.* has no place for a P-tuning prefix"):
        load("chatglm2_6b_ptuning").generate_batch(**batching)


def test_packing_next_to_a_prefix_is_refused():
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(ValueError, match="packed sequences and a P-tuning prefix"):
        load("chatglm2_6b_ptuning")(torch.arange(5, 10)[None], position_ids=positions, use_cache=False)


@pytest.mark.parametrize("name", ["chatglm2_6b", "chatglm2_6b_mha"])
def test_peft_prefix_tuning_works_on_the_backbone(name, tmp_path):
    torch.manual_seed(0)
    tuned = get_peft_model(load(name), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    ids, mask = left_padded()
    tuned.train()(ids, attention_mask=mask, labels=ids).loss.backward()
    assert tuned.prompt_encoder["default"].embedding.weight.grad.norm() > 0
    tuned.eval()
    logits = tuned(ids, attention_mask=mask).logits
    assert (logits - load(name)(ids, attention_mask=mask).logits).abs().max() > 1e-3
    alone = ids[1:, 3:]
    assert_close(tuned(alone).logits, logits[1:, 3:].detach())
    generated = tuned.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    for _ in range(GREEDY["max_new_tokens"]):
        step = tuned(alone, attention_mask=torch.ones_like(alone)).logits[:, -1:].argmax(-1)
        alone = torch.cat([alone, step], dim=1)
    assert generated[1, 3:].tolist() == alone[0].tolist()
    tuned.save_pretrained(tmp_path)
    assert_close(PeftModel.from_pretrained(load(name), tmp_path)(ids, attention_mask=mask).logits, logits.detach())


def test_lora_reaches_all_linears_under_their_original_names():
    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    model = get_peft_model(load("chatglm3_6b"), LoraConfig(r=2, target_modules=targets))
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    stored = load_file(GOLDENS / "chatglm3_6b" / "model.safetensors")
    original = {name for name in stored if name.endswith(tuple(f"{target}.weight" for target in targets))}
    assert {f"{name.removeprefix('base_model.model.')}.weight" for name in adapted} == original


@torch.no_grad()
def test_hidden_states_and_attentions_are_recorded():
    output = load("chatglm3_6b", "eager")(torch.arange(5, 12)[None], output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4 and len(output.attentions) == 3
    assert_close(output.attentions[0].sum(-1), torch.ones(1, 6, 7), atol=TOLERANCE)
