"""PPO: the trainer and the recipe on real models."""

import json
import math
import shutil
import subprocess
import sys
from functools import cache

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_cnllm import load_instructions, reply_end_ids
from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint
from hf_cnllm.recipes.ppo import main, read_ptx_rows
from hf_cnllm.training.critic import Critic
from hf_cnllm.training.ppo import PPOConfig, PPOTrainer
from hf_cnllm.training.ppo_equations import (
    token_log_probs,
)
from hf_cnllm.training.pretrain_data import Documents
from hf_cnllm.training.reward import REWARDS
from hf_cnllm.training.sampling import encode_queries, read_queries

# --- real models ---

CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
SIZES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"intermediate_size": 64, "num_attention_heads": 4}),
    "bloom": (BloomForCausalLM, BloomConfig, {"n_head": 4}),
}


def write_foreign(name, folder, vocab_size=400):
    """A tiny model of transformers' own, with a BPE tokenizer trained here."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [message["content"] for chat in load_instructions("en") for message in chat]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts, trainer)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHATML, **names)
    fast.save_pretrained(folder)
    model_class, config_class, more = SIZES[name]
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 256}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model_class(config_class(**sizes, **ids, **more)).save_pretrained(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    @cache
    def write(name):
        folder = tmp_path_factory.mktemp("models") / name
        if name in SIZES:
            write_foreign(name, folder)
        elif name == "baichuan-alibi":
            shutil.copytree(write("baichuan"), folder)
            config = AutoConfig.from_pretrained(folder, position_embedding="alibi")
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        else:
            write_tiny_checkpoint(name, folder)
        return folder

    return write


def options(folder, **changes):
    settings = {
        "max_steps": 3,
        "queries_per_device": 4,
        "per_device_train_batch_size": 4,
        "max_new_tokens": 6,
        "critic_warmup_steps": 1,
        "learning_rate": 1e-3,
        "critic_learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return PPOConfig(output_dir=str(folder), **settings | changes)


def make_trainer(
    path, folder, reward=REWARDS["length"], model=None, critic=None, ptx_rows=None, reference=None, **changes
):
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path) if model is None else model
    ends = reply_end_ids(tokenizer, model.generation_config)
    rows = [{"messages": chat[:1], "tools": None} for chat in load_instructions("en")[:8]]
    queries = [row["query"] for row in encode_queries(tokenizer, rows, max_length=512)]
    critic = Critic.from_pretrained(str(path)) if critic is None else critic
    return PPOTrainer(
        model,
        options(folder, **changes),
        queries,
        reward,
        tokenizer,
        critic,
        ends,
        reference=reference,
        ptx_rows=ptx_rows,
    )


def weights(model):
    return {name: values.clone() for name, values in model.state_dict().items()}


def differ(before, model):
    return any(not torch.equal(values, before[name]) for name, values in model.state_dict().items())


QUICK = ["llama", "bloom", "baichuan", "chatglm"]
SLOW = ["baichuan-alibi", "chatglm2", "chatglm3", "qwen"]


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_family(name, checkpoint, tmp_path):
    trainer = make_trainer(checkpoint(name), tmp_path)
    actor, critic = trainer.model, trainer.critic
    before = weights(actor)
    # The rows are padded on both sides; each alone has the same numbers.
    batch, metrics = trainer.collect()
    assert metrics["kl"] == pytest.approx(0, abs=1e-6) and 0 < metrics["entropy"] < math.log(actor.config.vocab_size)
    lengths = batch["mask"].sum(1).int().tolist()
    for row in (0, 1, 7):
        ids = batch["ids"][row][batch["attention"][row].bool()][None]
        with torch.no_grad():
            logits = actor(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -lengths[row] - 1 : -1]
            values = critic(input_ids=ids, attention_mask=torch.ones_like(ids))[:, -lengths[row] - 1 : -1]
        expected = token_log_probs(logits, ids[:, -lengths[row] :])[0]
        torch.testing.assert_close(batch["log_probs"][row, : lengths[row]], expected, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(batch["values"][row, : lengths[row]], values[0], rtol=1e-4, atol=2e-5)
    queries = batch["ids"][:, : -batch["mask"].shape[1]]
    assert torch.equal(queries[0::2], queries[1::2])  # two responses each
    trainer.state.max_steps = 1
    trainer.train()
    assert not differ(before, actor)  # the critic is being warmed up
    trainer.state.max_steps, trainer.control.should_training_stop = 3, False
    trainer.train()
    assert differ(before, actor)
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history)
    assert "policy_loss" not in trainer.state.log_history[0] and "policy_loss" in trainer.state.log_history[1]
    trainer.save_model(str(tmp_path / "saved"))
    assert not differ(weights(actor), AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved" / "critic")
    assert not differ(weights(critic.model), again)


def test_a_prefix_language_model_samples_no_second_start(checkpoint, tmp_path):
    trainer = make_trainer(checkpoint("chatglm"), tmp_path, temperature=100.0, max_new_tokens=32)
    config = trainer.model.config
    batch, _ = trainer.collect()
    answers = batch["ids"][:, -32:]
    for token in (config.gmask_token_id, config.mask_token_id, config.sop_token_id):
        assert not (answers == token).any()


def test_the_critic_begins_as_the_reward_model_or_without_an_opinion(checkpoint):
    path = checkpoint("llama")
    ids = torch.tensor([[1, 7, 9, 2]])
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert not Critic.from_pretrained(str(path))(**asked).any()
    torch.manual_seed(0)
    reward = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    assert Critic(reward)(**asked)[0, -1].item() == pytest.approx(reward(**asked).logits.item(), rel=1e-5)
    with pytest.raises(ValueError, match="sequence classifier with one label"):
        Critic(AutoModelForCausalLM.from_pretrained(path))
    with pytest.raises(ValueError, match="one label"):
        Critic(AutoModelForSequenceClassification.from_pretrained(path, num_labels=2))


def test_with_an_adapter_the_reference_is_the_model_without_it(checkpoint, tmp_path):
    path = checkpoint("llama")
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(path), adapter)
    plain = make_trainer(path, tmp_path, model=model, save_strategy="steps", save_steps=3)
    assert plain.reference is None
    batch, metrics = plain.collect()
    assert metrics["kl"] != 0
    reference = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        of_reference = torch.cat([token_log_probs(*one) for one in plain._logits(reference, [batch])])
    difference = ((batch["log_probs"] - of_reference) * batch["mask"]).sum(1).mean().item()
    assert metrics["kl"] == pytest.approx(difference, rel=1e-4)
    base = weights(model.get_base_model().model.layers[0].mlp.gate_proj)
    plain.train()
    assert not differ(base, model.get_base_model().model.layers[0].mlp.gate_proj)
    assert all("lora_" in name for name in load_file(tmp_path / "checkpoint-3" / "model.safetensors"))
    plain.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path / "saved")
    ids = torch.tensor([[1, 7, 9, 2]])
    torch.testing.assert_close(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_accumulated_gradients_are_those_of_one_big_batch(checkpoint, tmp_path):
    ptx = [{"input_ids": [1, *range(5, 5 + n), 2], "labels": [1, *range(5, 5 + n), 2]} for n in (3, 6, 4, 9)]
    changes = {"critic_warmup_steps": 0, "ptx_coefficient": 0.5, "ptx_batch_size": 2}
    found = []
    for size, parts in ((8, 1), (2, 4)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        trainer = make_trainer(checkpoint("llama"), tmp_path, ptx_rows=ptx, **sizes, **changes)
        batch, _ = trainer.collect()
        found.append((trainer.update(batch), weights(trainer.model), batch))
    (one, weights_of_one, batch), (many, weights_of_many, same) = found
    assert torch.equal(batch["ids"], same["ids"])
    assert one["ptx_loss"] == pytest.approx(0.5 * math.log(400), rel=0.1)
    assert one["loss"] == pytest.approx(one["policy_loss"] + one["value_loss"] + one["ptx_loss"])
    assert one == pytest.approx(many, rel=1e-4, abs=1e-5)
    for name, values in weights_of_one.items():
        torch.testing.assert_close(values, weights_of_many[name], rtol=0, atol=2e-5)


def test_what_the_update_descends_is_the_naive_loss(checkpoint, tmp_path):
    """The losses of a minibatch, from logits of rows that are not padded, token by token."""
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "critic_warmup_steps": 0}
    trainer = make_trainer(checkpoint("llama"), tmp_path, **sizes)
    batch, _ = trainer.collect()
    batch["log_probs"] = batch["log_probs"] + 0.3 * torch.randn_like(batch["log_probs"])  # as after some steps
    batch["values"] = batch["values"] + 0.3 * torch.randn_like(batch["values"])
    policy = value = 0.0
    for row, length in enumerate(batch["mask"].sum(1).int().tolist()):
        ids = batch["ids"][row][batch["attention"][row].bool()][None]
        with torch.no_grad():
            log_probs = trainer.model(input_ids=ids).logits[0].log_softmax(-1)
            values = trainer.critic(input_ids=ids)[0]
        for t in range(length):
            place = ids.shape[1] - length + t
            advantage, target = batch["advantages"][row, t].item(), batch["returns"][row, t].item()
            ratio = math.exp(log_probs[place - 1, ids[0, place]].item() - batch["log_probs"][row, t].item())
            policy -= min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            new, old = values[place - 1].item(), batch["values"][row, t].item()
            value += max((new - target) ** 2, (min(max(new, old - 0.15), old + 0.15) - target) ** 2) / 2
    found = trainer.update(batch)
    tokens = batch["mask"].sum().item()
    assert found["policy_loss"] == pytest.approx(policy / tokens, rel=1e-4, abs=1e-5)
    assert found["value_loss"] == pytest.approx(value / tokens, rel=1e-4, abs=1e-5)


def test_a_cut_response_pays(checkpoint, tmp_path):
    changes = {"normalize_rewards": False, "kl_coefficient": 0.0, "gae_lambda": 1.0}
    for penalty in (0.0, 5.0):
        trainer = make_trainer(
            checkpoint("llama"), tmp_path, lambda q, r: [1.0] * len(r), missing_end_penalty=penalty, **changes
        )
        batch, metrics = trainer.collect()
        assert metrics["ended"] < 1 and metrics["reward"] == 1
        is_cut = ~torch.isin(batch["ids"][:, -6:], torch.tensor(trainer.end_ids)).any(1)
        assert batch["returns"][:, 0].tolist() == pytest.approx([1 - penalty * cut for cut in is_cut.tolist()])


# --- bad input ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"temperature": 0.0}, "--temperature 0.0 must be above 0"),
        ({"top_p": 0.0}, "--top_p 0.0 above 0 and at most 1"),
        ({"ppo_epochs": 0}, "ppo_epochs must be at least 1, got 0"),
        ({"per_device_train_batch_size": 3}, "queries_per_device x responses_per_query is 8, which"),
        ({"kl_target": 0.0}, "--kl_target must be above 0"),
        ({"kl_target": 6.0, "final_kl_coefficient": 0.1}, "give one"),
        ({"save_strategy": "epoch"}, "save_strategy is steps or no"),
        ({"ptx_coefficient": 0.1}, "pre-training examples: give both"),
        ({"reward": lambda q, r: [0.0]}, "returned 1 rewards for 8 responses"),
    ],
)
def test_arguments_that_do_not_go_together(changes, message, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(checkpoint("llama"), tmp_path, **changes).train()


def test_models_of_another_vocabulary(checkpoint, tmp_path):
    write_foreign("llama", tmp_path / "other", vocab_size=410)
    other = str(tmp_path / "other")
    reward = AutoModelForSequenceClassification.from_pretrained(other, num_labels=1)
    parts = {"reward model": {"reward": reward}, "critic": {"critic": Critic(reward)}}
    parts["reference"] = {"reference": AutoModelForCausalLM.from_pretrained(other)}
    for name, part in parts.items():
        with pytest.raises(ValueError, match=f"the {name} is of another vocabulary: 410 tokens, the actor has 400"):
            make_trainer(checkpoint("llama"), tmp_path, **part)


def test_a_reward_model_that_would_read_the_padding(checkpoint, tmp_path):
    path = checkpoint("llama")
    reward = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, pad_token_id=2)
    with pytest.raises(
        ValueError, match="pad_token_id, 0; the config of this one has num_labels 1 and pad_token_id 2"
    ):
        make_trainer(path, tmp_path, reward=reward)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_no_number_stops_the_training(value, checkpoint, tmp_path):
    trainer = make_trainer(checkpoint("llama"), tmp_path, lambda q, r: [value] * len(r))
    with pytest.raises(FloatingPointError, match="a reward is not finite at step 0"):
        trainer.train()


def test_a_loss_that_is_no_number_stops_the_training_with_its_batch(checkpoint, tmp_path):
    trainer = make_trainer(checkpoint("llama"), tmp_path, critic_warmup_steps=0)
    batch, _ = trainer.collect()
    batch["returns"][2, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 0; the batch is in"):
        trainer.update(batch)
    (saved,) = tmp_path.glob("non-finite-loss-*.pt")
    assert not torch.load(saved, weights_only=True)["returns"].isfinite().all()


# --- the recipe ---


def write_queries(path):
    chats = load_instructions("en")[:8]
    lines = [json.dumps({"messages": chat}, ensure_ascii=False) for chat in chats]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


SETTINGS = {
    "max_steps": 4,
    "critic_warmup_steps": 1,
    "queries_per_device": 4,
    "per_device_train_batch_size": 4,
    "max_new_tokens": 6,
    "learning_rate": 1e-3,
    "save_steps": 2,
    "use_cpu": "true",
    "disable_tqdm": "true",
    "report_to": "none",
}


def run(monkeypatch, model, folder, *flags, reward="length", data=None, output="out", **changes):
    data = data or write_queries(folder / "queries.jsonl")
    settings = {"model": model, "reward": reward, "data": data, "output": folder / output, **SETTINGS, **changes}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["ppo.py", "--config", "ppo_qwen.yaml", *words, *flags])
    main()
    return json.loads((folder / output / "summary.json").read_text())


def logs(folder, step):
    return json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]


@pytest.mark.parametrize("flags", [(), ("--use_peft", "--lora_r", "4")], ids=["full", "lora"])
def test_the_recipe_resumes_with_the_numbers_of_a_run_that_did_not_stop(flags, checkpoint, tmp_path, monkeypatch):
    path = checkpoint("llama")
    (tmp_path / "ptx.txt").write_text("The sun is a star.\nWater boils.\n", encoding="utf-8")
    ptx = {"ptx_data": tmp_path / "ptx.txt", "ptx_coefficient": 0.1, "ptx_batch_size": 2, "kl_target": 6.0}
    summary = run(monkeypatch, path, tmp_path, *flags, output="whole", **ptx)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert summary["steps"] == 4 and 0 <= summary["metrics"]["reward_rise_p_value"] <= 1
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    shutil.copytree(whole, cut)  # as if killed while it wrote its last checkpoint
    (cut / "summary.json").unlink()
    (cut / "checkpoint-4" / "complete").unlink()
    (cut / "checkpoint-4" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="another run: kl_target was 6"):
        run(monkeypatch, path, tmp_path, *flags, "--resume", output="cut", **ptx | {"kl_target": 7.0})
    assert run(monkeypatch, path, tmp_path, *flags, "--resume", output="cut", **ptx)["resumed_from"] == "checkpoint-2"
    assert logs(cut, 4) == logs(whole, 4)
    if not flags:
        assert not differ(
            weights(AutoModelForCausalLM.from_pretrained(whole)), AutoModelForCausalLM.from_pretrained(cut)
        )


def test_texts_beside_ppo_are_those_of_pre_training(checkpoint, tmp_path):
    """Ended, and without control tokens of their own; nothing predicts the first token."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("llama"))
    (tmp_path / "ptx.txt").write_text("The </s> sun\u2028is.\n\n好\n", encoding="utf-8-sig")
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    rows = read_ptx_rows(tokenizer, model, [str(tmp_path / "ptx.txt")], [tokenizer.eos_token_id], 64)
    documents = list(Documents([str(tmp_path / "ptx.txt")], tokenizer).epoch(0))
    assert rows == [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in documents] and len(rows) == 2
    assert [ids.index(tokenizer.eos_token_id) for ids in documents] == [len(ids) - 1 for ids in documents]


def test_the_recipe_with_a_reward_model(checkpoint, tmp_path, monkeypatch):
    path, reward = checkpoint("llama"), tmp_path / "reward"
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(path, num_labels=1).save_pretrained(reward)
    AutoTokenizer.from_pretrained(path).save_pretrained(reward)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Why?"}\n{"prompt": "What is water?"}\n', encoding="utf-8")
    summary = run(monkeypatch, path, tmp_path, reward=reward, data=prompts, max_steps=2, save_strategy="no")
    assert math.isfinite(summary["last_loss"])


def refuse(monkeypatch, message, model, folder, **changes):
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, model, folder, **changes)
    assert not (folder / "out").exists()


ASKED, ANSWERED = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?"},
        {"prompt": [ASKED]},  # as TRL has it; its text was asked as Python writes lists
        {"prompt": "Why?", "reference": "So."},
        {"prompt": "Why?", "response": "So."},
        {"messages": [ASKED]},
        {"messages": [ASKED, ANSWERED]},
        {"messages": [ASKED, ANSWERED | {"loss": False}, ANSWERED | {"tool_calls": [{"name": "f", "arguments": {}}]}]},
    ],
)
def test_queries_are_read_in_every_format_of_questions(row, tmp_path):
    path = tmp_path / "queries.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    assert read_queries([str(path)]) == [{"messages": [ASKED], "tools": None}]


def test_fields_of_queries_can_be_left_out(tmp_path):
    path = tmp_path / "queries.jsonl"
    path.write_text(json.dumps({"instruction": "Why?", "output": "So.", "level": 3}), encoding="utf-8")
    with pytest.raises(ValueError, match="field 'level' is not read"):
        read_queries([str(path)])
    assert read_queries([str(path)], ["level"]) == [{"messages": [ASKED], "tools": None}]


def test_bad_input_of_the_recipe(checkpoint, tmp_path, monkeypatch):
    path = checkpoint("llama")
    write_foreign("llama", tmp_path / "other", vocab_size=410)
    refuse(monkeypatch, "of another vocabulary", path, tmp_path, reward=tmp_path / "other")
    refuse(monkeypatch, "longer than --max_prompt_length 2", path, tmp_path, max_prompt_length=2)
    refuse(monkeypatch, "--reward is missing", path, tmp_path, reward="")
    (tmp_path / "empty.jsonl").touch()
    refuse(monkeypatch, "holds no conversation", path, tmp_path, data=tmp_path / "empty.jsonl")
    silent = tmp_path / "silent"
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(silent)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(silent)
    refuse(monkeypatch, "has no chat template", silent, tmp_path)


@pytest.mark.slow
def test_two_processes_have_one_actor(checkpoint, tmp_path):
    """Each samples answers of its own to queries of its own; DDP keeps the weights the same."""
    settings = {"model": checkpoint("llama"), "reward": "length", "data": write_queries(tmp_path / "q.jsonl")}
    settings |= SETTINGS | {"output": tmp_path / "out"}
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += ["-m", "hf_cnllm.recipes.ppo"]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == 4 and math.isfinite(summary["last_loss"])
    assert (tmp_path / "out" / "checkpoint-4" / "random_states_1.pkl").exists()


LEARNING = {
    "max_steps": 80,
    "critic_warmup_steps": 20,
    "learning_rate": 1e-3,
    "critic_learning_rate": 3e-3,
    "queries_per_device": 32,
    "per_device_train_batch_size": 32,
    "max_new_tokens": 8,
    "kl_coefficient": 0.2,
    "save_steps": 80,
}
KL_TARGET = 10.0  # nats per response


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_programmatic_reward_rises(seed, checkpoint, tmp_path, monkeypatch):
    """By the recipe's own test, with the KL under its target and a critic that errs less."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"Say {n}."}) for n in range(64)), encoding="utf-8")
    path = checkpoint("llama")
    summary = run(monkeypatch, path, tmp_path, reward="length", data=prompts, seed=seed, **LEARNING)
    errors = [entry["value_error"] for entry in logs(tmp_path / "out", LEARNING["max_steps"])]
    quarter = len(errors) // 4
    first, last = sum(errors[:quarter]) / quarter, sum(errors[-quarter:]) / quarter
    print(summary["metrics"], f"value error {first:.3f} -> {last:.3f}", summary["seconds"])
    assert summary["metrics"]["reward_rise_p_value"] < 0.01
    assert summary["metrics"]["largest_kl"] < KL_TARGET
    assert last < first
