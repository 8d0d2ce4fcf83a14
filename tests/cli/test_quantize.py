"""`hf-cnllm quantize`: what is saved loads again with the same answers, or nothing is written."""

import json

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_cnllm.cli import USER_ERROR, main, quantize

PROMPT_ENDS = {"chatglm": (1745, 1748)}  # [gMASK]<sop>


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["chatglm", "chatglm2", "chatglm3"])
def test_chatglm_in_its_own_format(family, bits, tiny, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["quantize", str(tiny(family)), str(output), "--bits", str(bits)]) == 0
    assert f"in {bits} bits by chatglm" in capsys.readouterr().out
    assert json.loads((output / "config.json").read_text())["quantization_bit"] == bits
    expected = AutoModelForCausalLM.from_pretrained(tiny(family)).quantize(bits).eval()
    found = AutoModelForCausalLM.from_pretrained(output).eval()
    ids = torch.tensor([[*range(20, 40), *PROMPT_ENDS.get(family, ())]])
    assert torch.equal(found(ids).logits, expected(ids).logits)
    text = "今天天气很好"
    both = [AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for folder in (output, tiny(family))]
    assert both[0] == both[1]
    assert main(["verify", str(output)]) == 0


def test_the_generation_config_is_carried_along(tiny, tmp_path, monkeypatch):
    """Baichuan's, by way of a stand-in for a method that saves floats."""
    monkeypatch.setitem(quantize.METHODS, "bitsandbytes", lambda bits, dtype: None)
    monkeypatch.setattr(quantize, "linear_layers", lambda model: {})
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: object())
    assert main(["quantize", str(tiny("baichuan")), str(tmp_path / "out"), "--bits", "8"]) == 0
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.top_k, generation.user_token_id) == (5, 195)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "bits"), [("bitsandbytes", 4), ("bitsandbytes", 8), ("torchao", 8)])
@pytest.mark.parametrize("family", ["baichuan", "qwen", "glm", "chatglm", "chatglm2", "chatglm3"])
def test_every_family_by_a_library(family, method, bits, tiny, tmp_path, capsys):
    pytest.importorskip(method, reason="the lane `quantized` installs it")
    output = tmp_path / "out"
    words = [str(tiny(family)), str(output), "--bits", str(bits), "--method", method]
    assert main(["quantize", *words]) == 0
    assert f"in {bits} bits by {method}" in capsys.readouterr().out
    auto_class = transformers.AutoModelForSeq2SeqLM if family == "glm" else AutoModelForCausalLM
    found, floats = (auto_class.from_pretrained(folder).eval() for folder in (output, tiny(family)))
    assert found.config.quantization_config.quant_method == method
    sizes = (sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (output, tiny(family)))
    assert next(sizes) < next(sizes)
    if bits == 8:
        inputs = AutoTokenizer.from_pretrained(output)("今天天气很好[gMASK]", return_tensors="pt")
        if family == "glm":
            inputs = AutoTokenizer.from_pretrained(output).build_inputs_for_generation(inputs, targets=["。"])
        inputs = {name: inputs[name] for name in ("input_ids", "position_ids") if name in inputs}
        with torch.no_grad():
            logits, wanted = found(**inputs).logits.float(), floats(**inputs).logits.float()
        assert 0 < (logits - wanted).abs().max() < 0.1 * wanted.abs().max()
    assert main(["verify", str(output)]) == 0


@pytest.mark.slow
def test_layers_that_a_library_passes_over_are_told_and_nothing_is_written(tiny, tmp_path, capsys):
    """torchao's INT4 needs widths that 128 divides, and skips the others in silence."""
    pytest.importorskip("torchao", reason="the lane `quantized` installs it")
    said = refused([tiny("baichuan"), tmp_path / "out", "--bits", 4, "--method", "torchao"], capsys)
    assert "torchao leaves 20 of 21 linear layers as they are, the first model.layers.0." in said
    assert not list(tmp_path.iterdir())


def refused(words, capsys):
    assert main(["quantize", *map(str, words)]) == USER_ERROR
    return capsys.readouterr().err.splitlines()[-1]


def test_what_cannot_be_done_is_one_line_and_writes_nothing(tiny, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: None)
    assert "pip install bitsandbytes" in refused([tiny("qwen"), output, "--bits", 4], capsys)
    assert "ChatGLM's own format" in refused([tiny("qwen"), output, "--bits", 4, "--method", "chatglm"], capsys)
    assert "there is no folder /nowhere" in refused(["/nowhere", output, "--bits", 4], capsys)
    output.mkdir()
    (output / "mine").touch()
    assert "is not empty" in refused([tiny("chatglm2"), output, "--bits", 4], capsys)
    assert [file.name for file in tmp_path.rglob("*")] == ["out", "mine"]


def test_a_reward_model_is_no_language_model(tiny, tmp_path, capsys):
    judge = str(tmp_path / "judge")
    AutoModelForSequenceClassification.from_pretrained(tiny("chatglm2"), num_labels=1).save_pretrained(judge)
    said = f"MODEL: {judge} is a ChatGLMForSequenceClassification"
    assert said in refused([judge, tmp_path / "out", "--bits", 8], capsys)
    assert main(["chat", judge]) == USER_ERROR and said in capsys.readouterr().err


def test_a_quantized_checkpoint_is_refused(tiny, tmp_path, capsys):
    assert main(["quantize", str(tiny("chatglm2")), str(tmp_path / "first"), "--bits", "8"]) == 0
    assert "quantized already" in refused([tmp_path / "first", tmp_path / "out", "--bits", 4], capsys)


def test_a_library_that_fails_is_one_line_and_nothing_stays(tiny, tmp_path, capsys, monkeypatch):
    def fails(self, folder, *args, **kwargs):
        (folder / "half").touch()
        raise NotImplementedError("this kernel\n is not here")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fails)
    said = refused([tiny("chatglm2"), tmp_path / "out", "--bits", 4], capsys)
    assert said.endswith(
        "chatglm cannot quantize this checkpoint to 4 bits and save it on this machine: this kernel is not here"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["weights", "tokenizer.json"])
def test_a_full_disk_is_one_line_and_nothing_stays(what, tiny, tmp_path, capsys, files_up_to, monkeypatch):
    """The libraries behind the two have errors of their own, which were taken for mistakes of the program."""
    if what == "tokenizer.json":
        monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", lambda *_, **__: None)
    words = ["quantize", str(tiny("chatglm3")), str(tmp_path / "out"), "--bits", "8"]
    with files_up_to(10_000):
        assert main(words) == USER_ERROR
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"writing into {tmp_path / 'out'} failed, is the disk full?" in said and not list(tmp_path.iterdir())


def test_damaged_weights_are_not_quantized(tiny, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(tiny("chatglm2"))
    with torch.no_grad():
        model.transformer.encoder.layers[0].mlp.dense_4h_to_h.weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "damaged")
    AutoTokenizer.from_pretrained(tiny("chatglm2")).save_pretrained(tmp_path / "damaged")
    assert "NaN or infinite" in refused([tmp_path / "damaged", tmp_path / "out", "--bits", 4], capsys)
    assert not (tmp_path / "out").exists()
