"""Rejection sampling: what is written and chosen, by hand; rounds that raise the reward; runs that were killed; PPO behind it."""

import itertools
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_cnllm import reply_end_ids
from hf_cnllm.recipes import ppo, rejection_sampling
from hf_cnllm.training.rejection import best_answers, read_samples, reward_of, sample_to_file
from hf_cnllm.training.reward import REWARDS
from hf_cnllm.training.sampling import encode_queries
from sft_models import ROWS, write_checkpoint

CHATS = {row: (name, template) for row, (name, changes, template) in ROWS.items() if name != "glm"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return lambda row: write_checkpoint(CHATS[row][0], root / CHATS[row][0])


# --- what is written, and what of it is chosen ---


def sample(query, responses, rewards):
    return {
        "messages": [{"role": "user", "content": query}],
        "tools": None,
        "responses": responses,
        "rewards": rewards,
    }


def test_the_best_answers_by_hand(tmp_path):
    first = [sample("a", ["x", "y"], [1.0, 3.0]), sample("b", ["", " "], [9.0, 8.0])]
    second = [sample("a", ["z", "w"], [2.5, -1.0]), sample("c", ["u", "v", ""], [0.0, 0.0, 5.0])]
    chosen = {row["messages"][0]["content"]: row["messages"][1] for row in best_answers(first + second)}
    assert chosen == {query: {"role": "assistant", "content": text} for query, text in {"a": "y", "c": "u"}.items()}
    chosen = [row["messages"][1]["content"] for row in best_answers(first + second, control_tokens=["y", "v"])]
    assert chosen == ["z", "u"]
    (tmp_path / "odd.jsonl").write_text(
        json.dumps(sample("a", ["x\u2028y"], [0.0]), ensure_ascii=False), encoding="utf-8"
    )
    assert read_samples([tmp_path / "odd.jsonl"])[0]["responses"] == ["x\u2028y"]
    assert reward_of(first) == {"reward": 5.25, "best_reward": 6.0}


def test_nothing_is_sampled_twice(checkpoint, tmp_path):
    """A file that a killed process left, at any byte, becomes that of a process which was not."""
    path = checkpoint("baichuan rope")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    rows = [{"messages": [{"role": "user", "content": f"Say {n}."}], "tools": None} for n in range(5)]
    rows, asked = encode_queries(tokenizer, rows, 64), []

    def reward(queries, responses):
        asked.extend(queries)
        return REWARDS["length"](queries, responses)

    def write(file):
        ends = reply_end_ids(tokenizer, model.generation_config)
        sample_to_file(file, model, tokenizer, rows, reward, ends, 2, 2, seed="0", max_new_tokens=4)
        return file.read_bytes()

    whole = write(tmp_path / "whole" / "samples.jsonl")
    assert len(asked) == 10 and whole.count(b"\n") == 5
    written = [json.loads(line) for line in whole.splitlines()]
    assert all(row["rewards"] == [len(text) for text in row["responses"]] for row in written)
    assert [row["messages"] for row in written] == [row["messages"] for row in rows]
    first, second = (whole.index(b"\n", at) + 1 for at in (0, whole.index(b"\n") + 1))
    cuts = {0: 10, first - 1: 10, first: 10, second: 6, second + 1: 6, len(whole) - 1: 2, len(whole): 0}
    for cut, sampled in cuts.items():
        (tmp_path / "cut.jsonl").write_bytes(whole[:cut])
        asked.clear()
        assert write(tmp_path / "cut.jsonl") == whole and len(asked) == sampled, cut
    rows.reverse()
    with pytest.raises(ValueError, match="holds answers to other queries than --data has now"):
        write(tmp_path / "cut.jsonl")
    assert (tmp_path / "cut.jsonl").read_bytes() == whole


def test_a_reward_that_is_no_number(checkpoint, tmp_path):
    path = checkpoint("baichuan rope")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    rows = encode_queries(tokenizer, [{"messages": [{"role": "user", "content": "?"}], "tools": None}], 64)
    with pytest.raises(FloatingPointError, match="reward of the queries from 1 on is not finite"):
        sample_to_file(
            tmp_path / "samples.jsonl", model, tokenizer, rows, lambda q, r: [math.nan] * len(r), [2], 1, 1, "0",
            max_new_tokens=2,
        )  # fmt: skip
    assert not (tmp_path / "samples.jsonl").read_bytes()


# --- the recipe ---

SETTINGS = {
    "rounds": 2,
    "reward": "chinese",
    "samples_per_query": 8,
    "queries_per_batch": 16,
    "max_new_tokens": 6,
    "num_train_epochs": 4,
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 8,
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": "true",
    "disable_tqdm": "true",
    "report_to": "none",
}


def write_prompts(path, count=16):
    path.write_text("\n".join(json.dumps({"prompt": f"Say {n}."}) for n in range(count)), encoding="utf-8")
    return path


def words(row, checkpoint, data, output, *flags, **changes):
    template = {"template": CHATS[row][1]} if CHATS[row][1] else {}
    settings = {"model": checkpoint(row), "data": data, "output": output, **SETTINGS, **template, **changes}
    found = [word for name, value in settings.items() for word in (f"--{name}", *str(value).split())]
    return [*found, *flags]


def run(monkeypatch, *arguments, **changes):
    monkeypatch.setattr(sys, "argv", ["rejection_sampling.py", *words(*arguments, **changes)])
    rejection_sampling.main()
    return json.loads((arguments[3] / "summary.json").read_text())


def texts_of(output):
    return {str(path.relative_to(output)): path.read_text("utf-8") for path in sorted(output.rglob("*.jsonl"))}


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def assert_same_run(output, whole):
    assert texts_of(output) == texts_of(whole)
    for name, value in weights(output).items():
        assert torch.equal(value, weights(whole)[name]), name


def test_rounds_raise_the_reward_and_a_killed_run_goes_on(checkpoint, tmp_path, monkeypatch):
    row, data = "baichuan rope", write_prompts(tmp_path / "prompts.jsonl")
    settings = {"save_strategy": "steps", "save_steps": 4}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    summary = run(monkeypatch, row, checkpoint, data, whole, **settings)
    rewards = summary["metrics"]["rewards"]
    assert rewards == sorted(set(rewards)) and len(rewards) == 3, rewards
    assert summary["metrics"]["best_rewards"][0] > rewards[0]
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    chosen = [json.loads(line)["messages"] for line in texts_of(whole)["round-2/selected.jsonl"].splitlines()]
    assert len(chosen) == 16 and all(messages[-1]["role"] == "assistant" for messages in chosen)

    shutil.copytree(whole, cut)  # as if killed in the training of round 2
    shutil.rmtree(cut / "last-samples")
    for name in ("summary.json", "round-2/model/summary.json", "round-2/model/checkpoint-8/complete"):
        (cut / name).unlink()
    with pytest.raises(ValueError, match=r"of another run: temperature was 1\.0 and is 0\.5"):
        run(monkeypatch, row, checkpoint, data, cut, "--resume", temperature=0.5, **settings)
    resumed = run(monkeypatch, row, checkpoint, data, cut, "--resume", **settings)
    assert resumed["metrics"] == summary["metrics"]
    assert json.loads((cut / "round-2/model/summary.json").read_text())["resumed_from"] == "checkpoint-4"
    assert_same_run(cut, whole)


def test_adapters_and_ppo_behind_it(checkpoint, tmp_path, monkeypatch):
    """The adapter is trained on from round to round; the output folder is a model that PPO goes on with."""
    row, data = "llama", write_prompts(tmp_path / "prompts.jsonl", 4)
    flags, changes = ("--use_peft", "--lora_r", "4"), {"max_steps": 2, "samples_per_query": 2, "reward": "length"}
    whole, cut, output = tmp_path / "whole", tmp_path / "cut", tmp_path / "ppo"
    run(monkeypatch, row, checkpoint, data, whole, *flags, **changes)
    assert (whole / "round-2/model/adapter_model.safetensors").exists()
    base, merged = weights(checkpoint(row)), weights(whole)
    differing = {name for name, value in merged.items() if not torch.equal(value, base[name])}
    assert differing and all("q_proj" in name or "v_proj" in name for name in differing)
    shutil.copytree(whole, cut)  # as if killed before round 2
    shutil.rmtree(cut / "round-2")
    shutil.rmtree(cut / "last-samples")
    (cut / "summary.json").unlink()
    run(monkeypatch, row, checkpoint, data, cut, *flags, "--resume", **changes)
    assert_same_run(cut, whole)

    told = (
        f"ppo.py --model {whole} --data {data} --reward length --output {output} --max_steps 2 --critic_warmup_steps 1"
    )
    told += (
        " --queries_per_device 2 --per_device_train_batch_size 4 --max_new_tokens 4 --save_strategy no --use_cpu true"
    )
    monkeypatch.setattr(sys, "argv", [*told.split(), "--disable_tqdm", "true", "--report_to", "none"])
    ppo.main()
    assert math.isfinite(json.loads((output / "summary.json").read_text())["last_loss"])


@pytest.mark.slow
@pytest.mark.parametrize("row", CHATS)
def test_a_family(row, checkpoint, tmp_path, monkeypatch):
    """With two reward models, of which the second judges the queries of safety."""
    data, safety = write_prompts(tmp_path / "prompts.jsonl"), tmp_path / "safety.jsonl"
    safety.write_text('{"prompt": "How are locks picked?"}\n', encoding="utf-8")
    judges = []
    for seed in range(2):
        torch.manual_seed(seed)
        judge = AutoModelForSequenceClassification.from_pretrained(checkpoint(row), num_labels=1)
        judge.save_pretrained(tmp_path / str(seed))
        AutoTokenizer.from_pretrained(checkpoint(row)).save_pretrained(tmp_path / str(seed))
        judges.append(str(tmp_path / str(seed)))
    changes = {"reward": " ".join(judges), "safety_data": safety, "rounds": 1, "max_steps": 2}
    summary = run(monkeypatch, row, checkpoint, data, tmp_path / "out", **changes)
    assert len(summary["metrics"]["rewards"]) == 2 and math.isfinite(summary["last_loss"])
    assert texts_of(tmp_path / "out")["round-1/samples-0.jsonl"].count("\n") == 17
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.use_cache


FIVE_ROUNDS = {
    "rounds": 5,
    "num_train_epochs": 2,
    "learning_rate": 1.4e-3,
}  # a reward of 1, the most there is, comes later


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_mean_reward_rises_in_each_of_five_rounds(seed, checkpoint, tmp_path, monkeypatch):
    data = write_prompts(tmp_path / "prompts.jsonl", 32)
    summary = run(monkeypatch, "baichuan rope", checkpoint, data, tmp_path / "out", **FIVE_ROUNDS, seed=seed)
    rewards = summary["metrics"]["rewards"]
    print(seed, [round(value, 3) for value in rewards], summary["seconds"])
    assert all(after > before for before, after in itertools.pairwise(rewards)), rewards


@pytest.mark.slow
def test_two_processes_share_the_queries(checkpoint, tmp_path):
    data, output = write_prompts(tmp_path / "prompts.jsonl", 5), tmp_path / "out"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += ["-m", "hf_cnllm.recipes.rejection_sampling"]
    told = words("baichuan rope", checkpoint, data, output, rounds=1, max_steps=2, per_device_train_batch_size=2)
    done = subprocess.run([*launch, *told], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    texts = texts_of(output)
    assert [texts[f"round-1/samples-{n}.jsonl"].count("\n") for n in (0, 1)] == [3, 2]
    assert texts["round-1/selected.jsonl"].count("\n") == 5
    assert len(json.loads((output / "summary.json").read_text())["metrics"]["rewards"]) == 2


def test_bad_input(checkpoint, tmp_path, monkeypatch):
    row, data, out = "baichuan rope", write_prompts(tmp_path / "prompts.jsonl"), tmp_path / "out"
    other = write_checkpoint("qwen", tmp_path / "qwen")
    for message, changes in {
        "--rounds must be at least 1, got 0": {"rounds": 0},
        "leave --eval_strategy out": {"eval_strategy": "epoch"},
        "glm fills blanks": {"model": write_checkpoint("glm", tmp_path / "glm")},
        "--reward is missing or mixed": {"reward": f"length {other}"},
        "is of another vocabulary": {"reward": other},
        "longer than --max_prompt_length 2": {"max_prompt_length": 2},
        "--template must be one of": {"template": "none"},
    }.items():
        with pytest.raises(ValueError, match=message):
            run(monkeypatch, row, checkpoint, data, out, **changes)
        assert not out.exists(), message


def test_an_interrupted_run_tells_how_to_go_on(checkpoint, tmp_path, monkeypatch):
    data, batches = write_prompts(tmp_path / "prompts.jsonl", 4), []

    def interrupted(queries, responses):
        batches.append(queries)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return [0.0] * len(responses)

    monkeypatch.setitem(REWARDS, "chinese", interrupted)
    with pytest.raises(KeyboardInterrupt, match="add --resume to go on behind the answers and models"):
        run(monkeypatch, "baichuan rope", checkpoint, data, tmp_path / "out", queries_per_batch=2)
    assert texts_of(tmp_path / "out")["round-1/samples-0.jsonl"].count("\n") == 2
