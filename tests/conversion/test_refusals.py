"""What cannot be exported ends in one line that says what serves it instead, and leaves nothing behind."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from goldens import GOLDENS
from hf_cnllm.cli import USER_ERROR, main
from hf_cnllm.conversion import checkpoint as conversion
from hf_cnllm.conversion import weights


def refused(capsys, folder, output, target):
    capsys.readouterr()  # what writing the checkpoint said
    assert main(["export", str(folder), str(output), "--to", target]) == USER_ERROR
    assert not list(output.parent.glob(f".{output.name}-*"))
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("golden", "target", "reasons"),
    [
        ("baichuan2_13b", "llama", ("no ALiBi", "vLLM with this package", "--to baichuan")),
        ("baichuan_13b", "qwen2", ("a checkpoint of baichuan becomes --to llama or baichuan, not qwen2",)),
        ("qwen", "llama", ("becomes --to qwen2",)),
        ("qwen_bias", "qwen2", ("`no_bias`", "vLLM with this package")),
        ("chatglm_6b", "glm", ("prefix language model", "transformers serve")),
        ("chatglm2_6b_int4", "glm", ("quantized",)),
        ("chatglm2_6b_ptuning", "glm", ("`pre_seq_len`", "hf-cnllm chat")),
        ("glm", "glm", ("prefix language model", "hf_cnllm.infill")),
        ("qwen", "original", ("no original/config.json",)),
    ],
)
def test_no_equivalent(golden, target, reasons, tmp_path, capsys):
    line = refused(capsys, GOLDENS / golden, tmp_path / "out", target)
    assert all(reason in line for reason in reasons), line
    assert not (tmp_path / "out").exists()


def test_llama_has_no_divided_positions_in_half_turned_heads(checkpoint, tmp_path, capsys):
    line = refused(capsys, checkpoint("chatglm2-32k"), tmp_path / "out", "llama")
    assert "`rope_ratio`" in line and "--to glm" in line and not (tmp_path / "out").exists()


def test_a_bias_that_only_llama_has_stays_zero(exported, tmp_path, capsys):
    shutil.copytree(exported("chatglm2-llama"), tmp_path / "trained")
    tensors = load_file(tmp_path / "trained" / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.bias"][3] = 0.5
    save_file(tensors, tmp_path / "trained" / "model.safetensors")
    line = refused(capsys, tmp_path / "trained", tmp_path / "out", "original")
    assert "model.layers.1.self_attn.o_proj.bias was trained" in line and not (tmp_path / "out").exists()


def test_an_export_is_no_checkpoint_of_these_families(exported, tmp_path, capsys):
    assert "LlamaConfig of transformers" in refused(capsys, exported("baichuan"), tmp_path / "out", "llama")


def broken(checkpoint, folder, change):
    shutil.copytree(checkpoint, folder)
    change(folder)
    return folder


def without_a_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["transformer.h.1.attn.c_attn.bias"]
    save_file(tensors, folder / "model.safetensors")


def with_another_shape(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.weight"] = torch.ones(16)
    save_file(tensors, folder / "model.safetensors")


def cut_off(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def of_integers(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")


def with_a_missing_shard(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def with_an_index_that_leads_out(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "../x"}}))


def with_settings(name, text):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_a_tensor, "transformer.h.1.attn.c_attn.bias is missing"),
        (with_another_shape, "transformer.ln_f.weight has the shape (16,) and not (32,)"),
        (cut_off, "is damaged or cut off"),
        (of_integers, "holds integers"),
        (with_a_missing_shard, "lacks model-00001-of-00002.safetensors"),
        (with_an_index_that_leads_out, "outside of the checkpoint's folder"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (with_settings("generation_config.json", '{"do_sample": tr'), "generation_config.json is damaged"),
        (with_settings("generation_config.json", "[1]"), "generation_config.json is damaged: it is no object"),
        (with_settings("generation_config.json", '{"eos_token_id": "</s>"}'), "`eos_token_id` is '</s>'"),
        (with_settings("tokenizer_config.json", '{"model_max'), "tokenizer_config.json is damaged"),
    ],
)
def test_a_damaged_source(change, reason, checkpoint, tmp_path, capsys):
    folder = broken(checkpoint("qwen"), tmp_path / "source", change)
    assert reason in refused(capsys, folder, tmp_path / "out", "qwen2")
    assert not (tmp_path / "out").exists()


def test_the_output_is_there(checkpoint, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert "is not empty" in refused(capsys, checkpoint("qwen"), tmp_path / "out", "qwen2")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_stopped_in_the_middle(error, checkpoint, tmp_path, monkeypatch, capsys):
    """The disk is full, or somebody pressed Ctrl-C, with some shards written."""
    monkeypatch.setattr(weights, "SHARD_SIZE", 20_000)
    write, written = weights.write_tensors, []

    def stop(file, tensors):
        if len(written) == 3:
            raise error
        written.append(file)
        write(file, tensors)

    monkeypatch.setattr(weights, "write_tensors", stop)
    assert main(["export", str(checkpoint("qwen")), str(tmp_path / "out"), "--to", "qwen2"]) != 0
    assert written and not list(tmp_path.iterdir())
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_file_that_grows_too_large(checkpoint, tmp_path, capsys, files_up_to):
    """What safetensors makes of it is an error of the disk."""
    with files_up_to(9_000):
        line = refused(capsys, checkpoint("qwen"), tmp_path / "out", "qwen2")
    assert "is the disk full?" in line and not list(tmp_path.iterdir())


def test_another_original(exported, tmp_path):
    shutil.copytree(exported("baichuan"), tmp_path / "mixed")
    shutil.rmtree(tmp_path / "mixed" / "original")
    shutil.copytree(exported("qwen") / "original", tmp_path / "mixed" / "original")
    with pytest.raises(ValueError, match="not an export of what is in original"):
        conversion.restore_checkpoint(tmp_path / "mixed", tmp_path / "out")


def test_what_was_left_over_is_whole_and_nothing_else(exported, tmp_path, capsys):
    shutil.copytree(exported("baichuan2"), tmp_path / "export")
    file = tmp_path / "export" / "original" / "left_over.safetensors"
    left_over = load_file(file)
    assert left_over.keys() == {"lm_head.weight"}
    save_file(left_over | {"model.norm.weight": torch.zeros(32)}, file)
    assert "which the export has itself" in refused(capsys, tmp_path / "export", tmp_path / "out", "original")
    file.write_bytes(file.read_bytes()[:-9])
    assert "left_over.safetensors is damaged" in refused(capsys, tmp_path / "export", tmp_path / "out", "original")
    assert not (tmp_path / "out").exists()
