"""Reads exports as whoever does not have this package: `read_exports.py PLACE EXPORT…`."""

import json
import sys
from pathlib import Path

sys.modules["hf_cnllm"] = None  # importing it is an error

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

CHATS = [
    [{"role": "user", "content": "你好"}],
    [
        {"role": "user", "content": "one plus one?"},
        {"role": "assistant", "content": "two\n"},
        {"role": "user", "content": " 为什么？"},
    ],
]
TEXTS = ["今天天气很好", "soprano  and\n\nteleop", " ", ""]

place, said, logits = Path(sys.argv[1]), {}, {}
for folder in map(Path, sys.argv[2:]):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits[folder.name] = model(torch.load(place / "ids.pt")).logits
    said[folder.name] = {
        "class": type(model).__name__,
        "chats": CHATS,
        "chat_ids": [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in CHATS],
        "texts": {text: tokenizer(text)["input_ids"] for text in TEXTS},
    }
save_file(logits, place / "logits.safetensors")
(place / "said.json").write_text(json.dumps(said))
