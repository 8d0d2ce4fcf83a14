"""Tiny checkpoints that know a few conversations by heart, so that what a server sends is words."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint
from hf_cnllm.vllm.served import stop_ids
from tokenizer_goldens import FIXTURES
from vllm_engine.checkpoints import write_checkpoint

FAMILIES = ("baichuan1", "baichuan", "qwen", "chatglm2", "chatglm3")
USER, ASSISTANT = "user", "assistant"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "天气",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
CALL = "```python\ntool_call(city='北京', days=2)\n```"
# Prompt -> what the model says.
HELLO = [{"role": USER, "content": "你好"}], "你好，很高兴见到你！ I am a model 😀."
BYE = [*HELLO[0], {"role": ASSISTANT, "content": "你好。"}, {"role": USER, "content": "再见"}], "Good bye.\n\n再见。"
CALLED = [{"role": USER, "content": "北京天气"}], ("get_weather", CALL)
TALKED = [{"role": USER, "content": "说说天气"}], "get_weather\n" + CALL + "<|observation|>"
ANSWERS = (HELLO, BYE)
TOOL_ANSWERS = (CALLED, TALKED)


def prompt_ids(tokenizer: Any, messages: list, **options: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options)


def answer_ids(tokenizer: Any, answer: str | tuple[str, str]) -> list[int]:
    """A text, or ChatGLM3's call of a tool, (name, code), with the token that ends it."""
    if isinstance(answer, tuple):
        name, code = answer
        ids = tokenizer.encode_message(f"{name}\n") + tokenizer.encode_message(code)
        return [*ids, tokenizer.get_command("<|observation|>")]
    is_chatglm3 = getattr(tokenizer, "generation", None) == "chatglm3"
    opening = tokenizer.encode_message("\n") if is_chatglm3 and answer != TALKED[1] else []
    return [*opening, *tokenizer.encode_message(answer), stop_ids(tokenizer)[1 if is_chatglm3 else 0]]


def write_chat_checkpoint(family: str, folder: Path) -> Path:
    if family == "baichuan1":
        shutil.copytree(FIXTURES / "vocab" / "baichuan1_small", folder)
        size = len(AutoTokenizer.from_pretrained(folder))
        write_checkpoint("baichuan_7b", folder, vocab_size=size, initializer_range=0.02)
    else:
        write_tiny_checkpoint(family, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = [(prompt_ids(tokenizer, messages), answer_ids(tokenizer, answer)) for messages, answer in ANSWERS]
    if family == "chatglm3":
        for messages, answer in TOOL_ANSWERS:
            pairs.append((prompt_ids(tokenizer, messages, tools=[WEATHER]), answer_ids(tokenizer, answer)))
    memorize(folder, pairs)
    return folder


def memorize(folder: Path, pairs: list[tuple[list[int], list[int]]]) -> None:
    """Trains the checkpoint's model until it gives each answer to its prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        losses = []
        for prompt, answer in pairs:
            ids = torch.tensor([prompt + answer])
            labels = torch.tensor([[-100] * len(prompt) + answer])
            losses.append(model(ids, labels=labels).loss)
        loss = torch.stack(losses).mean()
        if loss < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    config = (folder / "config.json").read_text(encoding="utf-8")
    kept = {path.name: path.read_bytes() for path in folder.glob("generation_config.json")}
    model.eval().save_pretrained(folder)
    (folder / "config.json").write_text(config, encoding="utf-8")
    (folder / "generation_config.json").unlink(missing_ok=True)
    for name, content in kept.items():
        (folder / name).write_bytes(content)
