"""The ChatGLM line's quantized checkpoints: the originals' numbers, the same files from `quantize`, and bad files."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, Trainer, TrainingArguments

from goldens import BACKENDS, GOLDENS, assert_close, cases_of, check_case, check_greedy, golden_cases, has_backward
from hf_cnllm.models.chatglm.quantization import ChatGLMQuantizationConfig
from hf_cnllm.models.chatglm.quantized_linear import QuantizedEmbedding, QuantizedLinear

CHATGLM2 = ("chatglm2_6b_int8", "chatglm2_6b_int4", "chatglm3_6b_int8", "chatglm3_6b_int4")
CHATGLM1 = ("chatglm_6b_3layer_int8", "chatglm_6b_3layer_int4", "chatglm_6b_3layer_int4_qe")
LINEAR = "transformer.encoder.layers.1.mlp.dense_4h_to_h"
TARGETS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]


def load(name: str, **kwargs):
    return AutoModel.from_pretrained(GOLDENS / name, **kwargs).eval()


def ids_of(name: str) -> torch.Tensor:
    return next(iter(cases_of(name).values())).inputs["input_ids"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", golden_cases(*CHATGLM2))
def test_golden(case, backend):
    check_case(load(case.golden, dtype=torch.float32, attn_implementation=backend), case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHATGLM1)
def test_golden_of_chatglm1(name, backend):
    model = load(name, dtype=torch.float32, attn_implementation=backend)
    for case in cases_of(name).values():
        inputs, outputs = case.inputs, case.outputs
        if case.name.startswith("plain"):
            with torch.set_grad_enabled(has_backward(model)):
                result = model.train()(inputs["input_ids"], labels=inputs["labels"], use_cache=False)
            assert_close(result.logits, outputs["logits"])
            assert_close(result.loss.reshape(1), outputs["loss"])
            if has_backward(model):
                model.zero_grad()
                result.loss.backward()
                parameters = dict(model.named_parameters(remove_duplicate=False))
                gradients = {key: parameters[key].grad for key in case.grad_norms}
                norms = {key: None if grad is None else grad.norm().item() for key, grad in gradients.items()}
                trained = {key: norm for key, norm in case.grad_norms.items() if norm is not None}
                assert {key for key, norm in norms.items() if norm is not None} == set(trained)
                assert {key: norms[key] for key in trained} == pytest.approx(trained, rel=1e-4, abs=2e-5)
            model.eval()
        elif case.name in ("greedy_gmask", "greedy_mask"):
            check_greedy(model, case)


@pytest.mark.parametrize("name", [*CHATGLM2, *CHATGLM1])
@torch.no_grad()
def test_dequantized_in_half_precision_is_what_the_originals_gpu_kernels_compute(name):
    case = next(iter(cases_of(name).values()))
    model = load(name)
    assert model.dtype == torch.float16 and model.config.quantization_bit
    model.dequantize().float()
    assert not any(isinstance(module, QuantizedLinear | QuantizedEmbedding) for module in model.modules())
    assert (
        not model.is_quantized
        and model.config.quantization_bit == 0
        and not hasattr(model.config, "quantization_config")
    )
    assert_close(model(case.inputs["input_ids"]).logits, case.outputs["logits_half_dequant"])


@pytest.mark.parametrize("name", [*CHATGLM2, *CHATGLM1])
def test_quantize_writes_the_originals_file(name, tmp_path):
    base, bits, embeddings = name.split("_int")[0], int(name.split("_int")[1][0]), name.endswith("_qe")
    model = load(base).half()
    assert model.quantize(bits, quantize_embeddings=embeddings) is model
    original = load_file(GOLDENS / name / "model.safetensors")
    state = model.state_dict()
    assert all("inv_freq" in key for key in original.keys() - state.keys())
    assert [key for key, tensor in state.items() if not torch.equal(tensor, original[key])] == []

    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["quantization_bit"] == bits and saved["quantization_config"]["quant_method"] == "chatglm"
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in state.items())
    with torch.no_grad():
        assert torch.equal(again(ids_of(name)).logits, model.eval()(ids_of(name)).logits)
    again.dequantize().save_pretrained(tmp_path / "float")
    floats = AutoModel.from_pretrained(tmp_path / "float")
    assert not getattr(floats, "is_quantized", False)
    assert all(torch.equal(tensor, floats.state_dict()[key]) for key, tensor in again.state_dict().items())


def test_quantizing_while_loading(tmp_path):
    config = ChatGLMQuantizationConfig(bits=4)
    model = load("chatglm2_6b", dtype=torch.float16, quantization_config=config)
    original = load_file(GOLDENS / "chatglm2_6b_int4" / "model.safetensors")
    assert all(torch.equal(tensor, original[key]) for key, tensor in model.state_dict().items())
    assert model.quantize(4) is model and model.quantize(0) is model
    with pytest.raises(ValueError, match=r"quantized already .* call model.dequantize\(\) first"):
        model.quantize(8)


@torch.no_grad()
def test_a_model_that_cannot_be_quantized_stays_as_it_was():
    model = load("chatglm2_6b", dtype=torch.float32)
    model.get_submodule(LINEAR).weight[3, 2] = float("nan")
    with pytest.raises(ValueError, match=rf"`{LINEAR}.weight` holds NaN or infinite values \(in row 3\)"):
        model.quantize(8)
    assert not any(isinstance(module, QuantizedLinear) for module in model.modules())
    assert not getattr(model, "is_quantized", False) and model.config.quantization_bit == 0
    model.get_submodule(LINEAR).weight[3, 2] = 0.0
    assert model.quantize(8).is_quantized


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@torch.no_grad()
def test_the_scripts_casts_work(dtype):
    """`from_pretrained(...).half().cuda()` and `.float()` are in every original script."""
    model = load("chatglm2_6b_int4")
    case = cases_of("chatglm2_6b_int4")["plain"]
    casts = {torch.float16: model.half, torch.float32: model.float, torch.bfloat16: model.bfloat16}
    logits = casts[dtype]()(case.inputs["input_ids"]).logits
    assert logits.dtype == dtype
    assert model.transformer.encoder.layers[0].mlp.dense_4h_to_h.weight.dtype == torch.int8
    assert_close(
        logits, case.outputs["logits"], atol={torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 2e-1}[dtype]
    )


@pytest.mark.parametrize("name", ["chatglm3_6b_int4", "chatglm_6b_3layer_int8"])
def test_lora_on_top(name, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(
        load(name, dtype=torch.float32), LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False)
    )
    ids = ids_of(name)
    model.train()(ids, labels=ids).loss.backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora" in key and p.grad.norm() > 0 for key, p in trained.items())
    logits = model.eval()(ids).logits.detach()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(name, dtype=torch.float32), tmp_path)
    assert_close(again(ids).logits, logits)
    with pytest.raises(RuntimeError):
        again.merge_and_unload()  # integers take no deltas
    again = PeftModel.from_pretrained(load(name, dtype=torch.float32), tmp_path)
    again.get_base_model().dequantize()
    merged = again.merge_and_unload()
    assert all(type(module) is nn.Linear for key, module in merged.named_modules() if key.endswith("dense"))
    assert_close(merged(ids).logits, logits)


def test_trainer_p_tunes_over_integers(tmp_path):
    model = AutoModel.from_pretrained(GOLDENS / "chatglm2_6b", pre_seq_len=4).quantize(4)
    frozen = {key: tensor.clone() for key, tensor in model.state_dict().items() if "prefix_encoder" not in key}
    ids = ids_of("chatglm2_6b_int4")
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=0.1, report_to=[], save_strategy="no", use_cpu=True
    )
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    before = model.transformer.prefix_encoder.embedding.weight.detach().clone()
    trainer.train()
    assert not torch.equal(model.transformer.prefix_encoder.embedding.weight, before)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in frozen.items())


@pytest.mark.parametrize("name", [*CHATGLM2, *CHATGLM1])
def test_saves_the_weights_it_is_given(name, tmp_path):
    """As the P-tuning trainer of the original repositories saves what was trained, megabytes beside gigabytes."""
    model = load(name, pre_seq_len=4)
    trained = {n: p.detach() for n, p in model.named_parameters() if "prefix_encoder" in n}
    model.save_pretrained(tmp_path / "some", state_dict=trained)
    model.save_pretrained(tmp_path / "positional", True, trained)
    for folder in ("some", "positional"):
        saved = load_file(tmp_path / folder / "model.safetensors")
        assert saved.keys() == trained.keys()
        assert all(torch.equal(saved[n], trained[n]) for n in saved)
    for folder, arguments in {"all": {}, "given": {"state_dict": model.state_dict()}}.items():
        model.save_pretrained(tmp_path / folder, **arguments)
    everything, given = (load_file(tmp_path / folder / "model.safetensors") for folder in ("all", "given"))
    assert everything.keys() == given.keys() > trained.keys()
    assert torch.equal(load(tmp_path / "given")(ids_of(name)).logits, model(ids_of(name)).logits)


def test_the_embeddings_and_the_head_of_a_qe_checkpoint_are_one(tmp_path):
    model = load("chatglm_6b_3layer_int4_qe")
    assert isinstance(model.transformer.word_embeddings, QuantizedEmbedding) and isinstance(
        model.lm_head, QuantizedLinear
    )
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert model.lm_head.weight_scale is model.transformer.word_embeddings.weight_scale
    model.dequantize()
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


def variant(name: str, tmp_path, config=None, tensors=None, weights="safetensors"):
    """A copy of a golden checkpoint with changed entries; None removes one."""
    values = json.loads((GOLDENS / name / "config.json").read_text()) | (config or {})
    state = load_file(GOLDENS / name / "model.safetensors")
    state = {key: tensor for key, tensor in (state | (tensors or {})).items() if tensor is not None}
    (tmp_path / "config.json").write_text(
        json.dumps({key: value for key, value in values.items() if value is not None})
    )
    if weights == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def test_the_hubs_pickled_weight_files_load(tmp_path):
    model = AutoModel.from_pretrained(variant("chatglm2_6b_int4", tmp_path, weights="bin"))
    assert all(
        torch.equal(tensor, load("chatglm2_6b_int4").state_dict()[key]) for key, tensor in model.state_dict().items()
    )


@pytest.mark.parametrize("weights", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("name", "config", "tensors", "complaint"),
    [
        ("chatglm2_6b_int4", {}, {f"{LINEAR}.weight_scale": None}, f"no `{LINEAR}.weight_scale`, which `quantization_bit` 4"),
        ("chatglm2_6b_int4", {}, {f"{LINEAR}.weight": None}, f"no `{LINEAR}.weight`"),
        ("chatglm2_6b_int4", {}, {f"{LINEAR}.weight": torch.zeros(48, 35, dtype=torch.int8)}, r"shape \(48, 35\) .* shape \(48, 36\)"),
        ("chatglm2_6b_int4", {}, {f"{LINEAR}.weight_scale": torch.zeros(47)}, r"floats of shape \(47,\) .* shape \(48,\)"),
        ("chatglm2_6b_int4", {"quantization_bit": 8}, {}, "`quantization_bit` 8 needs integers of shape"),
        ("chatglm2_6b_int8", {"quantization_bit": 4}, {}, "`quantization_bit` 4 needs integers of shape"),
        ("chatglm2_6b", {"quantization_bit": 8}, {}, "holds floats of shape .* needs integers"),
        ("chatglm2_6b_int8", {"quantization_bit": None}, {}, "holds quantized weights .* set `quantization_bit`"),
    ],
)  # fmt: skip
def test_bad_files_are_named(name, config, tensors, complaint, weights, tmp_path):
    with pytest.raises(ValueError, match=complaint):
        AutoModel.from_pretrained(variant(name, tmp_path, config, tensors, weights))


def test_other_numbers_of_bits_are_refused():
    with pytest.raises(ValueError, match="4 or 8 bits, not 3"):
        load("chatglm2_6b").quantize(3)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CHATGLM2, *CHATGLM1])
@torch.no_grad()
def test_cuda_in_half_precision(name):
    case = next(iter(cases_of(name).values()))
    model = load(name).half().cuda()
    logits = model(case.inputs["input_ids"].cuda()).logits.cpu()
    assert_close(logits, case.outputs["logits_half_dequant"], atol=2e-2)
