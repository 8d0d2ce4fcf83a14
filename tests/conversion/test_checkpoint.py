"""`hf-cnllm export`: the same logits from transformers' own classes, and the way back to the same bits."""

import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from exportable import KINDS
from hf_cnllm.cli import main
from hf_cnllm.conversion import weights
from hf_cnllm.conversion.checkpoint import export_checkpoint, restore_checkpoint

LIBRARIES_OWN = [name for name, kind in KINDS.items() if kind.target != "baichuan"]
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "glm": "GlmForCausalLM"}
READ = Path(__file__).parent / "read_exports.py"
IDS = torch.randint(3, 250, (2, 40), generator=torch.Generator().manual_seed(1))


def logits_of(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(IDS).logits


@pytest.fixture(scope="module")
def read_without_package(exported, tmp_path_factory):
    """What a process that cannot import this package makes of every export: name -> class, logits, chat ids, text ids."""
    place = tmp_path_factory.mktemp("read")
    torch.save(IDS, place / "ids.pt")
    words = [str(place), *(str(exported(name)) for name in LIBRARIES_OWN)]
    subprocess.run([sys.executable, str(READ), *words], check=True, timeout=300)
    said = json.loads((place / "said.json").read_text())
    return {name: said[name] | {"logits": load_file(place / "logits.safetensors")[name]} for name in LIBRARIES_OWN}


@pytest.mark.parametrize("name", LIBRARIES_OWN)
def test_transformers_alone_gives_the_same_logits_and_chats(name, checkpoint, read_without_package):
    found = read_without_package[name]
    assert found["class"] == CLASSES[KINDS[name].target]
    expected = logits_of(checkpoint(name))
    # NormHead's rows are rounded to the checkpoint's dtype.
    tolerance = 2e-2 if name == "baichuan2-bf16" else 1e-5
    assert (found["logits"] - expected).abs().max() < tolerance < expected.std()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(name))
    for chat, ids in zip(found["chats"], found["chat_ids"], strict=True):
        assert ids == tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    for text, ids in found["texts"].items():
        assert ids == tokenizer(text)["input_ids"]


def test_baichuan_without_norm_head(checkpoint, exported):
    """For readers that take the head as it is: its rows have the length 1, and all but the weights is as it was."""
    head = load_file(exported("baichuan2-13b") / "model.safetensors")["lm_head.weight"]
    assert torch.allclose(head.norm(dim=-1), torch.ones(len(head)))
    both = [
        json.loads((folder / "config.json").read_text())
        for folder in (checkpoint("baichuan2-13b"), exported("baichuan2-13b"))
    ]
    assert both[0].pop("max_position_embeddings") is None and both[0] == both[1]  # llama.cpp reads no null
    assert (logits_of(exported("baichuan2-13b")) - logits_of(checkpoint("baichuan2-13b"))).abs().max() < 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_there_and_back_is_the_same_bits(name, checkpoint, exported, tmp_path, monkeypatch):
    """In shards too small for what belongs together, and every other file as it was."""
    export = exported(name)  # others read it too, as one file
    monkeypatch.setattr(weights, "SHARD_SIZE", 20_000)
    assert restore_checkpoint(export, tmp_path / "back") is None
    assert (tmp_path / "back" / "model.safetensors.index.json").is_file()
    back = {k: v for file in (tmp_path / "back").glob("*.safetensors") for k, v in load_file(file).items()}
    original = load_file(checkpoint(name) / "model.safetensors")
    assert back.keys() == original.keys()
    assert all(back[key].dtype == original[key].dtype and torch.equal(back[key], original[key]) for key in original)
    assert torch.equal(logits_of(tmp_path / "back"), logits_of(checkpoint(name)))
    for file in checkpoint(name).iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("name", ["baichuan2-bf16", "chatglm2-32k", "qwen"])
def test_dtypes_and_layout(name, exported):
    stored = load_file(exported(name) / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {KINDS[name].dtype}
    config = json.loads((exported(name) / "config.json").read_text())
    assert config["dtype"] == str(KINDS[name].dtype).removeprefix("torch.")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]  # older readers look there


def test_pickles_in_shards_with_buffers(checkpoint, tmp_path):
    """The Hub's older layout: `pytorch_model-*.bin`, Baichuan-7B's stored buffers among them."""
    source = tmp_path / "source"
    source.mkdir()
    for file in checkpoint("baichuan").iterdir():
        if file.suffix != ".safetensors":
            (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(checkpoint("baichuan") / "model.safetensors")
    tensors |= {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(4) for i in range(2)}
    names = list(tensors)
    files = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, some in files.items():
        torch.save({name: tensors[name] for name in some}, source / file)
    index = {"weight_map": {name: file for file, some in files.items() for name in some}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    export_checkpoint(source, tmp_path / "out", "llama")
    assert not any("inv_freq" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    assert torch.equal(logits_of(tmp_path / "out"), logits_of(checkpoint("baichuan")))
    restore_checkpoint(tmp_path / "out", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys() and all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_a_head_that_was_trained_since_stays_trained(exported, tmp_path):
    trained = tmp_path / "trained"
    model = AutoModelForCausalLM.from_pretrained(exported("baichuan2"))
    with torch.no_grad():
        model.lm_head.weight[7] *= 2
        model.model.layers[0].mlp.up_proj.weight += 0.1
    model.save_pretrained(trained)
    with pytest.raises(FileNotFoundError, match="copy that folder there"):
        restore_checkpoint(trained, tmp_path / "back")
    shutil.copytree(exported("baichuan2") / "original", trained / "original")
    assert "`norm_head` false" in restore_checkpoint(trained, tmp_path / "back")
    assert (logits_of(tmp_path / "back") - logits_of(trained)).abs().max() < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path / "back")("你好")["input_ids"]
    assert main(["verify", str(tmp_path / "back")]) == 0


def test_generation_settings_come_along(checkpoint, exported, tmp_path):
    settings = {"do_sample": True, "top_k": 5, "user_token_id": 195, "eos_token_id": 2}
    source = tmp_path / "source"
    shutil.copytree(checkpoint("qwen"), source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    settings["eos_token_id"] = tokenizer.eod_id
    (source / "generation_config.json").write_text(json.dumps(settings))
    export_checkpoint(source, tmp_path / "out", "qwen2")
    found = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (found.do_sample, found.top_k, found.user_token_id) == (True, 5, 195)
    assert found.eos_token_id == [tokenizer.eod_id, tokenizer.im_end_id, tokenizer.im_start_id]  # where chats end
    both = GenerationConfig.from_pretrained(exported("chatglm3")).eos_token_id
    assert {AutoTokenizer.from_pretrained(checkpoint("chatglm3")).get_command("<|user|>")} < set(both)


def test_what_is_lost_is_said(checkpoint, tmp_path, capsys):
    assert main(["export", str(checkpoint("qwen")), str(tmp_path / "out"), "--to", "qwen2"]) == 0
    assert "no dynamic NTK and no LogN attention" in (said := capsys.readouterr().out) and "2048 tokens" in said
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 2048
    assert main(["export", str(checkpoint("qwen-72b")), str(tmp_path / "out72"), "--to", "qwen2"]) == 0
    assert "note" not in capsys.readouterr().out
    assert json.loads((tmp_path / "out72" / "config.json").read_text())["rope_theta"] == 1e6


def test_one_shard_at_a_time(checkpoint, tmp_path, monkeypatch):
    """When a shard is read nothing of those before is in memory."""
    monkeypatch.setattr(weights, "SHARD_SIZE", 20_000)
    read, write, written, left = weights.read_tensors, weights.write_tensors, [], []

    def watched_read(*arguments):
        left.extend(reference() for reference in written if reference() is not None)
        return read(*arguments)

    def watched_write(file, tensors):
        written.extend(map(weakref.ref, tensors.values()))
        write(file, tensors)

    monkeypatch.setattr(weights, "read_tensors", watched_read)
    monkeypatch.setattr(weights, "write_tensors", watched_write)
    export_checkpoint(checkpoint("chatglm3"), tmp_path / "out", "glm")
    assert written and not left
