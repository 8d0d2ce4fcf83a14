"""Trainer, Accelerate, PEFT and TRL."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate import Accelerator
from datasets import Dataset

from .place import ANSWER, CHAT, Doors, Place, entering, same

DOORS: Doors = {}
door = entering(DOORS)


def changed(model: Any, before: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


@door("Trainer")
def trainer(place):
    model, example = place.model(), place.example()
    before = weights_of(model)
    args = transformers.TrainingArguments(
        output_dir=str(place.scratch), max_steps=1, use_cpu=True, report_to=[], save_strategy="no", learning_rate=1e-2,
        disable_tqdm=True,
    )  # fmt: skip
    row = {name: value[0] for name, value in example.items()}
    loss = transformers.Trainer(model=model, args=args, train_dataset=[row, row]).train().training_loss
    with torch.no_grad():
        assert 0 < loss < 20 and changed(model, before)


@door("gradient_checkpointing_enable")
def gradient_checkpointing(place):
    gradients = []
    for checkpointed in (False, True):
        model = place.model().train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        transformers.set_seed(0)
        model(**place.example(), use_cache=False).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        same(gradients[1][name], gradient)


@door("Accelerator.prepare")
def accelerate(place):
    model = place.model().train()
    before = weights_of(model)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(**place.example()).loss)
    optimizer.step()
    assert changed(accelerator.unwrap_model(model), before)


def with_adapter(name: str, **settings: Any) -> Callable[[Place], None]:
    def run(place):
        torch.manual_seed(0)
        config = getattr(peft, name)(task_type="CAUSAL_LM", **settings)
        model = peft.get_peft_model(place.model(), config).train()
        optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(**place.example()).loss.backward()
            optimizer.step()
        model.eval().save_pretrained(place.scratch)
        logits = place.logits(model)
        assert not torch.equal(logits[:, -1], place.logits(place.model())[:, -1])
        same(place.logits(peft.PeftModel.from_pretrained(place.model(), place.scratch).eval()), logits)

    return run


ADAPTERS = {
    "LoRA": ("LoraConfig", {"r": 4}),
    "IA3": ("IA3Config", {}),
    "prefix tuning": ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "prompt tuning": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
}
for adapter, (config_name, settings) in ADAPTERS.items():
    DOORS[f"PEFT, {adapter}"] = with_adapter(config_name, **settings)


@door("PEFT, merge_and_unload")
def merge(place):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)
    model = peft.get_peft_model(place.model(), config).eval()
    logits = place.logits(model)
    merged = model.merge_and_unload()
    same(place.logits(merged), logits)
    merged.save_pretrained(place.scratch)
    same(place.logits(place.model(place.scratch)), logits)


PREFERENCES = [{"prompt": CHAT, "chosen": ANSWER, "rejected": [{"role": "assistant", "content": "two"}]}] * 2
LABELED = [{"prompt": CHAT, "completion": ANSWER, "label": label} for label in (True, False)]
SAMPLED = {"num_generations": 2, "max_completion_length": 4}
TRL = {
    "SFT": ([{"messages": CHAT + ANSWER}] * 2, {"max_length": 64}),
    "DPO": (PREFERENCES, {"max_length": 64}),
    "KTO": (LABELED, {"max_length": 64}),
    "Reward": (PREFERENCES, {"max_length": 64}),
    "GRPO": ([{"prompt": CHAT}] * 2, SAMPLED),
    "RLOO": ([{"prompt": CHAT}] * 2, SAMPLED),
}


def with_trl(name: str, rows: list[dict], options: dict[str, Any]) -> Callable[[Place], None]:
    def run(place):
        trl = pytest.importorskip("trl")
        args = getattr(trl, f"{name}Config")(
            output_dir=str(place.scratch), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=2,
            max_steps=1, logging_steps=1, save_strategy="no", gradient_checkpointing=False, disable_tqdm=True,
            learning_rate=1e-2, **options,
        )  # fmt: skip
        rewarded = {"reward_funcs": lambda completions, **_: [float(len(c[0]["content"])) for c in completions]}
        trainer = getattr(trl, f"{name}Trainer")(
            model=str(place.folder),
            args=args,
            train_dataset=Dataset.from_list(rows),
            **(rewarded if options is SAMPLED else {}),
        )
        before = weights_of(trainer.model)
        trainer.train()
        assert changed(trainer.model, before)
        assert torch.tensor(trainer.state.log_history[0]["loss"]).isfinite()

    return run


for method, (rows, options) in TRL.items():
    DOORS[f"TRL, {method}"] = with_trl(method, rows, options)
