"""Run by `test_push.py` in a process of its own, which reaches the stand-in of the Hub by `HF_ENDPOINT`.

python pusher.py week CHECKPOINT OUTCOMES: pushes, is refused, loads; writes what happened as one JSON object.
python pusher.py interrupted CHECKPOINT: one push, for somebody to interrupt.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelCard
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

import hf_cnllm

IDS = torch.tensor([[5, 6, 7, 8]])


def week(checkpoint: str, outcomes: str) -> None:
    told: dict[str, object] = {}
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    logits = model(IDS).logits

    tokenizer.push_to_hub("me/tokenizer")
    model.push_to_hub("me/model")
    tokenizer.push_to_hub("me/model")
    loaded = AutoModelForCausalLM.from_pretrained("me/model").eval()
    told["model loaded"] = torch.equal(loaded(IDS).logits, logits)
    text = "你好，世界"
    told["tokenizer loaded"] = AutoTokenizer.from_pretrained("me/model")(text) == tokenizer(text)

    # From there the name is known: the adapter's card and the next model's give it as the base.
    with tempfile.TemporaryDirectory() as folder:
        adapted = get_peft_model(loaded, LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)).eval()
        logits = adapted(IDS).logits
        adapted.save_pretrained(folder)
        told["PEFT's own card has the tags"] = {"hf_cnllm", "baichuan"} <= set(
            ModelCard.load(f"{folder}/README.md").data.tags
        )
        hf_cnllm.create_model_card(adapted, model_path="me/adapter").save(Path(folder, "README.md"))
        api = HfApi()
        api.create_repo("me/adapter")
        api.upload_folder(repo_id="me/adapter", folder_path=folder)
    again = AutoPeftModelForCausalLM.from_pretrained("me/adapter").eval()
    told["adapter loaded"] = torch.allclose(again(IDS).logits, logits, atol=1e-5)
    again.merge_and_unload().save_pretrained(f"{os.getcwd()}/merged", push_to_hub=True, repo_id="me/merged")

    model.push_to_hub("me/copy", remote_code=True)
    tokenizer.push_to_hub("me/copy", remote_code=True)
    told["remote code is not kept in mind"] = not (model.writes_code or tokenizer.writes_code)

    for name, repo_id, token in (
        ("wrong token", "me/new", "hf_bad"),
        ("wrong token, existing name", "me/model", "hf_bad"),
        ("token for reading", "me/new", "hf_reader"),
        ("token for reading, existing name", "me/model", "hf_reader"),
        ("somebody else's name", "you/taken", None),
        ("somebody else's new name", "you/new", None),
        ("no name", "me/a b", None),
        ("dropped", "me/dropped", None),
    ):
        try:
            model.push_to_hub(repo_id, token=token)
            told[name] = None
        except Exception as error:
            told[name] = [type(error).__name__, str(error)]
    model.push_to_hub("me/dropped")
    Path(outcomes).write_text(json.dumps(told))


def interrupted(checkpoint: str) -> None:
    AutoModelForCausalLM.from_pretrained(checkpoint).push_to_hub("me/interrupted")


if __name__ == "__main__":
    logging.disable_progress_bar()
    with torch.no_grad():
        {"week": week, "interrupted": interrupted}[sys.argv[1]](*sys.argv[2:])
