"""`hf-cnllm verify`: every damage is named, whole checkpoints are not, and memory stays small."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from goldens import GOLDENS
from hf_cnllm.cli import USER_ERROR, main
from hf_cnllm.demo.tiny_checkpoints import TINY_FAMILIES
from hf_cnllm.hub.verification import read_sums

WEIGHTS = "model.safetensors"


def verify(folder, capsys, *words):
    code = main(["verify", str(folder), *map(str, words)])
    return code, capsys.readouterr().out


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of a tiny Qwen."""
    return Path(shutil.copytree(tiny("qwen"), tmp_path / "copy"))


@pytest.fixture
def sharded(folder):
    """The same in four shards with an index, saved an hour ago."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    model.save_pretrained(folder, max_shard_size="3MB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    for file in folder.iterdir():
        os.utime(file, (file.stat().st_mtime - 3600,) * 2)
    return folder, shards, folder / "model.safetensors.index.json"


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def change(file, **changes):
    """Rewrites a weight file with some tensors changed (by a function), or left out (None)."""
    tensors = load_file(file)
    for name, value in changes.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value(tensors[name]) if callable(value) else value
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_whole_checkpoints_pass(family, tiny, capsys):
    code, out = verify(tiny(family), capsys)
    assert code == 0 and "no problem found" in out and "FAIL" not in out


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDENS.iterdir()))
def test_the_weights_of_every_original_pass(name, capsys):
    _, out = verify(GOLDENS / name, capsys)
    failed = [line.split()[1] for line in out.splitlines() if line.startswith("FAIL")]
    assert failed == ["tokenizer"], out  # which those folders lack


def test_shards_pass(sharded, capsys):
    code, out = verify(sharded[0], capsys)
    assert code == 0, out


ROW = "transformer.h.0.attn.c_proj.weight"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({ROW: lambda t: t.index_fill(0, torch.tensor(3), float("nan"))}, f"{ROW} holds NaN or infinite values"),
        ({ROW: lambda t: t.index_fill(0, torch.tensor(3), float("-inf"))}, f"{ROW} holds NaN or infinite values"),
        ({ROW: None}, f"missing: {ROW}"),
        ({"other.weight": torch.ones(2)}, "unexpected: other.weight"),
        ({ROW: lambda t: t[:-1].contiguous()}, f"{ROW} has the shape"),
        ({ROW: lambda t: t.to(torch.int8)}, f"`{ROW}` holds integers"),
    ],
    ids=["nan", "inf", "missing", "unexpected", "shape", "kind"],
)
def test_wrong_tensors_are_named(changes, said, folder, capsys):
    change(folder / WEIGHTS, **changes)
    code, out = verify(folder, capsys)
    assert code == 1 and said in out


def test_odd_but_possible_is_a_note(folder, capsys):
    change(folder / WEIGHTS, **{ROW: torch.zeros_like})
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    code, out = verify(folder, capsys)
    assert code == 0
    assert f"{ROW} holds nothing but zeros" in out and "stored in BF16, and config.json says float32" in out


@pytest.mark.parametrize("size", [0, 5, 4000, -1])
def test_a_truncated_file_is_named(size, folder, capsys):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:size])
    code, out = verify(folder, capsys)
    assert code == 1 and f"{WEIGHTS} is damaged or truncated" in out


def test_a_damaged_pickle_is_named_and_a_whole_one_is_read(folder, capsys):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert verify(folder, capsys)[0] == 0
    tensors[ROW][0, 0] = float("nan")
    torch.save(tensors, folder / "pytorch_model.bin")
    assert "NaN" in verify(folder, capsys)[1]
    (folder / "pytorch_model.bin").write_bytes((folder / "pytorch_model.bin").read_bytes()[:-500])
    assert "pytorch_model.bin is damaged" in verify(folder, capsys)[1]


def no_weights(folder, shards, index):
    for file in (*shards, index):
        file.unlink()


def lost_shard(folder, shards, index):
    shards[1].unlink()


def foreign_shard(folder, shards, index):
    shutil.copy(shards[0], folder / "model-00009-of-00004.safetensors".replace("00004", shards[0].name[15:20]))


def wrong_size(folder, shards, index):
    content = json.loads(index.read_text())
    content["metadata"]["total_size"] += 4
    index.write_text(json.dumps(content))


def other_split(folder, shards, index):
    content = json.loads(index.read_text())
    first = next(name for name, file in content["weight_map"].items() if file == shards[0].name)
    content["weight_map"][first] = shards[1].name
    index.write_text(json.dumps(content))


def other_format(folder, shards, index):
    save_file(load_file(shards[0]), shards[0], metadata={"format": "pt", "step": "7"})


def killed_save(folder, shards, index):
    """Two of the shards, of the same shapes, come from a later save; nothing but their times tells."""
    for shard in shards[:2]:
        change(shard, **{name: lambda t: t + 1 for name in load_file(shard)})


def unfinished(folder, shards, index):
    index.rename(f"{index}.unfinished")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (no_weights, "there are no weight files"),
        (lost_shard, "which is not there"),
        (foreign_shard, "shards are there"),
        (wrong_size, "speaks of"),
        (other_split, "but it is not"),
        (other_format, "the headers of the shards differ"),
        (killed_save, "was written long after model.safetensors.index.json"),
        (unfinished, "was interrupted"),
    ],
)
def test_mixtures_and_lost_shards_are_named(damage, said, sharded, capsys):
    damage(*sharded)
    code, out = verify(sharded[0], capsys)
    assert code == 1 and said in out


def test_files_that_were_copied_one_after_the_other_are_no_mixture(sharded, capsys):
    folder, shards, index = sharded
    now = index.stat().st_mtime
    for place, file in enumerate([shards[0], index, *shards[1:]]):  # the index in the middle, 90 seconds each
        os.utime(file, (now + 90 * place,) * 2)
    assert verify(folder, capsys)[0] == 0


def test_right_checksums_outvote_times(sharded, tmp_path, capsys):
    killed_save(*sharded)
    sums = tmp_path / "sums"
    sums.write_text("".join(f"{sha256(file)}  {file.name}\n" for file in sharded[1]))
    assert verify(sharded[0], capsys, "--checksums", sums)[0] == 0


# --- checksums --------------------------------------------------------------------------------------------------------


def test_checksums_of_a_file(folder, tmp_path, capsys):
    sums = tmp_path / "sums"
    sums.write_text(f"{sha256(folder / WEIGHTS)}  {WEIGHTS}\n{sha256(folder / 'config.json')} *./config.json\n\n")
    code, out = verify(folder, capsys, "--checksums", sums)
    assert code == 0 and "2 files compared" in out
    flip(folder / WEIGHTS)
    code, out = verify(folder, capsys, "--checksums", sums)
    assert code == 1 and f"{WEIGHTS} is not what its checksum says" in out
    sums.write_text(sums.read_text() + f"{'0' * 64}  gone.safetensors\n")
    assert "gone.safetensors is listed and not there" in verify(folder, capsys, "--checksums", sums)[1]


def flip(file):
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "line", ["nonsense", "abc  model.safetensors", f"{'0' * 64}", f"{'0' * 64}  ../x", f"{'0' * 64}  /x", "", "\udcff"]
)
def test_a_wrong_checksum_file_is_refused(line, tmp_path, folder, capsys):
    (tmp_path / "sums").write_text(f"{line}\n", encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match="sums"):
        read_sums(tmp_path / "sums")
    assert main(["verify", str(folder), "--checksums", str(tmp_path / "sums")]) == USER_ERROR


@pytest.mark.parametrize("layout", ["cache", "local_dir"])
def test_what_the_hubs_client_noted_is_compared(layout, tiny, folder, tmp_path, capsys, monkeypatch):
    names = {file.name: file for file in tiny("qwen").iterdir()}
    digests = {name: sha256(file) if name == WEIGHTS else git_sha1(file) for name, file in names.items()}
    if layout == "cache":
        repository = tmp_path / "hub" / "models--owner--name"
        snapshot = repository / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("a" * 40)
        (repository / "blobs").mkdir()
        for name, file in names.items():
            shutil.copy(file, repository / "blobs" / digests[name])
            (snapshot / name).symlink_to(f"../../blobs/{digests[name]}")
        damaged = repository / "blobs" / digests[WEIGHTS]
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        place = snapshot
    else:
        notes = folder / ".cache" / "huggingface" / "download"
        notes.mkdir(parents=True)
        for name, digest in digests.items():
            (notes / f"{name}.metadata").write_text(f"{'a' * 40}\n{digest}\n1700000000.0\n")
        damaged, place = folder / WEIGHTS, folder
    code, out = verify(place, capsys)
    assert code == 0 and f"{len(names)} files compared" in out
    flip(damaged)
    code, out = verify(place, capsys)
    assert code == 1 and f"{WEIGHTS} is not what its checksum says" in out


def git_sha1(file):
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# --- the other files --------------------------------------------------------------------------------------------------


def test_files_beside_the_weights(folder, capsys):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 10**6]}))
    assert "eos_token_id is [2, 1000000], and there is no such token" in verify(folder, capsys)[1]
    (folder / "qwen.tiktoken").write_bytes((folder / "qwen.tiktoken").read_bytes()[:-5])
    code, out = verify(folder, capsys)
    assert code == 1 and "FAIL  tokenizer" in out
    (folder / "config.json").write_text("{")
    assert main(["verify", str(folder)]) == USER_ERROR


@pytest.mark.parametrize("family", ["chatglm", "chatglm3", "baichuan"])
def test_two_vocabularies_that_differ(family, tiny, tmp_path, capsys):
    from transformers import AutoTokenizer

    folder = Path(shutil.copytree(tiny(family), tmp_path / "copy"))
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert verify(folder, capsys)[0] == 0
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        names = list(vocabulary)[-2:]
        vocabulary[names[0]], vocabulary[names[1]] = vocabulary[names[1]], vocabulary[names[0]]
    else:
        vocabulary[1200], vocabulary[1201] = vocabulary[1201], vocabulary[1200]
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    code, out = verify(folder, capsys)
    assert code == 1 and "FAIL  tokenizer" in out, out


def test_an_adapter(tiny, tmp_path, capsys):
    import peft

    model = AutoModelForCausalLM.from_pretrained(tiny("qwen"))
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path)
    assert verify(tmp_path, capsys)[0] == 0  # LoRA's B is zero, as it should be
    file = tmp_path / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as weights:
        name = next(iter(weights.keys()))
    change(file, **{name: lambda t: t * float("nan")})
    assert "NaN" in verify(tmp_path, capsys)[1]


@pytest.mark.parametrize("path", ["/nowhere", "owner/name"])
def test_what_is_not_there_is_one_line(path, capsys):
    assert main(["verify", path]) == USER_ERROR
    assert capsys.readouterr().err.startswith(f"hf-cnllm verify: error: there is no folder {path}")


@pytest.mark.slow
def test_memory_stays_at_the_largest_tensor(folder):
    """Thirty matrices of 32 MiB: the values are looked at one at a time."""
    save_file({f"m{n}": torch.ones(2**23) for n in range(30)}, folder / WEIGHTS, metadata={"format": "pt"})
    code = (
        "import resource, sys; from pathlib import Path; from hf_cnllm.hub import verification as v\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "file = Path(sys.argv[1]); v.check_values({file: v.stored_tensors(file)}, lambda *_: None)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, folder / WEIGHTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200 * 1024  # KiB, of 960 MiB
