"""The original GLM against the original's numbers, and what is special to it: blanks, spans, learned positions."""

import copy
import json

import pytest
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForSeq2SeqLM,
    CompileConfig,
    GlmConfig,
    StaticCache,
)

import hf_cnllm
from goldens import BACKENDS, GOLDENS, assert_close, cases_of, golden_cases, has_backward
from hf_cnllm.models.glm import GLMConfig, GLMForConditionalGeneration, GLMForMultipleChoice, GLMModel

MASK, SOP, EOP, SMASK, GMASK = 5, 6, 7, 8, 9
TOKENS = {"mask_token_id": MASK, "sop_token_id": SOP, "eop_token_id": EOP, "smask_token_id": SMASK}
TOKENS |= {"gmask_token_id": GMASK, "pad_token_id": 0}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
TEXTS = ([10, 11, MASK, 12, 13, SOP, 20, 21], [30, 31, GMASK, SOP, 22], [40, SMASK, 41, 42, MASK, 43, SOP, 23, 24])
PROMPTS = ([10, 11, MASK, 12, 13, SOP], [30, 31, GMASK, SOP], [40, SMASK, 41, 42, MASK, 43, 44, SOP])


def load(backend: str = "sdpa", auto_class=AutoModelForSeq2SeqLM, **overrides):
    return auto_class.from_pretrained(GOLDENS / "glm", attn_implementation=backend, **TOKENS | overrides).eval()


def batch(texts, side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, texts))
    pad = [[0] * (width - len(text)) for text in texts]
    rows = [p + t if side == "left" else t + p for p, t in zip(pad, map(list, texts), strict=True)]
    ids = torch.tensor(rows)
    return ids, (ids != 0).long()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", golden_cases("glm", skip=("decode", "greedy", "multiple_choice")))
def test_golden(case, backend):
    model, inputs, outputs = load(backend, **case.config_overrides), case.inputs, case.outputs
    given = {key: inputs[key] for key in ("input_ids", "attention_mask", "position_ids") if key in inputs}
    real = inputs["attention_mask"][:, 0].any(dim=-1) if case.name == "full_mask" else None  # rows that see nothing
    with torch.no_grad():
        result = model(**given, labels=inputs.get("labels"), output_hidden_states=True)
    assert_close(result.logits, outputs["logits"], real)
    if "loss" in outputs:
        assert_close(result.loss.reshape(1), outputs["loss"])
    for index, hidden in enumerate(
        result.hidden_states[:-1]
    ):  # the last is after the final norm, the original's before
        if f"mem_{index}" in outputs:
            assert_close(hidden, outputs[f"mem_{index}"])
    if "last_hidden" in outputs:
        assert_close(result.hidden_states[-1], outputs["last_hidden"])
    if case.grad_norms and has_backward(model):
        no_dropout = {key: 0.0 for key in vars(model.config) if key.endswith("_dropout_prob")}
        model = load(backend, **no_dropout).train()
        loss = model(**given, labels=inputs["labels"]).loss
        assert_close(loss.reshape(1), outputs["train_loss"])
        loss.backward()
        norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
        assert norms == pytest.approx(case.grad_norms, rel=1e-4, abs=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_golden_decode(backend):
    model, case = load(backend), cases_of("glm")["decode"]
    ids, positions, prefill = (case.inputs[key] for key in ("input_ids", "position_ids", "prefill"))
    for stops in (range(prefill + 1, ids.shape[1] + 1), [ids.shape[1]]):
        sep = torch.tensor([case.inputs["sep"]])
        result = model(ids[:, :prefill], attention_mask=sep, position_ids=positions[..., :prefill], use_cache=True)
        logits, start = [result.logits], prefill
        for stop in stops:
            result = model(
                ids[:, start:stop],
                position_ids=positions[..., start:stop],
                cache=result.cache,
                use_cache=True,
            )
            logits.append(result.logits)
            start = stop
        assert_close(torch.cat(logits, dim=1), case.outputs["logits"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", [{}, {"use_cache": False}])
def test_golden_greedy(backend, variant):
    case = cases_of("glm")["greedy"]
    result = load(backend).generate(
        **case.inputs, **GREEDY | {"max_new_tokens": 16}, **variant, output_logits=True, return_dict_in_generate=True
    )
    assert result.sequences.tolist() == case.outputs["sequences"].tolist()
    assert_close(torch.stack(result.logits, dim=1), case.outputs["scores"])


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_golden_multiple_choice(backend):
    case, model = cases_of("glm")["multiple_choice"], load(backend, AutoModelForMultipleChoice)
    assert type(model) is GLMForMultipleChoice
    choices = {"choice_ids": [[[11, 12], [13, 14]]] * 2, "choice_indices": [[[13, 14], [13, 14]]] * 2}
    result = model(**case.inputs, **choices)
    assert_close(result.logits, case.outputs["logits"])
    assert_close(result.loss.reshape(1), case.outputs["loss"])


# The doors


def test_the_generation_model_keeps_the_originals_names(tmp_path):
    model = load()
    assert type(model) is GLMForConditionalGeneration
    assert model.lm_head.weight is model.glm.word_embeddings.weight
    model.save_pretrained(tmp_path)
    original, saved = load_file(GOLDENS / "glm" / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert saved.keys() == original.keys() and all(torch.equal(saved[key], original[key]) for key in saved)
    assert type(AutoModelForSeq2SeqLM.from_pretrained(tmp_path)) is type(copy.deepcopy(model)) is type(model)


def test_the_backbone_loads_from_the_whole_checkpoint():
    backbone, info = GLMModel.from_pretrained(GOLDENS / "glm", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.arange(10, 17)[None]
    assert torch.equal(backbone.eval()(ids).last_hidden_state, load().glm(ids).last_hidden_state)
    assert type(AutoModel.from_pretrained(GOLDENS / "glm")) is GLMModel


def test_glm_4_of_the_same_model_type_stays_transformers_own(tmp_path):
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    config = GlmConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0, eos_token_id=1)
    transformers.GlmForCausalLM(config).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is GlmConfig
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is transformers.GlmForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is transformers.GlmModel
    assert type(AutoConfig.from_pretrained(GOLDENS / "glm")) is GLMConfig


def test_a_checkpoint_of_the_chinese_vocabulary_knows_its_control_tokens(tmp_path):
    values = json.loads((GOLDENS / "glm" / "config.json").read_text()) | {"vocab_size": 50048}
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.sop_token_id, config.eop_token_id, config.mask_token_id) == (50006, 50007, 50003)
    assert config.eos_token_id == 50007 and config.pad_token_id == 50000


# Contexts and positions


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_batches_give_the_logits_of_their_rows(side, backend):
    model = load(backend)
    ids, mask = batch(TEXTS, side)
    logits = model(ids, attention_mask=mask).logits
    positions = model.positions_of_prompt(ids, mask, check=True)
    assert_close(model(ids, attention_mask=mask, position_ids=positions).logits, logits, mask)
    for row, text in enumerate(TEXTS):
        alone = torch.tensor([text])
        context = torch.tensor([text.index(SOP)])
        positions = model.positions_of_prompt(alone, None, check=True)
        assert_close(logits[row][mask[row] == 1], model(alone, attention_mask=torch.ones_like(alone)).logits[0])
        expected = model(alone, attention_mask=context, position_ids=positions).logits[0]
        assert_close(logits[row][mask[row] == 1], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_packed_texts_give_the_logits_of_each_alone(backend):
    model = load(backend)
    packed = torch.tensor([[token for text in TEXTS for token in text] + [0]])
    documents = torch.tensor([[number for number, text in enumerate(TEXTS, 1) for _ in text] + [0]])
    logits = model(packed, attention_mask=documents, use_cache=False).logits[0]
    for number, text in enumerate(TEXTS, 1):
        alone = torch.tensor([text])
        assert_close(logits[documents[0] == number], model(alone, attention_mask=torch.ones_like(alone)).logits[0])


@torch.no_grad()
def test_without_block_positions_there_is_one_row():
    model = load(block_position_encoding=False)
    ids = torch.tensor([TEXTS[0]])
    positions = model.positions_of_prompt(ids, None, check=True)
    assert positions.tolist() == [[[0, 1, 2, 3, 4, 2, 2, 2]]]
    context = torch.tensor([5])
    logits = model(ids, attention_mask=context, position_ids=positions).logits
    assert_close(model(ids, attention_mask=context, position_ids=positions[:, 0]).logits, logits)
    assert_close(model(ids, attention_mask=torch.ones_like(ids)).logits, logits)
    cache = model(ids[:, :5], attention_mask=context, position_ids=positions[..., :5], use_cache=True).cache
    rest = model(ids[:, 5:], position_ids=positions[..., 5:], cache=cache).logits
    assert_close(rest, logits[:, 5:])
    mask = torch.ones_like(ids)
    assert_close(model(ids, attention_mask=mask, position_ids=positions).logits, logits)
    prompt = ids[:, :6]
    expected = prompt
    for _ in range(GREEDY["max_new_tokens"]):
        positions = model.positions_of_prompt(expected, None, check=False)
        step = model(expected, attention_mask=context, position_ids=positions).logits[:, -1:].argmax(-1)
        expected = torch.cat([expected, step], dim=1)
    assert torch.equal(model.generate(prompt, **GREEDY), expected)


def test_texts_longer_than_the_table_of_positions_are_refused():
    model = load()
    assert model(torch.full((1, 65), 20)).logits.shape[1] == 65
    with pytest.raises(
        ValueError, match=r"has position 65, but the learned positions end at `max_sequence_length` = 64"
    ):
        model(torch.full((1, 66), 20))
    prompt = torch.tensor([[20] * 60 + [MASK, SOP]])
    with pytest.raises(ValueError, match="the text is too long: it has position 65"):  # the block position, 1 at SOP
        model.generate(prompt, **GREEDY | {"max_new_tokens": 66})


@pytest.mark.parametrize(
    ("inputs", "complaint"),
    [
        ({"attention_mask": torch.ones(1, 2, 3)}, r"`attention_mask` has shape \(1, 2, 3\), but must be"),
        ({"attention_mask": torch.full((1, 1, 6, 6), -1e9)}, "must be 0/1 or bool here, .* not additive"),
        ({"position_ids": torch.ones(1, 6, dtype=torch.long)}, r"but must be \(1, 2, 6\)"),
    ],
)
def test_bad_masks_and_positions_are_named(inputs, complaint):
    with pytest.raises(ValueError, match=complaint):
        load()(torch.tensor([PROMPTS[0]]), **inputs)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ([10, 11, MASK], r"has no start token \(sop_token_id=6\)"),
        ([10, 11, SOP], "has no mask token .* before the start token"),
        ([10, MASK, SOP, 11, SOP], "has more than one start token"),
        ([10, MASK, SOP, SMASK], "has a mask token .* after the start token"),
    ],
)
def test_malformed_prompts_are_named(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        load().generate(torch.tensor([text]))


@torch.no_grad()
def test_a_text_behind_a_cache_is_a_whole_one_or_has_positions():
    model = load()
    ids = torch.tensor([TEXTS[0]])
    cache = model(ids, attention_mask=torch.ones_like(ids), use_cache=True).cache
    with pytest.raises(ValueError, match=r"has no start token .* Or pass 2-row `position_ids`"):
        model(torch.tensor([[22]]), attention_mask=torch.ones(1, 9, dtype=torch.long), cache=cache)


def test_without_control_tokens_positions_must_be_given():
    model = load(**dict.fromkeys(TOKENS))
    ids = torch.tensor([PROMPTS[0]])
    with pytest.raises(ValueError, match="the configuration needs `sop_token_id` and at least one of"):
        model(ids, attention_mask=torch.ones_like(ids))


# Generation and training


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_batches_generate_as_their_rows_do_with_every_cache(backend):
    model = load(backend)
    ids, mask = batch(PROMPTS)
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    for row, text in enumerate(PROMPTS):
        alone = model.generate(torch.tensor([text]), **GREEDY)
        assert expected[row, ids.shape[1] :].tolist() == alone[0, len(text) :].tolist()
    for variant in (
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"cache": StaticCache(config=model.config, max_cache_len=40)},
    ):
        assert torch.equal(model.generate(ids, attention_mask=mask, **variant, **GREEDY), expected), variant
    beams = {"num_beams": 3, "attention_mask": mask}
    assert torch.equal(model.generate(ids, **beams, **GREEDY), model.generate(ids, use_cache=False, **beams, **GREEDY))


def test_a_generation_mask_that_is_too_short_is_named():
    case = cases_of("glm")["greedy"]
    with pytest.raises(ValueError, match=r"`generation_attention_mask` ends .* tokens before the text does"):
        load().generate(**case.inputs, **GREEDY | {"max_new_tokens": 40})


def test_positions_of_a_row_that_a_collator_packed_part_its_texts():
    model, packed = load(), torch.tensor([[token for text in TEXTS for token in text]])
    positions = torch.tensor([[place for text in TEXTS for place in range(len(text))]])
    numbers = torch.tensor([[number for number, text in enumerate(TEXTS, start=1) for _ in text]])
    with torch.no_grad():
        expected = model(packed, attention_mask=numbers, use_cache=False).logits
        assert torch.equal(model(packed, position_ids=positions, use_cache=False).logits, expected)
        with pytest.raises(ValueError, match="`position_ids` has shape"):  # counts from 1
            model(packed, position_ids=positions + 1, use_cache=False)


def test_continuous_batching_is_refused():
    with pytest.raises(ValueError, match=r"generate_batch.* has no place for the prefix of a prefix language model"):
        load().generate_batch(inputs=[PROMPTS[0]])


@torch.no_grad()
def test_the_attention_implementation_can_be_changed():
    model, (ids, mask) = load(), batch(TEXTS)
    expected = model(ids, attention_mask=mask).logits
    for backend in BACKENDS:
        model.set_attn_implementation(backend)
        assert model.config._attn_implementation == backend
        assert_close(model(ids, attention_mask=mask).logits, expected, mask)


@pytest.mark.compiled
@pytest.mark.slow
def test_generate_with_a_compiled_static_cache():
    model = load()
    ids, mask = batch(PROMPTS)
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    compiled = CompileConfig(backend="aot_eager", fullgraph=True)
    compiled._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": compiled}
    with torch._dynamo.config.patch(error_on_recompile=True):
        generated = model.generate(ids, attention_mask=mask, **static, **GREEDY)
    assert torch.equal(generated, expected)


@pytest.mark.compiled
@torch.no_grad()
def test_a_padded_batch_compiles_without_a_graph_break():
    model = load()
    ids, mask = batch(TEXTS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    real = mask.bool()
    inputs = {"attention_mask": mask, "use_cache": False}
    assert_close(compiled(ids, **inputs).logits[real], model(ids, **inputs).logits[real])


def test_gradient_checkpointing_has_the_same_gradients():
    ids, mask = batch(TEXTS)
    gradients = []
    for checkpointing in (False, True):
        model = load(embedding_dropout_prob=0.0, attention_dropout_prob=0.0, output_dropout_prob=0.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    for key, gradient in gradients[0].items():
        assert_close(gradients[1][key], gradient, atol=1e-6)


@torch.no_grad()
def test_dropout_is_in_training_only():
    ids = torch.tensor([TEXTS[0]])
    model = load()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_new_weights_start_as_in_megatron():
    torch.manual_seed(0)
    model = GLMForConditionalGeneration(GLMConfig(vocab_size=99, hidden_size=64, num_layers=8, num_attention_heads=4))
    layer = model.glm.transformer.layers[3]
    for weight, std in ((layer.attention.query_key_value.weight, 0.02), (layer.attention.dense.weight, 0.005),
                        (layer.mlp.dense_h_to_4h.weight, 0.02), (layer.mlp.dense_4h_to_h.weight, 0.005)):  # fmt: skip
        assert weight.std().item() == pytest.approx(std, rel=0.1)


def test_lora_and_peft_prefix_tuning():
    torch.manual_seed(0)
    ids, mask = batch(TEXTS)
    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    for config in (lora, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)):
        tuned = get_peft_model(load(), config)
        tuned.train()(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        assert all(p.grad.norm() > 0 for p in tuned.parameters() if p.requires_grad)
        tuned.eval()
        prompts, prompts_mask = batch(PROMPTS)
        generated = tuned.generate(input_ids=prompts, attention_mask=prompts_mask, **GREEDY)
        for row, text in enumerate(PROMPTS):
            alone = torch.tensor([text])
            for _ in range(GREEDY["max_new_tokens"]):
                logits = tuned(input_ids=alone, attention_mask=torch.ones_like(alone)).logits
                alone = torch.cat([alone, logits[:, -1:].argmax(-1)], dim=1)
            assert generated[row, prompts.shape[1] :].tolist() == alone[0, len(text) :].tolist()


def test_multiple_choice_asks_for_its_choices():
    model = load(auto_class=AutoModelForMultipleChoice)
    assert isinstance(model, hf_cnllm.GLMForMultipleChoice)
    ids, context = torch.tensor([TEXTS[0]]), torch.tensor([5])
    with pytest.raises(ValueError, match="pass `choice_ids` and `choice_indices`"):
        model(ids, attention_mask=context)
    uneven = {"choice_ids": [[[11], [12]], [[13]]], "choice_indices": [[[6], [6]], [[6]]]}
    with pytest.raises(ValueError, match=r"same number of choices, not \[1, 2\]"):
        model(ids.expand(2, -1), attention_mask=context.expand(2), **uneven)
    fitting = {"choice_ids": [[[11], [12]]], "choice_indices": [[[6], [6]]]}
    assert model(ids, attention_mask=context, use_cache=True, **fitting).logits.shape == (1, 2)
    outside = {"choice_ids": [[[11, 12]]], "choice_indices": [[[6]]]}
    with pytest.raises(ValueError, match="`choice_indices` has 1 places for a choice of 2 tokens"):
        model(ids, attention_mask=context, **outside)


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(
    "field",
    ["vocab_size", "hidden_size", "num_layers", "num_attention_heads", "max_sequence_length", "loss_chunk_size"],
)
def test_sizes_that_are_none_are_named(field, value):
    with pytest.raises(Exception, match=rf"`{field}` must be a positive number, got {value}"):
        GLMConfig(**{field: value})
    with pytest.raises(Exception, match=r"`hidden_size` \(1024\) is not a multiple of `num_attention_heads` \(7\)"):
        GLMConfig(num_attention_heads=7)
