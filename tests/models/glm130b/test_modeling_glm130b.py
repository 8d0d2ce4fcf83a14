"""GLM-130B against the original's numbers, and what is special to it: kinds of blanks, positions, half precision."""

import copy
import json
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMultipleChoice, AutoModelForSeq2SeqLM

import hf_cnllm
from goldens import BACKENDS, GOLDENS, assert_close, cases_of, golden_cases, has_backward
from hf_cnllm._compat import CACHE
from hf_cnllm.data.infilling import fill_in_turn
from hf_cnllm.models.chatglm.quantization import quantize
from hf_cnllm.models.glm130b import GLM130BConfig, GLM130BForConditionalGeneration, GLM130BForMultipleChoice

GOLDEN, TOLERANCE = "glm130b", 1e-4
MASK, GMASK, SMASK, SOP, EOP, EOS = 150, 151, 152, 154, 155, 22
TOKENS = {"mask_token_id": MASK, "gmask_token_id": GMASK, "smask_token_id": SMASK, "bos_token_id": SOP}
TOKENS |= {"eos_token_id": EOP, "text_end_token_id": EOS, "pad_token_id": 0}
NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
NO_END = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
TEXTS = ([10, 11, MASK, 12, 13, SOP, 20, 21], [30, 31, GMASK, SOP, 22], [40, SMASK, 41, 42, GMASK, 43, SOP, 23, 24])


def load(backend: str = "sdpa", auto_class=AutoModelForSeq2SeqLM, **overrides):
    config = GLM130BConfig.from_pretrained(GOLDENS / GOLDEN, **TOKENS | NO_DROPOUT | overrides)
    return auto_class.from_pretrained(GOLDENS / GOLDEN, config=config, attn_implementation=backend).eval()


@pytest.fixture(scope="module", params=BACKENDS)
def model(request):
    return load(request.param)


def batch(texts, side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, texts))
    pad = [[0] * (width - len(text)) for text in texts]
    rows = [p + t if side == "left" else t + p for p, t in zip(pad, map(list, texts), strict=True)]
    ids = torch.tensor(rows)
    return ids, (ids != 0).long()


def case_named(name: str):
    return cases_of(GOLDEN)[name]


FORWARD = [
    param
    for param in golden_cases(GOLDEN)
    if "logits" in param.values[0].outputs
    and "fp16" not in param.values[0].name
    and "prefill" not in param.values[0].raw
]


@pytest.mark.parametrize("case", FORWARD)
@torch.no_grad()
def test_golden(model, case):
    """With the original's positions and mask, and with nothing but the ids."""
    inputs, outputs = case.inputs, case.outputs
    ids, real = inputs["input_ids"], inputs.get("real")
    if case.name == "multiple_choice":
        real = (~inputs["built_attention_mask"]).any(dim=-1)[:, 0]  # its padding sees nothing
    built = {"position_ids": inputs["built_position_ids"], "attention_mask": ~inputs["built_attention_mask"]}
    ways = [built] if case.name in ("big_positions", "multiple_choice") else [built, {"attention_mask": real}]
    for given in ways:
        result = model(ids, **given, labels=inputs.get("labels"), output_hidden_states=True)
        assert_close(result.logits, outputs["logits"], real, TOLERANCE)
        for index, hidden in enumerate(result.hidden_states):
            if f"hidden_{index}" in outputs:
                assert_close(hidden, outputs[f"hidden_{index}"], atol=TOLERANCE)
        if "loss" in outputs:
            assert_close(result.loss.reshape(1), outputs["loss"], atol=TOLERANCE)


@pytest.mark.parametrize("case", [param for param in golden_cases(GOLDEN) if param.values[0].grad_norms])
def test_golden_gradients(model, case):
    if not has_backward(model):
        pytest.skip("torch has no backward pass of flex attention on a CPU")
    model.zero_grad()
    result = model.train()(case.inputs["input_ids"], labels=case.inputs["labels"])
    result.loss.backward()
    model.eval()
    assert_close(result.logits, case.outputs["train_logits"], atol=TOLERANCE)
    assert_close(result.loss.reshape(1), case.outputs["train_loss"], atol=TOLERANCE)
    norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert norms == pytest.approx(case.grad_norms, rel=1e-4, abs=TOLERANCE)


@pytest.mark.parametrize("name", ["decode_infill_mask", "decode_gen_gmask"])
@torch.no_grad()
def test_golden_decode(model, name):
    case = case_named(name)
    ids, positions, prefill = (
        case.inputs["input_ids"],
        case.inputs["built_position_ids"],
        case.raw["inputs"]["prefill"],
    )
    for stops in (range(prefill + 1, ids.shape[1] + 1), [ids.shape[1]]):
        result = model(ids[:, :prefill], use_cache=True)
        logits, start = [result.logits], prefill
        for stop in stops:
            step = {"position_ids": positions[:, start:stop], "cache": result.cache, "use_cache": True}
            result = model(ids[:, start:stop], **step)
            logits.append(result.logits)
            start = stop
        assert_close(torch.cat(logits, dim=1), case.outputs["logits"], atol=TOLERANCE)


@pytest.mark.parametrize("name", ["greedy_mask", "greedy_smask", "greedy_gmask"])
@pytest.mark.parametrize(
    "variant", [{}, {"use_cache": False}, {"cache_implementation": "static", "disable_compile": True}]
)
def test_golden_greedy(model, name, variant):
    case = case_named(name)
    sequences = model.generate(
        case.inputs["input_ids"], max_new_tokens=case.raw["max_new_tokens"], **NO_END, **variant
    )
    assert sequences.tolist() == case.outputs["sequences"].tolist()


@pytest.mark.parametrize("variant", [{}, {"use_cache": False}])
def test_golden_beams(model, variant):
    """All are of one length here, so that the original's penalty, which counts the prompt, leaves them in their order."""
    case = case_named("beam_reference")
    ids, beams = case.inputs["input_ids"], case.outputs["beams"]
    options = {"num_beams": len(beams), "num_return_sequences": len(beams), **NO_END, **variant}
    assert model.generate(ids, max_new_tokens=len(beams[0]) - ids.shape[1], **options).tolist() == beams


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["padded_batch_mask", "padded_batch_gmask"])
def test_golden_padded_generation(model, name, side):
    """The original pads on the right and writes behind the pads."""
    case = case_named(name)
    ids, real = case.inputs["input_ids"], case.inputs["real"]
    if side == "left":
        ids, real = batch([row[kept != 0].tolist() for row, kept in zip(ids, real, strict=True)])
    options = {"max_new_tokens": case.raw["max_new_tokens"], **NO_END}
    sequences = model.generate(ids, attention_mask=real, **options)
    assert torch.equal(sequences[:, : ids.shape[1]], ids)
    assert sequences[:, ids.shape[1] :].tolist() == case.outputs["answers"].tolist()


@pytest.mark.parametrize("padded", ["at first", "later"])
def test_a_cache_goes_on_with_padding_on_the_left_alone(padded):
    model, prompts = load(), [text[: text.index(SOP) + 1] for text in TEXTS]
    ids, mask = batch(prompts if padded == "at first" else prompts[:1], "right")
    output = model.generate(ids, attention_mask=mask, max_new_tokens=3, return_dict_in_generate=True, **NO_END)
    more, cache = (0, 3 if padded == "at first" else 2), getattr(output, CACHE)
    mask = F.pad(F.pad(mask, more, value=1), (0, 3 - more[1]))
    with pytest.raises(ValueError, match="to go on with a cache, pad on the left"):
        model.generate(output.sequences, attention_mask=mask, cache=cache, max_new_tokens=3, **NO_END)


def test_golden_fill_blanks():
    """Texts there are ids with blanks between; an answer is cut where the original's `out_seq_length` ends it."""
    case, model = case_named("fill_blanks"), load()
    names = {"[MASK]": MASK, "[sMASK]": SMASK, "[gMASK]": GMASK}
    for fill in case.outputs["fills"]:
        context = [names.get(word) or int(word) for word in fill["text"].split()]
        if not set(names) & set(fill["text"].split()):
            context.append(GMASK)
        if not fill["text"].endswith("MASK]") and context[-1] != GMASK:
            context.append(EOS)
        room = case.inputs["out_seq_length"] - len(context) - 1
        filled = fill_in_turn(model, context, do_sample=False, max_new_tokens=room)
        assert " ".join(map(str, filled if filled[-1] != EOS else filled[:-1])) == fill["answers"][0]


@pytest.mark.parametrize("name", ["multiple_choice", "multiple_choice_single"])
@torch.no_grad()
def test_golden_multiple_choice(name):
    case, model = case_named(name), load(auto_class=AutoModelForMultipleChoice)
    assert type(model) is GLM130BForMultipleChoice
    choices = case.raw["inputs"]["choices"]
    places = case.raw["inputs"].get("choice_target_ids") or [[10]] * len(choices)
    built = {"position_ids": case.inputs["built_position_ids"], "attention_mask": ~case.inputs["built_attention_mask"]}
    result = model(case.inputs["input_ids"], **built, choice_ids=[choices], choice_indices=[places])
    assert_close(result.logits[0], case.outputs["log_probs"], atol=TOLERANCE)


@pytest.mark.parametrize("name", ["gen_gmask_fp16", "big_positions_fp16"])
@torch.no_grad()
def test_golden_half_precision(model, name):
    """Nearer to the original's than rounding takes that from its own fp32; at large positions that is ten times as far."""
    case = case_named(name)
    half = GLM130BForConditionalGeneration(model.config).half().eval()
    half.load_state_dict(model.state_dict())
    built = {"position_ids": case.inputs["built_position_ids"], "attention_mask": ~case.inputs["built_attention_mask"]}
    result = half(case.inputs["input_ids"], **built)
    assert result.logits.dtype == torch.float16
    assert_close(result.logits, case.outputs["logits"], atol=case.raw["vs_fp32"])


@torch.no_grad()
def test_golden_half_precision_token_by_token(model):
    """A decoding step, which has no mask, rounds its scores as a whole pass does."""
    case = case_named("gen_gmask_fp16")
    half = GLM130BForConditionalGeneration(model.config).half().eval()
    half.load_state_dict(model.state_dict())
    ids = case.inputs["input_ids"]
    start = ids[0].tolist().index(SOP) + 1
    result = half(ids[:, :start], use_cache=True)
    logits = [result.logits]
    for position in range(start, ids.shape[1]):
        step = {"position_ids": case.inputs["built_position_ids"][:, position : position + 1], "cache": result.cache}
        result = half(ids[:, position : position + 1], **step, use_cache=True)
        logits.append(result.logits)
    assert_close(torch.cat(logits, dim=1), case.outputs["logits"], atol=case.raw["vs_fp32"])
    assert_close(torch.cat(logits, dim=1), half(ids).logits.float(), atol=case.raw["vs_fp32"] / 2)


def test_row_parallel_layers_add_the_bias_to_the_rounded_product():
    """In every copy of a model, by a layer of the class that quantization looks for."""
    half, ids = load().half(), torch.tensor([TEXTS[0]])
    torch.manual_seed(0)
    for name, linear in half.named_modules():
        if name.endswith(("attention.dense", "mlp.dense_4h_to_h")):
            torch.nn.init.normal_(linear.bias)
    layers = half.transformer.layers
    replicas = [
        linear._replicate_for_data_parallel() for linear in (layers[0].attention.dense, layers[0].mlp.dense_4h_to_h)
    ]
    for replica in replicas:  # as DataParallel makes them
        replica.weight = torch.randn(replica.out_features, replica.in_features).half() / 10
        replica.bias = torch.randn(replica.out_features).half()
    with torch.no_grad():
        for copied in (copy.deepcopy(half), pickle.loads(pickle.dumps(half))):
            assert torch.equal(copied(ids).logits, half(ids).logits)
        dequantized = quantize(copied, 8).dequantize().transformer.layers[1]
    for linear in (layers[0].attention.dense, layers[0].mlp.dense_4h_to_h, dequantized.attention.dense, *replicas):
        states, plain = torch.randn(64, linear.in_features).half(), torch.nn.Linear(1, 1)
        plain.weight, plain.bias = (torch.nn.Parameter(tensor) for tensor in (linear.weight, linear.bias))
        assert type(linear) is torch.nn.Linear
        product = torch.nn.functional.linear(states, linear.weight)
        assert torch.equal(linear(states), product + linear.bias)
        assert_close(linear(states), plain(states), atol=0.02)
        assert linear in replicas or not torch.equal(linear(states), plain(states))


@torch.no_grad()
def test_padded_batches_in_half_precision(model):
    half = GLM130BForConditionalGeneration(model.config).half().eval()
    half.load_state_dict(model.state_dict())
    ids, mask = batch(TEXTS)
    logits = half(ids, attention_mask=mask).logits
    for row, text in enumerate(TEXTS):
        assert_close(logits[row][mask[row] == 1], half(torch.tensor([text])).logits[0], atol=0.02)


def test_golden_rotary_table():
    case, rotary = case_named("rope_table"), load().transformer.rotary_emb
    rows = torch.tensor(case.raw["inputs"]["rows"])[None, None]
    for dtype, name in ((torch.float32, "fp32"), (torch.float16, "fp16")):
        for table, values in zip(("cos", "sin"), rotary(torch.zeros(1, dtype=dtype), rows), strict=True):
            assert torch.equal(values[0, :, 0, 0, 0], case.outputs[f"{table}_{name}"])


# ---- the doors ----


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM])
def test_every_door_gives_the_generation_model(auto_class, tmp_path):
    model = auto_class.from_config(load().config)
    assert type(model) is hf_cnllm.GLM130BForConditionalGeneration and model.can_generate()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "glm130b"
    again = auto_class.from_pretrained(tmp_path)
    assert type(again) is type(model) and again.lm_head.weight is again.transformer.word_embeddings.weight
    assert again.generation_config.eos_token_id == [EOP, EOS]


def test_configuration_of_the_release():
    config = GLM130BConfig()
    sizes = (config.num_layers, config.hidden_size, config.num_attention_heads, config.inner_hidden_size)
    assert sizes == (70, 12288, 96, 32768) and config.head_dim == 128
    assert (config.mask_token_id, config.gmask_token_id, config.smask_token_id) == (150000, 150001, 150002)
    assert (config.bos_token_id, config.eos_token_id, config.text_end_token_id) == (150004, 150005, 20002)
    keys = json.loads((GOLDENS / GOLDEN / "config.json").read_text())
    small = GLM130BConfig.from_pretrained(GOLDENS / GOLDEN)
    assert {key: getattr(small, key) for key in keys} == keys
    assert type(small) is type(AutoConfig.from_pretrained(GOLDENS / GOLDEN))
    with pytest.raises(
        StrictDataclassClassValidationError, match=r"`hidden_size` .* is not a multiple of `num_attention_heads`"
    ):
        GLM130BConfig(hidden_size=100)


# ---- contexts, blanks and positions ----


@pytest.mark.parametrize(
    ("text", "positions"),
    [
        ([10, 11, GMASK, SOP, 20, 21], [0, 1, 2, 3, 4, 5]),
        ([10, MASK, 11, 12, SOP, 20], [0, 1, 2, 3, 1, 1]),
        ([10, 11, SMASK, SOP, 20], [0, 1, 2, 2, 2]),
        ([GMASK, 10, MASK, 11, SOP, 20], [0, 1, 2, 3, 2, 2]),  # [MASK] comes before [gMASK]
        ([GMASK, SMASK, 10, SOP, 20], [0, 1, 2, 1, 1]),
        ([SMASK, 10, MASK, SOP], [0, 1, 2, 2]),
        ([10, MASK, 11, MASK, SOP], [0, 1, 2, 3, 1]),  # the first of its kind
    ],
)
def test_positions(text, positions):
    assert load().positions_of_prompt(torch.tensor([text]), None, check=True)[0].tolist() == [positions]


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_batches_give_the_logits_of_their_rows(model, side):
    ids, mask = batch(TEXTS, side)
    logits = model(ids, attention_mask=mask).logits
    for row, text in enumerate(TEXTS):
        assert_close(logits[row][mask[row] == 1], model(torch.tensor([text])).logits[0])


@torch.no_grad()
def test_a_mask_and_positions_say_everything():
    """Then neither ids of control tokens nor ids at all are needed."""
    case, model = case_named("infill_mask"), load(**dict.fromkeys(TOKENS))
    built = {"position_ids": case.inputs["built_position_ids"], "attention_mask": ~case.inputs["built_attention_mask"]}
    embeds = model.get_input_embeddings()(case.inputs["input_ids"])
    for inputs in ({"input_ids": case.inputs["input_ids"]}, {"inputs_embeds": embeds}):
        assert_close(model(**inputs, **built).logits, case.outputs["logits"], atol=TOLERANCE)
    with pytest.raises(ValueError, match="the configuration needs `bos_token_id` and at least one of"):
        model(case.inputs["input_ids"])


def test_dropout_is_the_configurations():
    model = load(hidden_dropout=0.5, attention_dropout=0.5)
    ids = torch.tensor([TEXTS[0]])
    with torch.no_grad():
        kept = model(ids).logits
        assert not torch.equal(model.train()(ids).logits, kept)
        assert torch.equal(model.eval()(ids).logits, kept)


def test_infill_fills_kind_by_kind():
    """[MASK]s first, then [sMASK], then [gMASK], each in the text as it is then."""
    model, seen = load(), []

    def generate(input_ids, **kwargs):
        seen.append(input_ids[0].tolist())
        return torch.cat([input_ids, torch.tensor([[70 + len(seen), EOP]])], dim=1)

    model.generate = generate
    text = [GMASK, 10, MASK, 11, SMASK, 12, MASK, EOS]
    assert fill_in_turn(model, text) == [74, 10, 71, 11, 73, 12, 72, EOS]
    assert seen[1] == [GMASK, 10, 71, 11, SMASK, 12, MASK, EOS, SOP] and len(seen) == 4
    model.generate = lambda input_ids, **kwargs: SimpleNamespace(sequences=input_ids)
    assert fill_in_turn(model, [10, MASK]) == [10]


@torch.no_grad()
def test_positions_of_a_row_that_a_collator_packed_part_its_texts():
    model, packed = load(), torch.tensor([[token for text in TEXTS for token in text]])
    positions = torch.tensor([[place for text in TEXTS for place in range(len(text))]])
    logits = model(packed, position_ids=positions, use_cache=False).logits
    start = 0
    for text in TEXTS:
        assert_close(logits[:, start : start + len(text)], model(torch.tensor([text])).logits, atol=TOLERANCE)
        start += len(text)
    text, own = torch.tensor([[MASK, SOP, 20, 21]]), torch.zeros(1, 4, dtype=torch.long)
    assert torch.equal(model.positions_of_prompt(text, None)[:, 0], own)  # these part nothing
    assert_close(model(text, position_ids=own).logits, model(text).logits, atol=TOLERANCE)
