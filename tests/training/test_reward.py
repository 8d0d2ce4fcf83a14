"""Reward models: the rule that makes one reward of two, and its whitening, by hand; the data; and the recipe on real models."""

import json
import math
import random
import shutil
import sys
from functools import partial

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainingArguments,
    get_scheduler,
)
from trl import ModelConfig, RewardConfig

from hf_cnllm import load_instructions, reply_end_ids
from hf_cnllm.data.formats import ConversationError
from hf_cnllm.recipes import ppo, rejection_sampling, reward
from hf_cnllm.recipes.reward import RewardTrainer
from hf_cnllm.training.ppo import PPOConfig
from hf_cnllm.training.ppo_equations import RunningMoments
from hf_cnllm.training.recipe import parse_arguments
from hf_cnllm.training.reward import REWARDS, RewardModels, combined_rewards, load_reward, score_responses
from hf_cnllm.training.reward_data import MARGINS, encode_pairs, read_rated_pair, split_by_prompt
from hf_cnllm.training.sampling import encode_queries, pad_apart_from_ends, sample_responses
from hf_cnllm.training.sft_data import use_template
from sft_models import ROWS, write_checkpoint, write_row

CHATS = {row: (name, template) for row, (name, _, template) in ROWS.items() if name != "glm"}


def families(*quick):
    return [row if row in quick else pytest.param(row, marks=pytest.mark.slow) for row in CHATS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a tiny checkpoint, by its row in `ROWS`."""
    return partial(write_row, root=tmp_path_factory.mktemp("models"))


# --- two reward models as one ---


def logit(probability):
    return math.log(probability / (1 - probability))


def test_the_reward_of_two_models_by_hand():
    """R_s where the query is one of safety or R_s < 0.15, else R_h; then the logit, whitened."""
    safe = torch.tensor([logit(p) for p in (0.9, 0.14, 0.16, 0.9)])
    helpful = torch.tensor([logit(p) for p in (0.3, 0.8, 0.8, 0.6)])
    combined = combined_rewards(helpful, safe, torch.tensor([True, False, False, False]))
    expected = [2.19722458, -1.81529, 1.38629436, 0.40546511]  # of 0.9, 0.14, 0.8, 0.6
    assert combined.tolist() == pytest.approx(expected, abs=1e-5)
    moments = RunningMoments()
    moments.update(combined)
    # mean 0.54342351; deviation sqrt((1.65380² + 2.35871² + 0.84287² + 0.13796²) / 4) = 1.50234
    whitened = [1.10082, -1.57003, 0.56104, -0.09183]
    assert moments.normalize(combined).tolist() == pytest.approx(whitened, abs=1e-4)


def classifier(path, seed):
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1).eval()
    torch.nn.init.normal_(model.score.weight, std=1.0)
    return model


def test_which_queries_are_of_safety(checkpoint):
    path = checkpoint("llama")
    helpful, safe = (classifier(path, seed) for seed in (0, 1))
    for model in (helpful, safe):
        model.config.pad_token_id = 0
    queries = [[1, 7, 9], [1, 8, 9], [1, 7, 9, 9]]
    ids = torch.tensor([[0, 1, 7, 9, 30, 2], [0, 1, 8, 9, 31, 2], [1, 7, 9, 9, 32, 2]])
    attention = (ids != 0).long()
    with torch.no_grad():
        of_helpful, of_safe, of_both = (
            reward(queries, ids, attention)
            for reward in (
                RewardModels(helpful),
                RewardModels(safe),
                RewardModels(helpful, safe, safety_queries=[[1, 8, 9]]),
            )
        )
    for number, is_safety in enumerate((False, True, False)):
        judge = of_safe if is_safety or of_safe[number].sigmoid() < 0.15 else of_helpful
        assert of_both[number] == judge[number]
    assert of_both[1] == of_safe[1] != of_helpful[1]


def test_what_is_no_reward(checkpoint, tmp_path):
    path = checkpoint("llama")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = classifier(path, 0)
    with pytest.raises(ValueError, match="of one model, or of a helpful and a safe one, got 3"):
        RewardModels(model, model, model)
    with pytest.raises(ValueError, match="queries of safety need a second reward model"):
        RewardModels(model, safety_queries=[[1]])
    for names, safety in (([], []), ([""], []), (["length", str(path)], []), (["length"], [[1]])):
        with pytest.raises(ValueError, match="--reward is missing or mixed"):
            load_reward(names, tokenizer, safety)
    batch = {"ids": torch.ones(2, 2, dtype=torch.long), "mask": torch.ones(2, 1)}
    with pytest.raises(ValueError, match="returned 1 rewards for 2 responses"):
        score_responses(lambda queries, responses: [0.0], tokenizer, [[1], [1]], batch, 2)


# --- the data ---

PAIR = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}


@pytest.mark.parametrize(
    ("more", "margins", "expected"),
    [
        ({}, None, None),
        ({"rating": "better"}, None, None),
        ({"rating": "significantly better"}, "small", 1.0),
        ({"rating": "slightly better"}, "small", 1 / 3),
        ({"rating": "better"}, "large", 2.0),
        ({"rating": "negligibly better"}, "large", 0.0),
        ({"margin": 0.7}, "small", 0.7),
    ],
)
def test_margins(more, margins, expected):
    assert read_rated_pair(PAIR | more, margins=margins).get("margin") == expected


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "field 'margin' must be a number from 0 on, or 'rating' be there; got None"),
        ({"rating": ["better"]}, "field 'rating' must be one of"),
        ({"rating": "best"}, "field 'rating' must be one of significantly better, better, slightly better, negl"),
        ({"margin": -1}, "from 0 on"),
        ({"margin": True}, "a number"),
        ({"margin": float("nan")}, "a number"),
    ],
)
def test_margins_that_are_none(more, message):
    with pytest.raises(ConversationError, match=message):
        read_rated_pair(PAIR | more, margins="small")


def test_prompts_that_are_held_out_are_not_learned():
    rows = [{"prompt": [{"role": "user", "content": str(n % 20)}], "number": n} for n in range(60)]
    learned, held_out = split_by_prompt(rows, 0.2, seed=0)
    assert len(held_out) == 12 and len(learned) == 48
    assert not {row["number"] % 20 for row in learned} & {row["number"] % 20 for row in held_out}
    assert split_by_prompt(rows, 0.2, seed=0) == (learned, held_out) != split_by_prompt(rows, 0.2, seed=1)
    for part, some in ((0.0, rows), (1.0, rows), (0.1, rows[:1])):
        with pytest.raises(ValueError, match="leaves nothing to learn, or to evaluate on"):
            split_by_prompt(some, part, seed=0)


def read(rows, **options):
    return [read_rated_pair(row, **options) for row in rows]


def asked(row, checkpoint):
    """What asks and judges answers in the form of a family: tokenizer, language model, the ends of answers."""
    path, template = checkpoint(row), CHATS[row][1]
    tokenizer = AutoTokenizer.from_pretrained(path)
    use_template(tokenizer, template)
    model = AutoModelForCausalLM.from_pretrained(path)
    ends = reply_end_ids(tokenizer, model.generation_config)
    pad_apart_from_ends(tokenizer, ends)
    return tokenizer, model, ends


@pytest.mark.parametrize("row", families("baichuan rope", "chatglm", "chatglm3", "llama"))
def test_what_is_learned_has_the_form_of_what_is_sampled(row, checkpoint):
    """A pair begins as a query does and ends with the end of its answer; both are judged alike, alone or padded in a batch."""
    tokenizer, model, ends = asked(row, checkpoint)
    pair = {"prompt": "What is water?", "chosen": "Water is wet.", "rejected": "A stone, which is not wet at all."}
    (example,), _ = encode_pairs(tokenizer, read([pair]), ends, None)
    rows = [{"messages": [{"role": "user", "content": text}], "tools": None} for text in ("What is water?", "Why?")]
    queries = [one["query"] for one in encode_queries(tokenizer, rows, 512)]
    for side in ("chosen", "rejected"):
        ids = example[f"{side}_ids"]
        assert ids[: len(queries[0])] == queries[0] and ids[-1] in ends and ends[0] not in ids[len(queries[0]) : -1]
    assert tokenizer.pad_token_id != example["chosen_ids"][-1]

    torch.manual_seed(0)
    judge = AutoModelForSequenceClassification.from_pretrained(checkpoint(row), num_labels=1).eval()
    judge.config.pad_token_id = tokenizer.pad_token_id
    torch.manual_seed(0)
    batch, _ = sample_responses(model, queries, ends, tokenizer.pad_token_id, max_new_tokens=6)
    batch["ids"][0, -2:], batch["attention"][0, -2:] = tokenizer.pad_token_id, 0
    batch["ids"][0, -3] = ends[0]  # an answer that ends early
    with torch.no_grad():
        scores = score_responses(RewardModels(judge), tokenizer, queries, batch, 1)
        for ids, attention, score in zip(batch["ids"], batch["attention"], scores, strict=True):
            alone = ids[attention.bool()][None]
            logits = judge(input_ids=alone, attention_mask=torch.ones_like(alone)).logits
            assert score.item() == pytest.approx(logits.item(), rel=1e-4, abs=1e-5)


def test_pairs_that_are_left_out(checkpoint):
    tokenizer, _, ends = asked("baichuan rope", checkpoint)
    rows = read([PAIR, PAIR | {"chosen": "No."}, PAIR | {"chosen": "word " * 50}])
    examples, left_out = encode_pairs(tokenizer, rows, ends, 40)
    assert len(examples) == 1
    assert left_out == {"of two equal answers": 1, "longer than --max_length 40": 1}
    with pytest.raises(ValueError, match="none of the 2 pairs can be learned"):
        encode_pairs(tokenizer, rows[1:], ends, 40)
    tokenizer, _, ends = asked("llama", checkpoint)
    with pytest.raises(ConversationError, match="would read the text '</s>' as a control token"):
        encode_pairs(tokenizer, read([PAIR | {"chosen": "a</s>b"}]), ends, None)


# --- the recipe ---

SETTINGS = {
    "max_steps": 12,
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 8,
    "gradient_checkpointing": "false",
    "held_out": 0.25,
    "save_strategy": "no",
    "use_cpu": "true",
    "disable_tqdm": "true",
    "report_to": "none",
    "logging_steps": 1,
}


def write_pairs(path, count=80, prefers=lambda is_chinese: True, **more):
    """Questions of both languages, each answered in Chinese and in English; which is preferred may depend on the question's."""
    rng = random.Random(0)
    answers = {True: load_instructions("zh"), False: load_instructions("en")}
    rows = []
    for is_chinese, questions in answers.items():
        for chat in questions[: count // 2]:
            good = prefers(is_chinese)
            chosen, rejected = (rng.choice(answers[one])[-1]["content"][:20] for one in (good, not good))
            rows.append({"prompt": chat[0]["content"][:20], "chosen": chosen, "rejected": rejected, **more})
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


def run(monkeypatch, row, checkpoint, data, output, *flags, **changes):
    template = {"template": CHATS[row][1]} if CHATS[row][1] else {}
    settings = {"model": checkpoint(row), "data": data, "output": output, **SETTINGS, **template, **changes}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["reward.py", *words, *flags])
    reward.main()
    return json.loads((output / "summary.json").read_text())


@pytest.mark.parametrize("row", families("baichuan rope", "llama"))
def test_a_preference_is_learned_and_kept(row, checkpoint, tmp_path, monkeypatch):
    """On prompts that were held out; what is saved loads by itself and gives the same rewards."""
    data = write_pairs(tmp_path / "pairs.jsonl")
    summary = run(
        monkeypatch, row, checkpoint, data, tmp_path / "out", max_steps=40 if row in ("bloom", "llama") else 12
    )
    assert summary["metrics"]["held_out_accuracy"] >= 0.9, summary
    assert summary["last_loss"] < summary["first_loss"] == pytest.approx(math.log(2), abs=0.1)
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert judge.config.pad_token_id == tokenizer.pad_token_id
    ends = reply_end_ids(tokenizer, AutoModelForCausalLM.from_pretrained(checkpoint(row)).generation_config)
    _, held_out = split_by_prompt(read(map(json.loads, data.read_text("utf-8").splitlines())), 0.25, seed=42)
    examples, _ = encode_pairs(tokenizer, held_out, ends, 1024)
    with torch.no_grad():
        rewards = [
            [judge(input_ids=torch.tensor([one[f"{side}_ids"]])).logits.item() for side in ("chosen", "rejected")]
            for one in examples
        ]
    right = sum(chosen > rejected for chosen, rejected in rewards) / len(rewards)
    assert right == pytest.approx(summary["metrics"]["held_out_accuracy"])
    assert summary["metrics"]["held_out_pairs"] == len(examples)


@pytest.mark.slow
@pytest.mark.parametrize("row", ["baichuan alibi", "llama"])
def test_a_preference_that_depends_on_the_question(row, checkpoint, tmp_path, monkeypatch):
    """An answer in the question's language is preferred: neither answer is better by itself."""
    data = write_pairs(tmp_path / "pairs.jsonl", 230, prefers=lambda is_chinese: is_chinese)
    found = run(
        monkeypatch,
        row,
        checkpoint,
        data,
        tmp_path / "out",
        max_steps=300,
        learning_rate=1e-3,
        per_device_train_batch_size=16,
        logging_steps=50,
    )
    print(row, found["metrics"])
    assert found["metrics"]["held_out_accuracy"] >= 0.9


@pytest.mark.parametrize("flags", [(), ("--use_peft", "--lora_r", "4")], ids=["full", "lora"])
def test_resumed_exactly_with_margins(flags, checkpoint, tmp_path, monkeypatch):
    data = write_pairs(tmp_path / "pairs.jsonl", rating="significantly better")
    settings = {"margins": "large", "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    summary = run(monkeypatch, "baichuan rope", checkpoint, data, whole, *flags, **settings)
    assert summary["first_loss"] == pytest.approx(math.log(1 + math.exp(3)), abs=0.1)  # −log σ(0 − 3)
    shutil.copytree(whole, cut)
    (cut / "summary.json").unlink()
    (cut / "checkpoint-6" / "complete").unlink()
    assert run(monkeypatch, "baichuan rope", checkpoint, data, cut, *flags, "--resume", **settings)["resumed_from"]

    def losses(folder):
        state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
        return [entry["loss"] for entry in state["log_history"] if "loss" in entry]

    assert losses(cut) == losses(whole)
    tokenizer = AutoTokenizer.from_pretrained(whole)
    judges = [load_reward([str(folder)], tokenizer) for folder in (whole, cut)]
    ids = torch.tensor([[5, 9, 2]])
    scores = [judge.eval()([[5, 9]], ids, torch.ones_like(ids)).item() for judge in judges]
    assert scores[0] == scores[1] != 0


def test_the_margin_loss_is_the_papers(checkpoint, tmp_path):
    """L = −log σ(r_c − r_r − m) (Llama 2, equation 2)."""
    from datasets import Dataset

    tokenizer, _, ends = asked("baichuan rope", checkpoint)
    rows = [PAIR | {"rating": rating} for rating in MARGINS["large"]]
    examples, _ = encode_pairs(tokenizer, read(rows, margins="large"), ends, None)
    judge = AutoModelForSequenceClassification.from_pretrained(checkpoint("baichuan rope"), num_labels=1)
    arguments = RewardConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False)
    trainer = RewardTrainer(judge, arguments, train_dataset=Dataset.from_list(examples), processing_class=tokenizer)
    with torch.no_grad():
        loss = trainer.compute_loss(judge, trainer.data_collator(examples)).item()
        chosen, rejected = (
            judge(input_ids=torch.tensor([examples[0][f"{side}_ids"]])).logits.item()
            for side in ("chosen", "rejected")
        )
    expected = [math.log(1 + math.exp(-(chosen - rejected - margin))) for margin in (3, 2, 1, 0)]
    assert loss == pytest.approx(sum(expected) / 4, rel=1e-5)


def test_a_second_stage_learns_on_with_the_head_of_the_first(checkpoint, tmp_path, monkeypatch):
    """Preference-model pre-training, then the reward model (Qwen, section 3.2.1); PPO takes what comes out."""
    data, first, second = write_pairs(tmp_path / "pairs.jsonl"), tmp_path / "pmp", tmp_path / "reward"
    row = "baichuan rope"
    pretrained = run(monkeypatch, row, checkpoint, data, first)
    same = run(monkeypatch, row, checkpoint, data, second, model=first, max_steps=1, learning_rate=0.0)
    assert same["metrics"] == pretrained["metrics"]
    assert same["first_loss"] < 0.3 < pretrained["first_loss"]
    queries = tmp_path / "queries.jsonl"
    queries.write_text('{"prompt": "Why?"}\n{"prompt": "Where?"}\n', encoding="utf-8")
    words = f"ppo.py --model {checkpoint(row)} --data {queries} --safety_data {queries} --output {tmp_path / 'ppo'} "
    words += (
        f"--reward {second} {first} --max_steps 2 --critic_warmup_steps 1 --queries_per_device 2 --max_new_tokens 4 "
    )
    words += "--per_device_train_batch_size 4 --save_strategy no --use_cpu true --disable_tqdm true --report_to none"
    monkeypatch.setattr(sys, "argv", words.split())
    ppo.main()
    assert math.isfinite(json.loads((tmp_path / "ppo" / "summary.json").read_text())["last_loss"])


def test_bad_input(checkpoint, tmp_path, monkeypatch):
    data = write_pairs(tmp_path / "pairs.jsonl", count=4)
    row, out = "baichuan rope", tmp_path / "out"
    two, broken = tmp_path / "two", tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(PAIR) + '\n{"prompt": "Why?", "chosen": "Because."}\n')
    AutoModelForSequenceClassification.from_pretrained(checkpoint(row), num_labels=2).save_pretrained(two)
    AutoTokenizer.from_pretrained(checkpoint(row)).save_pretrained(two)
    for message, changes in {
        "--margins must be one of small, large, got 'huge'": {"margins": "huge"},
        "pairs.jsonl, line 1: field 'margin' must be a number": {"margins": "small"},
        "broken.jsonl, line 2: needs the field 'rejected'": {"data": broken},
        "--held_out 1.5 of": {"held_out": 1.5},
        "a reward model has one label": {"model": two},
        "glm has no sequence classifier": {"model": write_checkpoint("glm", tmp_path / "glm"), "template": "vicuna"},
        "--chat_template_path is not read here": {"chat_template_path": "x"},
        "none of the .* pairs can be learned": {"max_length": 3},
        "cannot be trained: add --use_peft": {"load_in_8bit": "true"},
    }.items():
        arguments = {"data": data} | changes
        with pytest.raises(ValueError, match=message):
            run(monkeypatch, row, checkpoint, arguments.pop("data"), out, **arguments)
        assert not out.exists(), message


SETTINGS_OF_PAPERS = {
    "ppo_baichuan2": (ppo.PPOArguments, PPOConfig),
    "ppo_llama2": (ppo.PPOArguments, PPOConfig),
    "ppo_qwen": (ppo.PPOArguments, PPOConfig),
    "rejection_sampling_llama2": (rejection_sampling.RejectionArguments, TrainingArguments),
    "reward_llama2": (reward.RewardArguments, RewardConfig),
    "reward_qwen": (reward.RewardArguments, RewardConfig),
}


@pytest.mark.parametrize("config", SETTINGS_OF_PAPERS)
def test_the_papers_settings_are_understood(config, tmp_path, monkeypatch):
    words = f"{config} --config {config}.yaml --model m --data d --output {tmp_path} --use_cpu true --report_to none"
    monkeypatch.setattr(sys, "argv", words.split())
    _, training, _ = parse_arguments("", *SETTINGS_OF_PAPERS[config], ModelConfig)
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert batch in {"reward_llama2": [512], "ppo_qwen": [8], "ppo_baichuan2": [8]}.get(config, [64])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    kwargs = {"scheduler_specific_kwargs": training.lr_scheduler_kwargs or {}}
    assert get_scheduler(training.lr_scheduler_type, optimizer, training.get_warmup_steps(100), 100, **kwargs)


def test_texts_that_need_no_model():
    assert REWARDS["length"](["?", "?"], ["ab", ""]) == [2, 0]
    assert REWARDS["chinese"](["?", "?", "?"], ["水a", "", "水火"]) == [0.5, 0.0, 1.0]
