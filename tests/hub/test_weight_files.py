"""Weight files that contradict each other, their index or the model are refused before a weight is read."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import hf_cnllm  # noqa: F401
from goldens import GOLDENS

MODELS = {
    "baichuan2_13b": AutoModelForCausalLM,
    "chatglm_6b_3layer": AutoModel,
    "chatglm2_6b": AutoModel,
    "chatglm3_6b_int8": AutoModel,
    "glm": AutoModelForSeq2SeqLM,
    "glm130b": AutoModelForSeq2SeqLM,
    "qwen": AutoModelForCausalLM,
}
INDEX = "model.safetensors.index.json"
every_model = pytest.mark.parametrize("name", MODELS)


def copy(name, folder):
    shutil.copytree(GOLDENS / name, folder, ignore=shutil.ignore_patterns("expected*"))
    return folder


def load(name, folder):
    return MODELS[name].from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def sharded(name, tmp_path):
    """A checkpoint in several shards, and the tensors of each."""
    folder = tmp_path / "sharded"
    load(name, GOLDENS / name).save_pretrained(folder, max_shard_size="20KB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    return folder, {file.name: load_file(file) for file in files}


def save(tensors, file):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


@every_model
def test_shards_of_one_save_load(name, sharded):
    folder, _ = sharded
    expected = load(name, GOLDENS / name).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in load(name, folder).state_dict().items())


@every_model
def test_a_missing_shard_is_named(name, sharded):
    folder, shards = sharded
    first = min(shards)
    (folder / first).unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of the checkpoint's {len(shards)} weight files .*{first}"):
        load(name, folder)


@every_model
@pytest.mark.parametrize("path", ["../elsewhere/{}", "/{}", "a/../../{}", "..\\{}", "C:\\{}"])
def test_an_index_stays_in_its_folder(name, path, sharded):
    folder, shards = sharded
    index = json.loads((folder / INDEX).read_text())
    file = min(shards)
    index["weight_map"] = {key: path.format(v) if v == file else v for key, v in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside of the checkpoint's folder"):
        load(name, folder)


@every_model
def test_a_shard_that_the_index_leaves_out_is_named(name, sharded):
    folder, shards = sharded
    extra = folder / f"model-99999-of-{len(shards):05}.safetensors"
    save({"x": torch.zeros(1)}, extra)
    with pytest.raises(ValueError, match=f"leaves out {extra.name}"):
        load(name, folder)
    extra.rename(folder / "model-99999-of-99999.safetensors")  # another series is none of this index's business
    load(name, folder)


@every_model
def test_a_tensor_in_two_shards_is_named(name, sharded):
    folder, shards = sharded
    (first, ours), (second, theirs) = list(shards.items())[:2]
    tensor = next(iter(ours))
    save(theirs | {tensor: ours[tensor] + 1}, folder / second)
    with pytest.raises(ValueError, match=f"`{tensor}` is both in .*{first} and in {second}.*different saves"):
        load(name, folder)


@every_model
def test_a_tensor_that_is_not_where_the_index_says_is_named(name, sharded):
    folder, shards = sharded
    (first, ours), (second, theirs) = list(shards.items())[:2]
    tensor = next(iter(ours))
    save(theirs | {tensor: ours.pop(tensor)}, folder / second)
    save(ours or {"nothing": torch.zeros(1)}, folder / first)
    with pytest.raises(ValueError, match=f"`{tensor}` is in {first}, but it is not.*different saves"):
        load(name, folder)


@every_model
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_floats_stored_as_integers_are_named(name, dtype, file, tmp_path):
    tensors = load_file(GOLDENS / name / "model.safetensors")
    own = load(name, GOLDENS / name).state_dict()  # originals hold tables besides, which nobody reads
    floats = [tensor for tensor in tensors if tensor in own and own[tensor].is_floating_point()]
    for tensor in (floats[0], floats[len(floats) // 2], floats[-1]):
        folder = copy(name, tmp_path / tensor)
        changed = tensors | {tensor: tensors[tensor].to(dtype)}
        if file.endswith(".bin"):
            (folder / "model.safetensors").unlink()
            torch.save(changed, folder / file)
        else:
            save(changed, folder / file)
        with pytest.raises(ValueError, match=f"{tensor}` holds (integers|booleans)"):
            load(name, folder)


def test_integers_stored_as_floats_are_named(tmp_path):
    folder = copy("chatglm3_6b_int8", tmp_path / "folder")
    tensors = load_file(folder / "model.safetensors")
    integers = next(name for name, tensor in tensors.items() if not tensor.is_floating_point())
    save(tensors | {integers: tensors[integers].float()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="holds floats"):
        load("chatglm3_6b_int8", folder)


@every_model
def test_a_head_or_a_backbone_alone_still_loads(name, tmp_path):
    model = load(name, GOLDENS / name)
    model.base_model.save_pretrained(tmp_path)
    type(model.base_model).from_pretrained(tmp_path)
    type(model.base_model).from_pretrained(GOLDENS / name)
