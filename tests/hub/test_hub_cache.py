"""Checkpoints in a cache of the Hub's files that is not the usual one, of a revision, in a subfolder: the tokenizer is the right
one, and code beside it does not run. Links to checkpoints."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hf_cnllm.demo.tiny_checkpoints import TINY_FAMILIES, write_tiny_checkpoint

TEXT = "你好,世界! one plus 1"
REPO = "org/model"
CODE = """
open({mark!r}, "w").close()
from transformers import PreTrainedTokenizerFast
class Planted(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture(scope="module", params=TINY_FAMILIES)
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "checkpoint"
    write_tiny_checkpoint(request.param, folder)
    (folder / "model.safetensors").unlink()
    return folder


def in_cache(cache: Path, revisions: dict[str, Path]) -> None:
    """As huggingface_hub lays a repository out: files in `blobs`, links to them in `snapshots`."""
    base = cache / f"models--{REPO.replace('/', '--')}"
    (base / "blobs").mkdir(parents=True)
    (base / "refs").mkdir()
    for name, folder in revisions.items():
        commit = hashlib.sha1(name.encode()).hexdigest()
        (base / "refs" / name).write_text(commit)
        for file in (file for file in folder.rglob("*") if file.is_file()):
            blob = base / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copyfile(file, blob)
            link = base / "snapshots" / commit / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)


def planted(checkpoint: Path, folder: Path, mark: Path) -> Path:
    shutil.copytree(checkpoint, folder)
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    settings.pop("tokenizer_class", None)
    file.write_text(json.dumps(settings | {"auto_map": {"AutoTokenizer": ["planted.Planted", None]}}))
    for place in (folder, folder.parent):
        (place / "planted.py").write_text(CODE.format(mark=str(mark)))
    return folder


@pytest.mark.parametrize("way", ["cache_dir", "revision", "subfolder", "subfolder of a revision"])
def test_what_is_read_is_what_is_looked_at(checkpoint, way, tmp_path):
    mark = tmp_path / "it-ran"
    bad = planted(checkpoint, tmp_path / "bad" / "模型 a", mark)
    inside = "模型 a" if way.startswith("subfolder") else ""
    good = tmp_path / "good"
    shutil.copytree(checkpoint, good / inside)
    if inside:
        bad = bad.parent
    options = {"subfolder": inside} if inside else {}
    expected = AutoTokenizer.from_pretrained(checkpoint)(TEXT)["input_ids"]
    for folder in (good, bad):
        name = str(folder)
        if way != "subfolder":
            other = {"cache_dir": {}, "revision": {"main": bad if folder == good else good}}
            cache = tmp_path / f"cache of {folder.name}"
            named = "main" if way == "cache_dir" else "v2"
            in_cache(cache, other.get(way, {}) | {named: folder})
            name, options = REPO, options | {"cache_dir": cache, "revision": named}
        if folder == good:
            assert AutoTokenizer.from_pretrained(name, **options)(TEXT)["input_ids"] == expected
        else:
            with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
                AutoTokenizer.from_pretrained(name, trust_remote_code=True, **options)
    assert not mark.exists()


@pytest.mark.parametrize("way", ["folder", "files"])
def test_a_tokenizer_that_was_read_by_links_is_saved_over_its_own_files(checkpoint, way, tmp_path):
    folder, links = tmp_path / "model", tmp_path / "links"
    shutil.copytree(checkpoint, folder)
    if way == "folder":
        links.symlink_to(folder)
    else:
        in_links = [links / file.name for file in folder.iterdir()]
        links.mkdir()
        for link in in_links:
            link.symlink_to(folder / link.name)
    tokenizer = AutoTokenizer.from_pretrained(links)
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
