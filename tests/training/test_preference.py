"""DPO, KTO, GRPO and RLOO on every family: log-probabilities, references, resuming, and what is refused."""

import itertools
import json
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
import trl
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import ModelConfig

from hf_cnllm.recipes import dpo
from hf_cnllm.training.preference import EndedAnswers, RewardArguments
from hf_cnllm.training.recipe import ChatArguments, parse_arguments, run_recipe
from hf_cnllm.training.run import Run
from sft_models import ROWS, write_row

QUESTIONS = ["你好", "one plus one", "今天天气怎么样？", "Name a fruit."]
GOOD = ["你好，我能帮你什么？", "two", "今天天气很好。", "An apple."]
BAD = ["two", "七", "不知道", "stone"]
PAIRS = [{"prompt": one, "chosen": good, "rejected": bad} for one, good, bad in zip(QUESTIONS, GOOD, BAD, strict=True)]
JUDGMENTS = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in PAIRS
    for side in ("chosen", "rejected")
]
DATA = {
    "dpo": PAIRS,
    "kto": JUDGMENTS,
    "grpo": [{"prompt": one, "number": place} for place, one in enumerate(QUESTIONS)],
}
DATA["rloo"] = DATA["grpo"]
SLOW = pytest.mark.slow
SAMPLED = ("grpo", "rloo")
COMMON = "--use_cpu --report_to none --logging_steps 1 --disable_tqdm true --gradient_checkpointing false"
SAMPLING = "--num_generations 2 --max_completion_length 6 --beta 0.1"
FAMILIES = [row for row in ROWS if row != "glm"]
# Every recipe, and every form of attention, with and without an adapter; all others are slow.
QUICK = {
    ("dpo", "chatglm", False), ("kto", "qwen", True), ("grpo", "chatglm2", True), ("rloo", "baichuan alibi", False),
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a tiny checkpoint, by its row in `ROWS`."""
    return partial(write_row, root=tmp_path_factory.mktemp("models"))


def words(name, row, folder, output, *options):
    data = Path(output).parent / f"{name}.jsonl"
    if not data.exists():
        data.write_text("\n".join(json.dumps(one) for one in DATA[name]))
    template = ROWS[row][2]
    more = f"{SAMPLING} --reward {__name__}.recorded" if name in SAMPLED else "--max_length 256"
    return [
        *f"--model {folder} --data {data} --output {output} {COMMON} {more}".split(),
        *(["--template", template] if template else []),
        *map(str, options),
    ]


def run(monkeypatch, name, *arguments):
    """The trainer of a finished run, and its summary."""
    seen, finish = [], Run.finish
    monkeypatch.setattr(
        Run, "finish", lambda self, trainer, *a, **k: (seen.append(trainer), finish(self, trainer, *a, **k))
    )
    given = words(name, *arguments)
    monkeypatch.setattr(sys, "argv", [name, *given])
    import_module(f"hf_cnllm.recipes.{name}").main()
    return seen[0], json.loads((Path(arguments[2]) / "summary.json").read_text())


SAMPLES = []


def recorded(prompts, completions, completion_ids, number, **kwargs):
    """A reward that prefers short answers, and keeps what it was asked."""
    SAMPLES[:] = zip(prompts, completion_ids, number, strict=True)
    return [
        -float(len(ids)) + one[0]["content"].count("a") for ids, one in zip(completion_ids, completions, strict=True)
    ]


# ---- log-probabilities


@torch.no_grad()
def naive(model, prompt, answer):
    """log π of an answer's tokens, from the logits of this row alone."""
    logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def expected_of_answers(name, trainer, policy, base):
    """What the log must say, by hand: the mean log-probability of each side, and β log(π / π_ref)."""
    collator, sides = trainer.data_collator, {}
    for row in trainer.eval_dataset:
        if name == "dpo":
            answers = {side: row[f"{side}_ids"] for side in ("chosen", "rejected")}
        else:
            answers = {"chosen" if row["label"] else "rejected": row["completion_ids"]}
        for side, ids in answers.items():
            asked = trainer.processing_class.apply_chat_template(
                row["prompt"], add_generation_prompt=True, return_dict=True
            )
            assert row["prompt_ids"] == asked["input_ids"]  # what it is going to answer
            ids = collator._ended(ids)
            assert [token for token in ids if token in collator.end_ids] == ids[-1:]
            of_policy, of_base = (naive(model, row["prompt_ids"], ids).sum().item() for model in (policy, base))
            sides.setdefault(side, []).append((of_policy, trainer.beta * (of_policy - of_base)))
    means = {side: torch.tensor(values).mean(0).tolist() for side, values in sides.items()}
    return {
        f"eval_{what}/{side}": means[side][place] for place, what in enumerate(("logps", "rewards")) for side in means
    }


def expected_of_samples(name, trainer, policy, base):
    log_ratios = []
    for prompt, ids, _ in SAMPLES:
        asked = trainer.processing_class.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
        log_ratios.append(naive(base, asked["input_ids"], ids) - naive(policy, asked["input_ids"], ids))
    every = torch.cat(log_ratios)
    return {"eval_kl": (every.exp() - every - 1 if name == "grpo" else -every).mean().item()}


@pytest.mark.parametrize(
    ("name", "row", "is_adapter"),
    [
        pytest.param(
            *case, id="-".join([*case[:2], "lora" if case[2] else "full"]), marks=() if case in QUICK else SLOW
        )
        for case in itertools.product(DATA, FAMILIES, (False, True))
    ],
)
def test_log_probabilities_are_the_models_own(name, row, is_adapter, checkpoint, tmp_path, monkeypatch):
    """Of the trained policy, which is loaded from what the run saved, and of the reference, which is the checkpoint."""
    folder = checkpoint(row)
    options = ["--max_steps", 2, "--learning_rate", 1e-2, "--save_strategy", "no"]
    options += ["--eval_data", tmp_path / f"{name}.jsonl", "--eval_strategy", "no"]
    options += ["--use_peft", "--lora_target_modules", "all-linear"] if is_adapter else []
    trainer, summary = run(monkeypatch, name, row, folder, tmp_path / "out", *options)
    assert summary["steps"] == 2
    found = trainer.evaluate()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    policy = AutoModelForCausalLM.from_pretrained(folder if is_adapter else tmp_path / "out", dtype=torch.float32)
    policy = (PeftModel.from_pretrained(policy, tmp_path / "out") if is_adapter else policy).eval()
    by_hand = expected_of_samples if name in SAMPLED else expected_of_answers
    expected = by_hand(name, trainer, policy, base)
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert all(value != 0 for value in expected.values())


def test_an_answer_ends_once():
    ended = EndedAnswers(lambda rows: rows, [7, 9])
    (row,) = ended([{"prompt_ids": [9, 1], "chosen_ids": [1, 2], "rejected_ids": [3, 9, 4], "label": True}])
    assert row == {"prompt_ids": [9, 1], "chosen_ids": [1, 2, 7], "rejected_ids": [3, 9], "label": True}


# ---- the runs


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "grpo" else SLOW) for name in DATA])
def test_a_resumed_run_has_the_losses_of_one_that_was_not_interrupted(name, checkpoint, tmp_path, monkeypatch):
    folder, output = checkpoint("baichuan rope"), tmp_path / "out"
    options = ["--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2, "--per_device_train_batch_size", 2]
    options += ["--learning_rate", 1e-2, "--use_peft"]
    trainer, _ = run(monkeypatch, name, "baichuan rope", folder, output, *options)
    names = ("loss", "reward", "kl", "rewards/margins", "logps/chosen")
    log = [[one.get(key) for key in names] for one in trainer.state.log_history if "loss" in one]
    (output / "summary.json").unlink()
    (output / "checkpoint-4/complete").unlink()  # as if it was killed while it wrote this one
    monkeypatch.undo()
    trainer, summary = run(monkeypatch, name, "baichuan rope", folder, output, *options, "--resume")
    assert summary["resumed_from"] == "checkpoint-2"
    assert [[one.get(key) for key in names] for one in trainer.state.log_history if "loss" in one] == log


def test_a_reward_model_and_a_function_of_the_rows(checkpoint, tmp_path, monkeypatch):
    """The model is asked about the chat as its own tokenizer writes it; the function gets the rows' other fields."""
    folder = checkpoint("baichuan rope")
    torch.manual_seed(1)
    reward = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    reward.save_pretrained(tmp_path / "reward")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path / "reward")
    options = ["--max_steps", 1, "--save_strategy", "no", "--per_device_train_batch_size", 4]
    options += ["--reward", tmp_path / "reward", f"{__name__}.recorded", "--reward_weights", 0.0, 1.0]
    trainer, summary = run(monkeypatch, "grpo", "baichuan rope", folder, tmp_path / "out", *options)
    assert {QUESTIONS[number] for _, _, number in SAMPLES} == {prompt[0]["content"] for prompt, _, _ in SAMPLES}
    scores = []
    for prompt, ids, _ in SAMPLES:
        answer = {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}
        asked = tokenizer.apply_chat_template([*prompt, answer], return_tensors="pt", return_dict=True)
        scores.append(reward.eval()(**asked).logits.item())
    log = trainer.state.log_history[0]
    assert log["rewards/reward/mean"] == pytest.approx(sum(scores) / len(scores), abs=1e-4)
    assert log["reward"] == pytest.approx(log["rewards/recorded/mean"])
    assert summary["metrics"]["reward_of_first_quarter"] == pytest.approx(log["reward"])


def share_of_odd_ids(completion_ids, **kwargs):
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLED)
def test_the_reward_rises(name, checkpoint, tmp_path, monkeypatch):
    """By the recipe's own test, on a reward that every token has a part in."""
    options = "--max_steps 40 --learning_rate 3e-3 --lr_scheduler_type constant --save_strategy no --num_generations 8"
    options += f" --per_device_train_batch_size 16 --reward {__name__}.share_of_odd_ids"
    _, summary = run(
        monkeypatch, name, "baichuan rope", checkpoint("baichuan rope"), tmp_path / "out", *options.split()
    )
    assert summary["metrics"]["reward_rise_p_value"] < 0.01


# ---- what is refused

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
BAD_INPUT = {
    "tools": ("grpo", "chatglm3", {"prompt": "a", "tools": [TOOL]}, ["--reward", "length"], "question 1 has tools"),
    "no pair": ("dpo", "baichuan rope", {"prompt": "a", "chosen": "b"}, [], "line 1: needs the field 'rejected'"),
    "no question": ("dpo", "baichuan rope", {"chosen": "a", "rejected": "b"}, [], "needs the question"),
    "not JSON": ("kto", "baichuan rope", "{", [], "line 1: not valid JSON"),
    "empty": ("kto", "baichuan rope", "", [], "there is no row"),
    "label": ("kto", "baichuan rope", {"prompt": "a", "completion": "b", "label": "x"}, [], "must say yes or no"),
    "no chats": ("dpo", "glm", PAIRS[0], [], "glm fills blanks and has no chats"),
    "no template": ("dpo", "llama", PAIRS[0], [], "no chat template: choose one with --template"),
    "control token": ("dpo", "llama", {**PAIRS[0], "chosen": "</s>"}, ["--template", "llama2"], "as a control token"),
    "too long": ("dpo", "baichuan rope", PAIRS[0], ["--max_length", 2], "longer than --max_length 2"),
    "4 bits": ("dpo", "baichuan rope", PAIRS[0], ["--load_in_4bit"], "add --use_peft"),
    "no reward": ("grpo", "baichuan rope", {"prompt": "a"}, [], "--reward is missing"),
    "reward": ("rloo", "baichuan rope", {"prompt": "a"}, ["--reward", "json.nothing"], "no function that can be imp"),
    "no folder": ("grpo", "baichuan rope", {"prompt": "a"}, ["--reward", "runs/none"], "--reward: there is no folder"),
    "long": (
        "grpo",
        "baichuan rope",
        {"prompt": "a"},
        ["--reward", "length", "--max_prompt_length", 1],
        "longer than",
    ),
}


@pytest.mark.parametrize(("name", "row", "data", "options", "said"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_what_the_user_can_mend_is_one_line(name, row, data, options, said, checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "data.jsonl").write_text(data if isinstance(data, str) else json.dumps(data))
    given = ["--model", checkpoint(row), "--data", tmp_path / "data.jsonl", "--output", tmp_path / "out", *options]
    monkeypatch.setattr(sys, "argv", [name, *map(str, given), *COMMON.split()])
    with pytest.raises(SystemExit) as stopped:
        run_recipe(import_module(f"hf_cnllm.recipes.{name}").main)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"{name}: error: ")]
    assert stopped.value.code == 2 and said in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", ["dpo", "dpo_baichuan2_safety", "kto", "grpo", "rloo"])
def test_the_papers_settings_are_understood(config, tmp_path, monkeypatch):
    name = config.partition("_")[0]
    kind = getattr(trl, f"{name.upper()}Config")
    arguments = ChatArguments if name in ("dpo", "kto") else RewardArguments
    monkeypatch.setattr(sys, "argv", [name, *f"--config {config}.yaml --model m --data d --output o".split()])
    _, training, options = parse_arguments("", arguments, kind, ModelConfig)
    given = yaml.safe_load((Path(dpo.__file__).parent / f"configs/{config}.yaml").read_text(encoding="utf-8"))
    for key, value in given.items():
        found = getattr(training if hasattr(training, key) else options, key)
        assert getattr(found, "value", found) == value, key
