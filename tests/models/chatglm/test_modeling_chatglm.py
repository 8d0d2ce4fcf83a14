"""ChatGLM-6B against the original's numbers, and what is special to it: contexts, blanks, positions, P-tuning."""

import copy

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CompileConfig,
    DataCollatorForSeq2Seq,
    StaticCache,
    Trainer,
    TrainingArguments,
)

import hf_cnllm
from chatglm1_goldens import check_chatglm1_case
from goldens import BACKENDS, GOLDENS, assert_close, cases_of, golden_cases, golden_model
from hf_cnllm.models.chatglm import modeling_chatglm

CHECKPOINTS = ("chatglm_6b_3layer", "chatglm_6b_ptuning", "chatglm_6b_ptuning_proj")
DEEP = ("chatglm_6b", "chatglm_6b_150k")
QUANTIzED = ("chatglm_6b_3layer_int8", "chatglm_6b_3layer_int4", "chatglm_6b_3layer_int4_qe")
PTUNING = ("chatglm_6b_ptuning", "chatglm_6b_ptuning_proj")
MASK, GMASK, SMASK, BOS, PAD = 140, 141, 142, 144, 3
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
TEXTS = ([10, 11, MASK, 12, 13, BOS, 20, 21], [30, 31, GMASK, BOS, 22], [40, GMASK, 41, MASK, 42, 43, BOS, 23, 24, 25])
PROMPTS = ([10, 11, MASK, 12, 13, BOS], [30, 31, GMASK, BOS], [40, GMASK, 41, MASK, 42, 43, 44, BOS])


def load(name: str = "chatglm_6b_3layer", backend: str = "sdpa", **overrides):
    model = AutoModelForSeq2SeqLM.from_pretrained(GOLDENS / name, attn_implementation=backend, **overrides)
    return model.eval()


def batch(texts, side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, texts))
    pad = [[PAD] * (width - len(text)) for text in texts]
    rows = [p + t if side == "left" else t + p for p, t in zip(pad, map(list, texts), strict=True)]
    ids = torch.tensor(rows)
    return ids, (ids != PAD).long()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", golden_cases(*CHECKPOINTS))
def test_golden(case, backend):
    check_chatglm1_case(golden_model(AutoModelForSeq2SeqLM, case, backend), case)


def is_long(case, backend: str) -> bool:
    """Uncompiled flex attention takes 15 ms a layer and step, and here are 28 layers."""
    return backend == "flex_attention" and case.name.startswith(("decode", "greedy"))


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param(
            case, backend, id=f"{golden}-{name}-{backend}", marks=[pytest.mark.slow] if is_long(case, backend) else []
        )
        for golden in DEEP
        for name, case in cases_of(golden).items()
        for backend in BACKENDS
    ],
)
def test_golden_of_all_layers(case, backend):
    check_chatglm1_case(golden_model(AutoModelForSeq2SeqLM, case, backend), case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", golden_cases(*QUANTIzED))
def test_golden_of_quantized_checkpoints(case, backend):
    check_chatglm1_case(golden_model(AutoModelForSeq2SeqLM, case, backend, dtype=torch.float32), case)


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM])
def test_every_door_gives_the_generation_model_under_its_original_name(auto_class, tmp_path):
    model = auto_class.from_pretrained(GOLDENS / "chatglm_6b_3layer")
    assert type(model) is modeling_chatglm.ChatGLMForConditionalGeneration
    assert isinstance(model, hf_cnllm.ChatGLMForConditionalGeneration) and model.can_generate()
    model.save_pretrained(tmp_path)
    assert model.config.architectures == ["ChatGLMForConditionalGeneration"]
    assert type(auto_class.from_pretrained(tmp_path)) is type(model)


# Contexts, blanks and positions


def positions_of(text: list[int], **overrides) -> list:
    model = load(**overrides)
    return model.positions_of_prompt(torch.tensor([text]), None, check=True)[0].tolist()


@pytest.mark.parametrize(
    ("text", "position", "block"),
    [
        ([10, 11, GMASK, BOS, 20, 21], [0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]),
        ([10, MASK, 11, 12, BOS, 20], [0, 1, 2, 3, 1, 1], [0, 0, 0, 0, 1, 2]),
        ([SMASK, 10, 11, BOS, 20], [0, 1, 2, 0, 0], [0, 0, 0, 1, 2]),
        ([MASK, 10, GMASK, 11, BOS], [0, 1, 2, 3, 2], [0, 0, 0, 0, 1]),  # [gMASK] is preferred
        ([SMASK, 10, MASK, BOS], [0, 1, 2, 2], [0, 0, 0, 1]),
        ([10, MASK, 11, MASK, BOS], [0, 1, 2, 3, 1], [0, 0, 0, 0, 1]),  # the first of its kind
    ],
)
def test_positions(text, position, block):
    assert positions_of(text, smask_token_id=SMASK) == [position, block]


def test_the_first_revision_leaves_the_start_token_where_it_is():
    text = [10, GMASK, 11, 12, BOS, 20, 21]
    assert positions_of(text, early_positions=True)[0] == [0, 1, 2, 3, 4, 1, 1]
    assert positions_of([10, MASK, 11, 12, BOS], early_positions=True)[0] == [0, 1, 2, 3, 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["chatglm_6b_3layer", "chatglm_6b_ptuning"])
@pytest.mark.parametrize("two_rows", [True, False])
@torch.no_grad()
def test_padded_batches_give_the_logits_of_their_rows(name, backend, two_rows):
    model = load(name, backend, position_encoding_2d=two_rows)
    for side in ("left", "right"):
        ids, mask = batch(TEXTS, side)
        logits = model(ids, attention_mask=mask).logits
        for row, text in enumerate(TEXTS):
            assert_close(logits[row][mask[row] == 1], model(torch.tensor([text])).logits[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["chatglm_6b_3layer", "chatglm_6b_ptuning"])
@torch.no_grad()
def test_packed_texts_give_the_logits_of_each_alone(name, backend):
    model = load(name, backend)
    packed = torch.tensor([[token for text in TEXTS for token in text] + [PAD]])
    documents = torch.tensor([[number for number, text in enumerate(TEXTS, 1) for _ in text] + [0]])
    logits = model(packed, attention_mask=documents, use_cache=False).logits[0]
    for number, text in enumerate(TEXTS, 1):
        assert_close(logits[documents[0] == number], model(torch.tensor([text])).logits[0])


@torch.no_grad()
def test_the_context_sees_all_of_itself_and_the_answer_does_not_see_ahead():
    model = load()
    text = torch.tensor([TEXTS[0]])
    changed_context, changed_answer = text.clone(), text.clone()
    changed_context[0, 4], changed_answer[0, 7] = 50, 50
    before, context, answer = (model(ids).logits[0] for ids in (text, changed_context, changed_answer))
    assert ((before - context).abs().amax(-1) > 1e-3).all()
    assert torch.equal(before[:7], answer[:7]) and not torch.equal(before[7], answer[7])


@torch.no_grad()
def test_a_generated_mask_token_does_not_move_the_blank():
    model = load()
    prompt = torch.tensor([PROMPTS[0]])
    plain = model.positions_of_prompt(torch.cat([prompt, torch.tensor([[60, 61]])], 1), None, check=False)
    for token in (GMASK, BOS):
        generated = torch.cat([prompt, torch.tensor([[token, 61]])], dim=1)
        assert torch.equal(model.positions_of_prompt(generated, None, check=False), plain)
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[GMASK] = model.transformer(prompt).last_hidden_state[0, -1]
    assert GMASK in model.generate(prompt, **GREEDY)[0, prompt.shape[1] :]
    assert torch.equal(model.generate(prompt, **GREEDY), model.generate(prompt, use_cache=False, **GREEDY))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ([10, 11, GMASK], r"row 0 of `input_ids` has no start token \(bos_token_id=144\)"),
        ([10, 11, BOS], r"has no mask token \(gmask_token_id=141, mask_token_id=140\) before the start token"),
        ([10, GMASK, BOS, 11, BOS], "has more than one start token"),
        ([10, GMASK, BOS, MASK], "has a mask token .* after the start token"),
        ([10, BOS, GMASK], "has a mask token .* after the start token"),
    ],
)
def test_malformed_prompts_are_named(text, complaint):
    model, ids = load(), torch.tensor([text])
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=complaint):
            call(ids)
    explicit = torch.tensor([[list(range(len(text))), [0] * len(text)]])
    assert (
        model(ids, position_ids=explicit).logits.isfinite().all()
    )  # whoever says where everything is may do as he likes


def test_positions_of_the_wrong_shape_are_named():
    model, ids = load(), torch.tensor([PROMPTS[0]])
    for wrong in (torch.arange(1, 7)[None], torch.zeros(1, 2, 5, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"`position_ids` has shape .*, but must be \(1, 2, 6\)"):
            model(ids, position_ids=wrong)
    with pytest.raises(ValueError, match="`inputs_embeds` do not tell where the context ends"):
        model(inputs_embeds=model.transformer.word_embeddings(ids))
    with pytest.raises(ValueError, match=r"needs `bos_token_id` and at least one of `gmask_token_id`"):
        load(gmask_token_id=None, mask_token_id=None)(ids)


@torch.no_grad()
def test_the_attention_implementation_can_be_changed():
    model, ids = load(), torch.tensor([TEXTS[0]])
    expected = model(ids).logits
    for backend in BACKENDS:
        model.set_attn_implementation(backend)
        assert model.config._attn_implementation == backend
        assert_close(model(ids).logits, expected)


def test_an_attention_function_that_knows_no_prefix_is_refused():
    AttentionInterface.register("my_attention", lambda *args, **kwargs: None)
    model = load()
    model.set_attn_implementation("my_attention")
    with pytest.raises(ValueError, match="no prefix-LM form here and would silently be causal"):
        model(torch.tensor([PROMPTS[0]]))


# Generation


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["chatglm_6b_3layer", *PTUNING])
@torch.no_grad()
def test_batches_generate_as_their_rows_do_with_every_cache(name, backend):
    model = load(name, backend)
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
    for assistant in ({"assistant_model": copy.deepcopy(model)}, {"prompt_lookup_num_tokens": 3}):
        prompt = torch.tensor([PROMPTS[0]])
        assert torch.equal(model.generate(prompt, **assistant, **GREEDY), model.generate(prompt, **GREEDY))


@torch.no_grad()
def test_generation_from_embeddings_and_positions():
    model, prompt = load(), torch.tensor([PROMPTS[2]])
    expected = model.generate(prompt, **GREEDY)[:, prompt.shape[1] :]
    positions = model.positions_of_prompt(prompt, None, check=True)
    assert torch.equal(model.generate(prompt, position_ids=positions, **GREEDY)[:, prompt.shape[1] :], expected)
    embeddings = model.transformer.word_embeddings(prompt)
    assert torch.equal(model.generate(inputs_embeds=embeddings, position_ids=positions, **GREEDY), expected)


def test_a_prefill_in_chunks_is_refused():
    with pytest.raises(ValueError, match="`prefill_chunk_size` is not possible here"):
        load().generate(torch.tensor([PROMPTS[0]]), prefill_chunk_size=2, **GREEDY)


def test_positions_of_a_row_that_a_collator_packed_part_its_texts():
    model, packed = load(), torch.tensor([[token for text in TEXTS for token in text]])
    positions = torch.tensor([[place for text in TEXTS for place in range(len(text))]])
    numbers = torch.tensor([[number for number, text in enumerate(TEXTS, start=1) for _ in text]])
    with torch.no_grad():
        expected = model(packed, attention_mask=numbers, use_cache=False).logits
        assert torch.equal(model(packed, position_ids=positions, use_cache=False).logits, expected)
        with pytest.raises(ValueError, match="`position_ids` has shape"):  # counts from 1
            model(packed, position_ids=positions + 1, use_cache=False)


@pytest.mark.parametrize("two_rows", [True, False])
def test_continuous_batching_is_refused(two_rows):
    with pytest.raises(ValueError, match=r"generate_batch.* has no place for the prefix of a prefix language model"):
        load(position_encoding_2d=two_rows).generate_batch(inputs=[PROMPTS[0], PROMPTS[1]])


@pytest.mark.compiled
@pytest.mark.slow
@pytest.mark.parametrize("name", ["chatglm_6b_3layer", "chatglm_6b_ptuning"])
def test_generate_with_a_compiled_static_cache(name):
    model = load(name)
    ids, mask = batch(PROMPTS)
    expected = model.generate(ids, attention_mask=mask, **GREEDY)
    compiled = CompileConfig(backend="aot_eager", fullgraph=True)
    compiled._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": compiled}
    with torch._dynamo.config.patch(error_on_recompile=True):
        generated = model.generate(ids, attention_mask=mask, **static, **GREEDY)
    assert torch.equal(generated, expected)


# Training


def test_gradient_checkpointing_has_the_same_gradients():
    ids, mask = batch(TEXTS)
    for name in ("chatglm_6b_3layer", "chatglm_6b_ptuning"):
        gradients = []
        for checkpointing in (False, True):
            model = load(name).train()
            if checkpointing:
                model.gradient_checkpointing_enable()
            model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
            gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
        assert gradients[0] and gradients[0].keys() == gradients[1].keys()
        for key, gradient in gradients[0].items():
            assert_close(gradients[1][key], gradient, atol=1e-6)


def test_trainer_p_tunes_in_batches_of_the_tokenizer(tmp_path):
    """As the original's script: prompt + answer + end, padded, labels on the answer alone."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDENS.parent / "tokenizers" / "vocab" / "chatglm1_small")
    config = hf_cnllm.ChatGLMConfig(
        architecture="chatglm", vocab_size=len(tokenizer), hidden_size=32, inner_hidden_size=48, num_layers=2,
        num_attention_heads=4, pre_seq_len=3, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, mask_token_id=tokenizer.mask_token_id,
        gmask_token_id=tokenizer.convert_tokens_to_ids("[gMASK]"),
    )  # fmt: skip
    model = hf_cnllm.ChatGLMForConditionalGeneration(config)
    rows = []
    for question, answer in (("你好", "世界"), ("一加一等于几？", "二")):
        prompt = tokenizer(question)["input_ids"]
        answer = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    frozen = {key: p.clone() for key, p in model.named_parameters() if not p.requires_grad}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=0.1, report_to=[], save_strategy="no", use_cpu=True,
        per_device_train_batch_size=2,
    )  # fmt: skip
    before = model.transformer.prefix_encoder.embedding.weight.detach().clone()
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    Trainer(model, arguments, train_dataset=rows, data_collator=collator).train()
    assert not torch.equal(model.transformer.prefix_encoder.embedding.weight, before)
    parameters = dict(model.named_parameters())
    assert frozen and all(torch.equal(parameters[key], weight) for key, weight in frozen.items())


def test_peft_prefix_tuning_works_on_the_backbone(tmp_path):
    torch.manual_seed(0)
    tuned = get_peft_model(load(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    ids, mask = batch(TEXTS)
    tuned.train()(ids, attention_mask=mask, labels=ids).loss.backward()
    assert tuned.prompt_encoder["default"].embedding.weight.grad.norm() > 0
    tuned.eval()
    logits = tuned(ids, attention_mask=mask).logits
    for row, text in enumerate(TEXTS):
        assert_close(tuned(torch.tensor([text])).logits[0], logits[row][mask[row] == 1].detach())
    ids, mask = batch(PROMPTS)
    generated = tuned.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    for row, text in enumerate(PROMPTS):
        alone = torch.tensor([text])
        for _ in range(GREEDY["max_new_tokens"]):
            alone = torch.cat([alone, tuned(alone).logits[:, -1:].argmax(-1)], dim=1)
        assert generated[row, ids.shape[1] :].tolist() == alone[0, len(text) :].tolist()
    tuned.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"start token has block position 5 .* Leave `position_ids` out"):
        tuned(ids, attention_mask=mask, position_ids=load().positions_of_prompt(ids, mask, check=True))
    again = PeftModel.from_pretrained(load(), tmp_path)
    assert_close(again(ids, attention_mask=mask).logits, tuned(ids, attention_mask=mask).logits.detach())


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_classifier_reads_the_last_real_token(side):
    model = AutoModelForSequenceClassification.from_pretrained(GOLDENS / "chatglm_6b_3layer", num_labels=3).eval()
    ids, mask = batch(TEXTS, side)
    logits = model(ids, attention_mask=mask).logits
    for row, text in enumerate(TEXTS):
        assert_close(logits[row : row + 1], model(torch.tensor([text])).logits.detach())


# --- the head is the embedding, as the old library's default had it ---------------------------------------------------


def make_tied(**overrides):
    config = AutoConfig.from_pretrained(GOLDENS / "chatglm_6b_3layer", **overrides)
    torch.manual_seed(0)
    return AutoModel.from_config(config)


def test_the_head_is_the_embedding_unless_told_otherwise(tmp_path):
    model = make_tied()
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    model.save_pretrained(tmp_path)
    for kept in (
        "transformer.word_embeddings.weight",
        "lm_head.weight",
    ):  # published files hold one of the two or both
        weights = load_file(tmp_path / "model.safetensors")
        matrix = weights.pop("lm_head.weight", weights.pop("transformer.word_embeddings.weight", None))
        weights.pop("transformer.word_embeddings.weight", None)
        save_file(weights | {kept: matrix.clone()}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert loaded.lm_head.weight is loaded.transformer.word_embeddings.weight
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    untied = make_tied(tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.transformer.word_embeddings.weight


def test_a_file_with_two_matrices_stays_untied(tmp_path):
    model = AutoModel.from_pretrained(GOLDENS / "chatglm_6b_3layer")
    assert not model.config.tie_word_embeddings
    assert not torch.equal(model.lm_head.weight, model.transformer.word_embeddings.weight)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert not again.config.tie_word_embeddings
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert torch.equal(again.transformer.word_embeddings.weight, model.transformer.word_embeddings.weight)


def test_p_tuning_of_a_tied_model_trains_the_prefix_alone(tmp_path):
    make_tied().save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, pre_seq_len=4)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"transformer.prefix_encoder.embedding.weight"}


def test_the_trained_length_can_be_set_by_its_common_name():
    for name, field in (("chatglm_6b_3layer", "max_sequence_length"), ("chatglm2_6b", "seq_length")):
        config = AutoConfig.from_pretrained(GOLDENS / name)
        config.max_position_embeddings = 77
        assert getattr(config, field) == 77
        assert AutoConfig.from_pretrained(GOLDENS / name, max_position_embeddings=78).max_position_embeddings == 78
