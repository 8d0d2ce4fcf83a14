"""GLM-130B's ranks merged: the original's own files, and everything that can be wrong with them."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from goldens import assert_close, cases_of
from hf_cnllm import GLM130BForConditionalGeneration, GLM130BTokenizer, infill
from hf_cnllm.cli import main
from hf_cnllm.conversion.glm130b import sharded_weights
from hf_cnllm.conversion.glm130b.release import convert
from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint
from shards import ITERATION, write_shards
from tokenizer_goldens import FIXTURES

SHARDS = FIXTURES.parent / "shards" / "glm130b"
TOKENS = {"mask_token_id": 150, "gmask_token_id": 151, "smask_token_id": 152, "bos_token_id": 154}
REFERENCES = {"mp1": "merged", "mp2": "merged", "mp4": "merged"} | {
    f"mp{count}_int{bits}": f"dequantised_int{bits}_mp{count}" for count in (1, 2) for bits in (8, 4)
}
QUANTISED = [name for name in REFERENCES if "int" in name]


def weights_of(folder) -> dict[str, torch.Tensor]:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {file: load_file(folder / file) for file in set(index["weight_map"].values())}
    assert {name for tensors in files.values() for name in tensors} == index["weight_map"].keys()
    return {name: files[file][name] for name, file in index["weight_map"].items()}


def left_behind(tmp_path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir() if path.name != "shards")


@pytest.fixture
def shards(tmp_path):
    """A copy of two ranks, to break."""
    return shutil.copytree(SHARDS / "mp2", tmp_path / "shards")


def file_of(shards, rank: int):
    return shards / ITERATION / f"mp_rank_{rank:02}_model_states.pt"


def change(shards, rank: int, **tensors) -> None:
    state = torch.load(file_of(shards, rank), weights_only=True)
    state["module"] |= {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    torch.save(state, file_of(shards, rank))


@pytest.mark.parametrize("name", REFERENCES)
def test_ranks_give_the_original_tensors(name, tmp_path):
    config = convert(SHARDS / name, tmp_path / "out", max_file_bytes=100_000)
    merged, expected = weights_of(tmp_path / "out"), load_file(SHARDS / f"{REFERENCES[name]}.safetensors")
    assert merged.keys() == {key for key in expected if not key.endswith("inv_freq")}
    assert all(torch.equal(tensor, expected[key].half()) for key, tensor in merged.items())
    golden = json.loads((SHARDS / "model_config.json").read_text())
    golden.pop("note")
    assert {key: getattr(config, key) for key in golden} == golden
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1 and left_behind(tmp_path) == ["out"]


@pytest.mark.parametrize("keeps_integers", [False, True])
@pytest.mark.parametrize("name", QUANTISED)
@torch.no_grad()
def test_quantized_ranks_give_the_original_logits(name, keeps_integers, tmp_path):
    """Kept integers are multiplied in single precision here, where the original's product is half precision."""
    convert(SHARDS / name, tmp_path / "out", keeps_integers=keeps_integers)
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", dtype=torch.float32, **TOKENS).eval()
    assert model.quantized == keeps_integers
    expected = load_file(SHARDS / "expected_quantised.safetensors")
    count, bits = name[2], name[-1]
    for case in ("gen_gmask", "infill_mask"):
        logits = model(cases_of("glm130b")[case].inputs["input_ids"]).logits
        assert_close(logits, expected[f"int{bits}.mp{count}.{case}.logits"], atol=0.05 if keeps_integers else 1e-4)
    if keeps_integers:
        plain = load_file(SHARDS / f"{REFERENCES[name]}.safetensors")
        halves = model.half().dequantize().state_dict()
        assert all(torch.equal(halves[key], tensor) for key, tensor in plain.items() if not key.endswith("inv_freq"))


def test_the_command_with_a_tokenizer(tmp_path, capsys):
    write_tiny_checkpoint("glm130b", tmp_path / "tiny")
    original = GLM130BForConditionalGeneration.from_pretrained(tmp_path / "tiny").half()
    write_shards(tmp_path / "shards", original.state_dict(), 4, original.config.head_dim, max_sequence_length=512)
    arguments = ["convert", "glm130b", str(tmp_path / "shards"), str(tmp_path / "out")]
    assert main([*arguments, "--tokenizer", str(tmp_path / "tiny")]) == 0
    assert "GLM-130B of 4 layers" in capsys.readouterr().out
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float16 and type(tokenizer) is GLM130BTokenizer
    assert all(torch.equal(tensor, original.state_dict()[name]) for name, tensor in model.state_dict().items())
    ids = ("mask_token_id", "gmask_token_id", "smask_token_id", "bos_token_id", "eos_token_id", "text_end_token_id")
    assert [getattr(model.config, name) for name in ids] == [getattr(original.config, name) for name in ids]
    assert model.generation_config.eos_token_id == [original.config.eos_token_id, 2]
    assert infill(model, tokenizer, "今天[MASK]", max_new_tokens=2).startswith("今天")
    assert main(arguments) == 2 and "is not empty" in capsys.readouterr().err


def test_the_ranks_own_folder_is_taken_too(shards, tmp_path):
    (shards / "latest").unlink()
    convert(shards, tmp_path / "a")
    convert(shards / ITERATION, tmp_path / "b")
    assert all(
        torch.equal(tensor, weights_of(tmp_path / "b")[name]) for name, tensor in weights_of(tmp_path / "a").items()
    )


def test_what_is_interrupted_goes_on(shards, tmp_path):
    written = []

    def interrupt(name, size):
        written.append(name)
        if name.endswith("layers.1.attention.dense.weight"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(shards, tmp_path / "out", max_file_bytes=50_000, progress=interrupt)
    assert left_behind(tmp_path) == [".out.unfinished"]
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / ".out.unfinished").glob("*.safetensors")}
    assert kept
    again = []
    convert(shards, tmp_path / "out", max_file_bytes=50_000, progress=lambda name, size: again.append(name))
    assert kept == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept}
    assert kept.keys() <= set(again) and left_behind(tmp_path) == ["out"]
    merged, expected = weights_of(tmp_path / "out"), load_file(SHARDS / "merged.safetensors")
    assert all(torch.equal(tensor, expected[key].half()) for key, tensor in merged.items())
    assert not list((tmp_path / "out").glob("*unfinished*")) and not (tmp_path / "out" / "conversion.json").exists()


def test_what_is_left_of_another_conversion_is_not_taken(shards, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        convert(shards, tmp_path / "out", progress=lambda name, size: (_ for _ in ()).throw(KeyboardInterrupt))
    os.utime(file_of(shards, 1), (0, 0))
    with pytest.raises(FileExistsError, match=r"\.out\.unfinished is what is left of another conversion"):
        convert(shards, tmp_path / "out")


class Runs:
    def __reduce__(self):
        return os.system, ("touch planted",)


def plant(shards):
    with open(file_of(shards, 1), "wb") as file:
        torch.save({"module": {"transformer.word_embeddings.weight": Runs()}}, file)


def plant_plain(shards):
    file_of(shards, 1).write_bytes(pickle.dumps({"module": Runs()}))


def cut(shards):
    data = file_of(shards, 1).read_bytes()
    file_of(shards, 1).write_bytes(data[: len(data) // 2])


def cut_values(shards):
    """The file's directory is whole, and the tensors are shorter than it says."""
    change(shards, 1, transformer__word_embeddings__weight=torch.zeros(40, 64).half())


def two_checkpoints(shards):
    shutil.copytree(shards / ITERATION, shards / "50000")


def not_a_state(shards):
    torch.save([torch.zeros(2)], file_of(shards, 0))


BAD = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "empty": (lambda shards: shutil.rmtree(shards / ITERATION), r"holds no mp_rank_XX_model_states\.pt"),
    "first rank missing": (lambda shards: file_of(shards, 0).unlink(), r"mp_rank_00_model_states\.pt is missing"),
    "last rank missing": (lambda shards: file_of(shards, 1).unlink(), "of 1 ranks each holds .* are all of the"),
    "rank cut": (cut, r"mp_rank_01_model_states\.pt is cut or damaged"),
    "rank of another size": (cut_values, r"`transformer\.word_embeddings\.weight` is \(80, 64\) .* and \(40, 64\)"),
    "two checkpoints": (two_checkpoints, "holds several checkpoints, in 49300 and 50000"),
    "rank of another checkpoint": (
        lambda shards: change(shards, 1, transformer__final_layernorm__weight=torch.zeros(64).half()),
        r"`transformer\.final_layernorm\.weight` differs in mp_rank_00.* and mp_rank_01.*: they are of two checkpoints",
    ),
    "latest of another": (lambda shards: (shards / "latest").write_text("1"), "names '1', but the files are in 49300"),
    "code in a pickle": (plant, "holds more than tensors, and nothing of it was run"),
    "a plain pickle": (plant_plain, r"mp_rank_01_model_states\.pt is cut or damaged, or not a file of torch\.save"),
    "no state dict": (not_a_state, "holds no state dict under 'module'"),
    "a foreign tensor": (
        lambda shards: [change(shards, rank, transformer__x=torch.zeros(2)) for rank in (0, 1)],
        r"holds `transformer\.x`, which GLM-130B does not have",
    ),
    "other settings": (
        lambda shards: (shards / "model_config.json").write_text('{"model_class": "GLM130B", "num_layers": 4}'),
        "`num_layers` is 4 in model_config.json and 3 in the ranks' tensors",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(kind, shards, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoil, message = BAD[kind]
    spoil(shards)
    assert main(["convert", "glm130b", str(shards), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises((ValueError, OSError), match=message):
        convert(shards, tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_a_full_disk_is_seen_beforehand(shards, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**25)
    monkeypatch.setattr(sharded_weights.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"out needs 0\.00 GB, and .* has 0\.03 GB free"):
        convert(shards, tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_what_fails_on_the_way_leaves_nothing(shards, tmp_path):
    change(shards, 1, **{"transformer__layers__1__input_layernorm__bias": torch.ones(64).half()})
    with pytest.raises(ValueError, match="they are of two checkpoints"):
        convert(shards, tmp_path / "out")
    assert left_behind(tmp_path) == []


def test_integers_to_keep_and_tokenizers_that_do_not_fit(shards, tmp_path):
    with pytest.raises(ValueError, match="holds no INT8 or INT4 weights to keep"):
        convert(shards, tmp_path / "out", keeps_integers=True)
    write_tiny_checkpoint("glm130b", tmp_path / "shards" / "tiny")
    with pytest.raises(ValueError, match="has 1708 tokens, and the model has embeddings for 160"):
        convert(shards, tmp_path / "out", tokenizer=tmp_path / "shards" / "tiny")
    assert left_behind(tmp_path) == []
