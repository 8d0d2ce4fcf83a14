"""Who can read what is saved here: nobody without this package by default, everybody with `remote_code=True`."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

import hf_cnllm
from hf_cnllm.demo.tiny_checkpoints import TINY_FAMILIES, write_tiny_checkpoint
from hf_cnllm.families import family_of

READER = Path(__file__).with_name("reader_without_package.py")
TEXT, MESSAGES = "你好，世界 hello", [{"role": "user", "content": "你好"}]
OPTIONS = {"max_new_tokens": 4, "do_sample": False}


def load(folder, **options):
    auto_class = family_of(AutoConfig.from_pretrained(folder)).generates_with
    return getattr(transformers, auto_class).from_pretrained(folder, **options).eval()


@torch.no_grad()
def write_expected(model, tokenizer, folder: Path) -> None:
    ids = tokenizer(TEXT)["input_ids"]
    prompt = {"input_ids": torch.tensor([ids])}
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    inputs = dict(prompt)
    if isinstance(model, hf_cnllm.GLMForConditionalGeneration):
        blank = tokenizer("你好[gMASK]", return_tensors="pt")
        prompt = dict(tokenizer.build_inputs_for_generation(blank, max_gen_length=8))
        inputs = {name: prompt[name][..., : prompt["input_ids"].shape[1]] for name in ("input_ids", "position_ids")}
    chat = tokenizer.chat_template and str(tokenizer.apply_chat_template(MESSAGES, tokenize=False))
    torch.save(
        {
            "auto_class": family_of(model.config).generates_with,
            "text": TEXT,
            "ids": ids,
            "inputs": inputs,
            "logits": model(**inputs).logits,
            "prompt": prompt,
            "options": OPTIONS,
            "generated": model.generate(**prompt, **OPTIONS),
            "messages": MESSAGES,
            "chat": chat,
        },
        folder / "expected.pt",
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every family saved both ways, and what a reader without this package makes of it."""
    root = tmp_path_factory.mktemp("readers")
    saved, copies = [], []
    for family in TINY_FAMILIES:
        write_tiny_checkpoint(family, root / "original" / family)
        model = load(root / "original" / family)
        model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=model.generation_config.eos_token_id)
        tokenizer_class = hf_cnllm.GLMChineseTokenizer if family == "glm" else AutoTokenizer
        tokenizer = tokenizer_class.from_pretrained(root / "original" / family)
        for way, with_code, where in (("saved", None, saved), ("copy", True, copies)):
            folder = root / way / family
            model.save_pretrained(folder, remote_code=with_code)
            tokenizer.save_pretrained(folder, remote_code=with_code)
            where.append(str(folder))
        write_expected(model, tokenizer, root / "copy" / family)
    outcomes = root / "outcomes.json"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, READER, outcomes, *saved, "--", *copies]
    done = subprocess.run(
        command,
        env=environment | {"HF_MODULES_CACHE": str(root / "modules")},
        cwd=root,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root, json.loads(outcomes.read_text())


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_without_the_package_every_door_names_it(family, folders):
    root, outcomes = folders
    assert outcomes["silent"][str(root / "saved" / family)] == []


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_copy_works_without_the_package(family, folders):
    root, outcomes = folders
    assert outcomes["faults"][str(root / "copy" / family)] == []


@pytest.mark.parametrize("way", ["saved", "copy", "copy-again"])
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_with_the_package_all_load_by_its_own_classes(family, way, folders):
    root, _ = folders
    folder = root / "copy" / f"{family}-again" if way == "copy-again" else root / way / family
    for options in ({}, {"trust_remote_code": True}):
        model, tokenizer = load(folder, **options), AutoTokenizer.from_pretrained(folder, **options)
        assert type(model).__module__.startswith("hf_cnllm.") and type(tokenizer).__module__.startswith("hf_cnllm.")
        assert model.config.model_type == AutoConfig.from_pretrained(root / "original" / family).model_type


def test_a_folder_saved_before_files_named_the_package_still_loads(folders, tmp_path):
    root, _ = folders
    model = load(root / "saved" / "glm")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "glm"}))
    assert isinstance(load(tmp_path), hf_cnllm.GLMForConditionalGeneration)


def test_copies_import_nothing_of_the_package(folders):
    root, _ = folders
    for file in root.glob("copy/*/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                assert all((file.parent / f"{name}.py").is_file() for name in names), (file.name, names)
            elif isinstance(node, ast.ImportFrom | ast.Import):
                assert "hf_cnllm" not in ast.unparse(node), file.name


def test_a_class_of_somebody_else_is_refused(folders, tmp_path):
    root, _ = folders

    class Mine(hf_cnllm.BaichuanForCausalLM):
        pass

    with pytest.raises(ValueError, match="Mine is defined in"):
        Mine.from_pretrained(root / "saved" / "baichuan").save_pretrained(tmp_path / "new", remote_code=True)
    assert not (tmp_path / "new").exists()


def test_an_adapter_alone_has_no_code_to_copy(folders, tmp_path):
    root, _ = folders
    model = load(root / "saved" / "qwen")
    model._hf_peft_config_loaded = True  # `add_adapter` without PEFT, whose version may not suit transformers'
    with pytest.raises(ValueError, match="adapter alone"):
        model.save_pretrained(tmp_path / "new", remote_code=True)
    assert not (tmp_path / "new").exists()


def test_a_file_in_place_of_the_folder(folders, tmp_path):
    root, _ = folders
    (tmp_path / "model").write_text("")
    for saved in (load(root / "saved" / "qwen"), AutoTokenizer.from_pretrained(root / "saved" / "qwen")):
        with pytest.raises(NotADirectoryError, match="is a file"):
            saved.save_pretrained(tmp_path / "model")
