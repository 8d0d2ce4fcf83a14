"""The SFT recipe on every family: trained, accumulated, resumed; adapters; what it refuses."""

import json
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

from hf_cnllm.data.conversations import data_set_rows
from hf_cnllm.data.formats import ConversationError, to_messages
from hf_cnllm.recipes import sft
from hf_cnllm.training.recipe import parse_arguments, run_recipe
from hf_cnllm.training.sft_data import encode_rows, make_batches
from sft_models import CHATS, ROWS, ROWS_OF_DATA, loaded, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a tiny checkpoint, by its name."""
    root = tmp_path_factory.mktemp("sft")
    return lambda name: write_checkpoint(name, root / name)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in CHATS))
    return path


def run(monkeypatch, folder, data, output, *options):
    common = "--use_cpu --report_to none --logging_steps 1 --disable_tqdm true --max_length 256 --save_strategy no"
    words = ["--model", folder, "--data", data, "--output", output, *common.split(), *options]
    monkeypatch.setattr(sys, "argv", ["sft", *map(str, words)])
    sft.main()
    return json.loads((output / "summary.json").read_text())


# ---- training


@pytest.mark.parametrize("row", ["baichuan alibi", "baichuan rope", "glm", "bloom"])
def test_accumulated_gradients_are_those_of_one_batch(row, checkpoint, tmp_path):
    """With max-z too, though the micro-batches differ in how many tokens are learned and how much is padding."""
    name, changes, template = ROWS[row]
    weights = []
    for steps in (1, 3):
        model, tokenizer = loaded(checkpoint(name), changes, template)
        examples, _ = encode_rows(model, tokenizer, ROWS_OF_DATA, 128)
        dataset, collate = make_batches(model, tokenizer, examples)
        arguments = transformers.TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", max_steps=1, optim="sgd",
            learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0, gradient_accumulation_steps=steps,
            per_device_train_batch_size=6 // steps, remove_unused_columns=False,
        )  # fmt: skip
        sft.SFTTrainer(model, arguments, data_collator=collate, train_dataset=dataset).train()
        weights.append(dict(model.named_parameters()))
    for key, value in weights[0].items():
        torch.testing.assert_close(
            value, weights[1][key], atol=1e-5, rtol=1e-5, msg=lambda said, key=key: f"{key}: {said}"
        )


@pytest.mark.parametrize("row", ROWS)
def test_every_family_trains_and_loads_again(row, checkpoint, data, tmp_path, monkeypatch):
    name, _, template = ROWS[row]
    options = ["--max_steps", 2, "--learning_rate", 1e-3] + (["--template", template] if template else [])
    options += ["--z_loss_weight", 2e-4] if name == "baichuan" else []
    options += [] if name == "bloom" else ["--packing"]
    summary = run(monkeypatch, checkpoint(name), data, tmp_path / "out", *options)
    assert summary["last_loss"] < summary["first_loss"]
    kind = transformers.AutoModelForSeq2SeqLM if name == "glm" else AutoModelForCausalLM
    model, tokenizer = kind.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.use_cache and len(tokenizer)
    if name != "glm":
        assert tokenizer.apply_chat_template(CHATS[0]) == tokenizer.apply_chat_template(
            CHATS[0], chat_template=tokenizer.chat_template
        )


@pytest.mark.parametrize("row", ["baichuan rope", "chatglm2", "qwen"])
@pytest.mark.parametrize("kind", ["--use_peft", "--use_peft --use_dora --gradient_checkpointing"])
def test_adapters_train_and_merge(row, kind, checkpoint, data, tmp_path, monkeypatch):
    folder, output = checkpoint(ROWS[row][0]), tmp_path / "out"
    options = ["--max_steps", 2, "--learning_rate", 1e-2, *kind.split()]
    summary = run(monkeypatch, folder, data, output, *options)
    assert summary["last_loss"] < summary["first_loss"]
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), output).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected = adapted(ids).logits
        torch.testing.assert_close(adapted.merge_and_unload()(ids).logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("baichuan", "W_pack"), ("chatglm", "query_key_value"), ("chatglm2", "query_key_value"), ("qwen", "c_attn")],
)
def test_an_untouched_adapter_of_the_original_names_loads_and_merges(name, layer, checkpoint, tmp_path):
    """The file as PEFT writes it for the original code: its layers' names are in the keys and in target_modules."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint(name)).eval()
    torch.manual_seed(1)
    prefix = {"baichuan": "model.layers.{}.self_attn", "qwen": "transformer.h.{}.attn"}
    prefix |= {
        "chatglm": "transformer.layers.{}.attention",
        "chatglm2": "transformer.encoder.layers.{}.self_attention",
    }
    state, changes = {}, {}
    for number in range(4):
        path = f"{prefix[name].format(number)}.{layer}"
        rows, columns = model.get_submodule(path).weight.shape
        a, b = torch.randn(2, columns) / 10, torch.randn(rows, 2) / 10
        state |= {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
        changes[f"{path}.weight"] = 2 * b @ a
    from safetensors.torch import save_file

    save_file(state, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": [layer]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "original"}))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    merged = PeftModel.from_pretrained(model, tmp_path).merge_and_unload()
    for key, value in merged.state_dict().items():
        torch.testing.assert_close(value, before[key] + changes.get(key, 0), atol=1e-5, rtol=0, msg=key)


@pytest.mark.parametrize("row", ["baichuan alibi", "chatglm2", "qwen", "llama"])
def test_a_4_bit_model_gets_an_adapter(row, checkpoint, data, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    name, _, template = ROWS[row]
    options = ["--max_steps", 2, "--learning_rate", 1e-2, "--use_peft", "--load_in_4bit", "--packing"]
    options += ["--template", template] if template else []
    summary = run(monkeypatch, checkpoint(name), data, tmp_path / "out", *options)
    assert summary["last_loss"] < summary["first_loss"]


def test_neftune_adds_noise_and_leaves_the_model_without(checkpoint, data, tmp_path, monkeypatch):
    first = []
    for number, options in enumerate(([], ["--neftune_noise_alpha", 15])):
        one = run(monkeypatch, checkpoint("baichuan"), data, tmp_path / str(number), "--max_steps", 1, *options)
        first.append(one["first_loss"])
    assert abs(first[0] - first[1]) > 1e-3


def test_a_resumed_run_has_the_losses_of_one_that_was_not_interrupted(checkpoint, data, tmp_path, monkeypatch):
    options = ["--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2, "--per_device_train_batch_size", 2]
    folder, output = checkpoint("baichuan"), tmp_path / "out"
    run(monkeypatch, folder, data, output, *options)
    log = json.loads((output / "checkpoint-4/trainer_state.json").read_text())["log_history"]
    (output / "summary.json").unlink()
    (output / "checkpoint-4/complete").unlink()  # as if it was killed while it wrote this one
    again = run(monkeypatch, folder, data, output, *options, "--resume")
    assert again["resumed_from"] == "checkpoint-2"
    resumed = json.loads((output / "checkpoint-4/trainer_state.json").read_text())["log_history"]
    assert [one["loss"] for one in resumed] == [one["loss"] for one in log]


@pytest.mark.parametrize("complete", [True, False])
def test_ctrl_c_leaves_whole_checkpoints_only(complete, checkpoint, data, tmp_path, monkeypatch, capsys, request):
    """A real signal, while the second checkpoint is written, or the first."""
    output, save_optimizer = tmp_path / "out", sft.SFTTrainer._save_optimizer_and_scheduler

    def interrupted(trainer, folder):
        if trainer.state.global_step == (2 if complete else 1):
            assert (output / f"checkpoint-{trainer.state.global_step}" / "model.safetensors").exists()
            signal.raise_signal(signal.SIGINT)
        save_optimizer(trainer, folder)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a run in the background has not
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    options = ["--max_steps", 3, "--save_strategy", "steps", "--save_steps", 1]
    words = (monkeypatch, checkpoint("baichuan"), data, output, *options)
    with monkeypatch.context() as patch:
        patch.setattr(sft.SFTTrainer, "_save_optimizer_and_scheduler", interrupted)
        with pytest.raises(SystemExit) as stopped:
            run_recipe(lambda: run(*words))
    said = "add --resume to go on from checkpoint-1" if complete else "no checkpoint was complete yet"
    assert stopped.value.code == 130 and capsys.readouterr().err.endswith(f"\ninterrupted: {said}\n")
    assert [path.name for path in output.glob("*-*")] == ["checkpoint-1"] if complete else not output.exists()
    assert run(*words, *(["--resume"] if complete else []))["steps"] == 3


# ---- data, and what is refused


def test_data_sets_are_read_by_their_folder(checkpoint, tmp_path, monkeypatch):
    from datasets import Dataset

    (tmp_path / "set").mkdir()
    rows = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}] * 2
    Dataset.from_list(rows).to_parquet(tmp_path / "set/train.parquet")
    summary = run(monkeypatch, checkpoint("baichuan"), tmp_path / "set", tmp_path / "out", "--max_steps", 1)
    assert summary["steps"] == 1


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("second", "why"), [('{"config": 1}', "column names"), ('{"prompt":', "JSON")])
def test_a_folder_that_datasets_cannot_read_is_named(second, why, streaming, tmp_path):
    (tmp_path / "1.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "2.jsonl").write_text(second)
    with pytest.raises(ConversationError, match=f"makes no rows of it: give files of rows.*{why}") as error:
        list(data_set_rows(str(tmp_path), "train", streaming))
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


QUESTION, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ("", [], "there is no row"),
        ('{"messages": [', [], "line 1: not valid JSON"),
        ({"messages": [{"role": "user"}, ANSWER]}, [], "line 1: field 'messages[0].content' must be"),
        ({"messages": [ANSWER]}, [], "line 1: field 'messages[0].role' must be 'user' or 'system'"),
        ({"messages": [QUESTION]}, [], "must end with a message of the assistant"),
        ({"messages": [QUESTION, {**ANSWER, "loss": False}]}, [], "conversation 1: nothing of it would be learned"),
        ({"messages": [QUESTION, ANSWER]}, ["--template", "chatml"], "--template must be one of alpaca"),
        ({"messages": [QUESTION, ANSWER]}, ["--model", "llama"], "no chat template: choose one with --template"),
        ({"messages": [QUESTION, ANSWER]}, ["--load_in_8bit"], "add --use_peft"),
        ({"messages": [QUESTION, ANSWER]}, ["--lora_r", 4], "--lora_r is a setting of an adapter: add --use_peft"),
        ({"messages": [QUESTION, ANSWER]}, ["--use-dora", "true"], "--use-dora is a setting of an adapter"),
        (
            {"messages": [QUESTION, ANSWER]},
            ["--max_length", 2],
            "conversation 1: nothing of it would be learned: of the",
        ),
        *[
            ({"messages": [QUESTION, ANSWER]}, ["--model", "glm", "--max_length", length], "conversation 1: of ")
            for length in (-3, 0, 3)
        ],
        ({"messages": [QUESTION, ANSWER]}, ["--model", "qwen", "--z_loss_weight", "1"], "has no max-z loss"),
    ],
)
def test_what_the_user_can_mend_is_one_line(rows, options, said, checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "data.jsonl").write_text(rows if isinstance(rows, str) else json.dumps(rows))
    if "--load_in_8bit" in options:
        pytest.importorskip("bitsandbytes")
    name = options.pop(options.index("--model") + 1) if "--model" in options else "baichuan"
    options = [option for option in options if option != "--model"]
    words = ["--model", checkpoint(name), "--data", tmp_path / "data.jsonl", "--output", tmp_path / "out", *options]
    monkeypatch.setattr(sys, "argv", ["sft", *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        run_recipe(sft.main)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sft: error: ")]
    assert stopped.value.code == 2 and said in line
    assert not (tmp_path / "out").exists()


def test_the_commands_for_the_published_scripts_are_understood(monkeypatch):
    page = (Path(__file__).parents[2] / "docs/training.md").read_text(encoding="utf-8")
    table = page.partition("### The published scripts' commands")[2].partition("\n\nOptions of")[0]
    commands = [re.findall(r"`(--[^`]+)`", row.split("|")[2]) for row in table.splitlines() if row.startswith("| ")]
    commands = [" ".join(command) for command in commands if command]
    assert len(commands) >= 8
    commands += [f"--config {name}.yaml" for name in ("sft", "sft_lora", "sft_qlora")]
    for command in commands:
        words = ["sft", "--model", "m", "--output", "o", "--data", "d", *command.split()]
        monkeypatch.setattr(sys, "argv", words)
        parse_arguments("", sft.SFTArguments, transformers.TrainingArguments, ModelConfig)


def test_alpaca_and_sharegpt_are_the_same_conversation():
    sharegpt = [{"from": "human", "value": "q\ni"}, {"from": "gpt", "value": "a"}]
    alpaca = {"instruction": "q", "input": "i", "output": "a"}
    assert to_messages({"conversations": sharegpt}) == to_messages(alpaca)
