"""Saving, publishing, and the commands that look at what was saved."""

import contextlib
import io
import shutil

import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoTokenizer

import hf_cnllm
from hf_cnllm.cli import main
from hf_cnllm.families import family_of
from hf_cnllm.hub import remote_code
from hub_stand_in import serving

from .place import TEXT, Doors, entering

DOORS: Doors = {}
door = entering(DOORS)


@door("save_pretrained, from_pretrained")
def save(place):
    model, tokenizer = place.model(), place.tokenizer()
    for saved in (model, tokenizer):
        saved.save_pretrained(place.scratch / "saved")
    again = place.model(place.scratch / "saved")
    assert torch.equal(place.logits(again), place.logits(model))
    assert AutoTokenizer.from_pretrained(place.scratch / "saved")(TEXT) == tokenizer(TEXT)


@door("save_pretrained, sharded")
def sharded(place):
    model = place.model()
    model.save_pretrained(place.scratch / "shards", max_shard_size="1MB")
    assert len(list((place.scratch / "shards").glob("*.safetensors"))) > 1
    assert torch.equal(place.logits(place.model(place.scratch / "shards")), place.logits(model))


COPY = """
import sys
sys.modules["hf_cnllm"] = None
import torch, transformers
folder, auto_class = sys.argv[1:]
model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
assert type(model).__module__.startswith("transformers_modules.")
example = torch.load(folder + "/example.pt")
assert torch.equal(model(**example).logits, torch.load(folder + "/logits.pt"))
"""


@door("save_pretrained(remote_code=True)")
def remote_copy(place):
    model, copy = place.model(), place.scratch / "copy"
    model.save_pretrained(copy, remote_code=True)
    assert (copy / f"{remote_code.MODEL}.py").is_file()
    example = place.example()
    del example["labels"]
    torch.save(example, copy / "example.pt")
    torch.save(place.logits(model), copy / "logits.pt")
    place.in_new_process(COPY, copy, family_of(model.config).generates_with)


PUSH = """
import sys, torch, transformers, hf_cnllm
folder, auto_class = sys.argv[1:]
auto_class = getattr(transformers, auto_class)
model = auto_class.from_pretrained(folder)
model.push_to_hub("me/model")
again = auto_class.from_pretrained("me/model").state_dict()
assert all(torch.equal(weight, again[name]) for name, weight in model.state_dict().items())
"""


@door("push_to_hub")
def push(place):
    with serving() as hub:
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_mine"}
        name = family_of(AutoConfig.from_pretrained(place.folder)).generates_with
        place.in_new_process(PUSH, place.folder, name, **online)
        assert {"README.md", "config.json", "model.safetensors"} <= set(hub.repositories["me/model"].files)


@door("create_model_card")
def model_card(place):
    hf_cnllm.create_model_card(place.model(), model_path="me/model").save(place.scratch / "README.md")
    data = ModelCard.load(place.scratch / "README.md").data
    assert data.library_name == "transformers" and "hf_cnllm" in data.tags


def command(*words: object) -> str:
    """What it prints; an error ends in its one line."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = main([str(word) for word in words])
    if code:
        raise ValueError(errors.getvalue() or out.getvalue())
    return out.getvalue()


@door("hf-cnllm info")
def info(place):
    assert "parameters" in command("info", place.folder)


@door("hf-cnllm verify")
def verify(place):
    command("verify", place.folder)
    shutil.copytree(place.folder, place.scratch / "damaged")
    weights = place.scratch / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert main(["verify", str(place.scratch / "damaged")]) != 0


@door("hf-cnllm quantize")
def quantize(place):
    command("quantize", place.folder, place.scratch / "int8", "--bits", 8)
    model = place.model(place.scratch / "int8", dtype="auto")
    assert place.logits(model).isfinite().all()
