"""Where a door is tried, and how functions enter a table of doors."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from hf_cnllm.families import family_of

NEW_TOKENS = 4
TEXT, TEXTS = "天空为什么是蓝色的？", ["你好", "天空为什么是蓝色的？今天天气怎么样？", "Hello"]
GLM_TOKENS = {"sop_token_id": "<|startofpiece|>", "gmask_token_id": "[gMASK]"}
CHAT = [{"role": "user", "content": "你好"}]
ANSWER = [{"role": "assistant", "content": "你好，我能帮你什么？"}]


class Place(NamedTuple):
    """Where a door is tried: a checkpoint in the Hub's layout, and an empty folder."""

    folder: Path
    family: str
    scratch: Path

    def load(self, auto_class: str, folder: Path | None = None, **options: Any) -> Any:
        """A model in fp32, unless another dtype is asked for."""
        if self.family == "glm" and folder is None:  # its original config.json does not have them
            ids = self.tokenizer().convert_tokens_to_ids
            options = {name: ids(token) for name, token in GLM_TOKENS.items()} | options
        options = {"dtype": torch.float32, **options}
        return getattr(transformers, auto_class).from_pretrained(folder or self.folder, **options).eval()

    def model(self, folder: Path | None = None, **options: Any) -> Any:
        """The model with its output head."""
        config = AutoConfig.from_pretrained(folder or self.folder)
        return self.load(family_of(config).generates_with, folder, **options)

    def tokenizer(self, **options: Any) -> Any:
        return AutoTokenizer.from_pretrained(self.folder, **options)

    def prompt(self) -> dict[str, torch.Tensor]:
        """What `generate` gets."""
        tokenizer = self.tokenizer()
        if self.family == "glm":
            blank = tokenizer(f"{TEXT}[gMASK]", return_tensors="pt")
            return dict(tokenizer.build_inputs_for_generation(blank, max_gen_length=32))
        return dict(tokenizer(TEXT, return_tensors="pt"))

    def example(self) -> dict[str, torch.Tensor]:
        """What `forward` gets, with labels."""
        if self.family == "glm":
            tokenizer = self.tokenizer()
            blank = tokenizer(f"{TEXT}[gMASK]", return_tensors="pt")
            inputs = tokenizer.build_inputs_for_generation(blank, targets=["世界和平"], max_gen_length=8)
            mask = torch.ones_like(inputs["input_ids"])
            return {"input_ids": inputs["input_ids"], "attention_mask": mask, "labels": inputs["labels"]}
        prompt = self.prompt()
        return {name: prompt[name] for name in ("input_ids", "attention_mask")} | {"labels": prompt["input_ids"]}

    def new_ids(self, model: Any = None, **options: Any) -> list[int]:
        """The tokens that are generated; the answer has to be as long as asked."""
        prompt = self.prompt()
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, **options}
        output = (model or self.model()).generate(**prompt, **options)
        ids = output[0, prompt["input_ids"].shape[1] :].tolist()
        assert len(ids) == options["max_new_tokens"]
        return ids

    @torch.no_grad()
    def logits(self, model: Any) -> torch.Tensor:
        example = self.example()
        del example["labels"]
        return model(**example).logits.float()

    def in_new_process(self, script: str, *arguments: object, **environment: str) -> None:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        home = {"HF_HOME": str(self.scratch / "home")}
        done = subprocess.run(
            command, env=os.environ | home | environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]


Doors = dict[str, Callable[[Place], Any]]


def entering(doors: Doors) -> Callable[[str], Callable]:
    """A decorator that enters functions into `doors`."""

    def door(name: str) -> Callable:
        def enter(function: Callable) -> Callable:
            doors[name] = function
            return function

        return enter

    return door


def same(one: torch.Tensor, other: torch.Tensor, atol: float = 2e-4) -> None:
    torch.testing.assert_close(one, other, atol=atol, rtol=1e-3)
