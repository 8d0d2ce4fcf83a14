"""Pre-training on streams of texts: what a row is, its losses, resuming, new models, and what is refused."""

import json
import random
import re
import subprocess
import sys
from collections import deque
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from trl import ModelConfig

from hf_cnllm.data.conversations import load_instructions
from hf_cnllm.data.formats import ConversationError
from hf_cnllm.data.packing import pack, pieces
from hf_cnllm.recipes import pretrain, pretrain_glm
from hf_cnllm.training.pretrain import PretrainTrainer
from hf_cnllm.training.pretrain_data import (
    CollatePacked,
    Documents,
    Place,
    Stream,
    StreamState,
    find_sources,
)
from hf_cnllm.training.recipe import parse_arguments, run_recipe
from hf_cnllm.training.sft_data import use_template
from sft_models import ROWS, loaded, write_checkpoint

TEXTS = [message["content"].replace("\n", " ") for chat in load_instructions() for message in chat][:60]
BLANKS = ("glm", "chatglm")
COMMON = "--use_cpu --report_to none --logging_steps 1 --disable_tqdm true --save_strategy no --max_length 64"
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a tiny checkpoint, by its name."""
    root = tmp_path_factory.mktemp("pretrain")
    return lambda name: write_checkpoint(name, root / name)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return path


def run(monkeypatch, folder, data, output, *options, name="pretrain"):
    """The summary, and the losses in the log of the trainer."""
    losses = []
    log = PretrainTrainer.log
    with monkeypatch.context() as patch:
        patch.setattr(PretrainTrainer, "log", lambda self, logs, *a: (losses.append(logs), log(self, logs, *a)))
        words = ["--model", folder, "--data", data, "--output", output, *COMMON.split(), *options]
        patch.setattr(sys, "argv", [name, *map(str, words)])
        import_module(f"hf_cnllm.recipes.{name}").main()
    return json.loads((output / "summary.json").read_text()), [one["loss"] for one in losses if "loss" in one]


# ---- rows


def test_packed_rows_hold_every_token_once():
    rng = random.Random(0)
    documents = [[rng.randrange(100) for _ in range(rng.randrange(1, 30))] for _ in range(50)]
    rows = list(pack(documents, 16))
    assert {len(row["input_ids"]) for row in rows[:-1]} == {16}
    assert [token for row in rows for token in row["input_ids"]] == [token for one in documents for token in one]
    assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) for row in rows)
    kept = [row["input_ids"] for row in pieces(documents, 16)]
    assert max(map(len, kept)) == 16 and min(map(len, kept)) == 2


@pytest.mark.parametrize("is_flat", [False, True], ids=["rows", "flat"])
@pytest.mark.parametrize("row", [name for name in ROWS if name not in BLANKS])
def test_packed_documents_have_the_losses_of_each_alone(row, is_flat, checkpoint):
    """Token by token, in rows that are full, and in a last one that is filled up. BLOOM gets one document a row."""
    name, changes, template = ROWS[row]
    model, tokenizer = loaded(checkpoint(name), changes, template)
    documents = [[*tokenizer(text)["input_ids"][:30], tokenizer.eos_token_id] for text in TEXTS[:7]]
    rows = list((pieces if row == "bloom" else pack)(documents, 48))
    is_packed = row != "bloom"
    batch = CollatePacked(tokenizer.eos_token_id, is_flat and is_packed, has_positions=is_packed)(rows)
    labels = batch.pop("labels").flatten()
    with torch.no_grad():
        logits = model(**batch).logits.flatten(0, 1)
    losses = F.cross_entropy(logits[:-1], labels[1:], reduction="none")
    found, length = [], max(len(one["input_ids"]) for one in rows)
    for number, one in enumerate(rows):
        start = number * length
        for size in one["seq_lengths"]:
            ids = torch.tensor([one["input_ids"][start - number * length :][:size]])
            with torch.no_grad():
                alone = model(input_ids=ids).logits[0]
            expected = F.cross_entropy(alone[:-1], ids[0, 1:], reduction="none")
            torch.testing.assert_close(losses[start : start + size - 1], expected, atol=1e-5, rtol=0)
            found.append(size - 1)
            start += size
    assert (labels != -100).sum() == sum(found)


def test_a_stream_goes_on_for_ever_and_is_the_same_again(checkpoint, texts):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("baichuan"))
    documents = Documents([str(texts)], tokenizer, shuffle_buffer=8, seed=3)
    first, second = (list(documents.epoch(number)) for number in (0, 1))
    assert sorted(first) == sorted(second) and first != second and len(first) == len(TEXTS)
    assert all(document[-1] == tokenizer.eos_token_id for document in first)
    stream = Stream(documents, lambda found: pack(found, 64))
    rows = list(islice(stream, 400))
    assert rows == list(islice(stream, 400)) and len({row["seed"] for row in rows}) == 400
    tokens = [token for row in rows for token in row["input_ids"]]
    both = [token for document in (*first, *second) for token in document]
    assert tokens[: len(both)] == both[: len(tokens)] and len(tokens) > sum(map(len, first))


@pytest.mark.parametrize("make_rows", [pack, pieces])
def test_a_stream_goes_on_from_anywhere_without_reading_what_was_before(make_rows, checkpoint, tmp_path):
    """In the middle of a document, of a row of several documents, and in a later epoch."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("qwen"))
    ids = [*tokenizer("你好")["input_ids"], tokenizer.eos_token_id]
    lines = [{"text": text} for text in TEXTS[:12]] + [{"input_ids": ids * 9}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    documents = Documents([str(tmp_path / "data.jsonl")], tokenizer, shuffle_buffer=4)
    stream = Stream(documents, lambda found: make_rows(found, 16), rows_per_step=3)
    stream.states = deque()  # of any length
    rows = list(islice(stream, 150))
    assert stream.states[-1].place.epoch >= 1 and any(state.place.part for state in stream.states)
    for state in stream.states:
        state = StreamState(*json.loads(json.dumps(state)))
        state = state._replace(place=Place(*state.place))
        resumed = Stream(documents, lambda found: make_rows(found, 16), rows_per_step=3, start=state)
        assert list(islice(resumed, state.rows, 150)) == rows[state.rows :]


def test_files_folders_and_token_ids_are_the_same_documents(checkpoint, texts, tmp_path):
    from datasets import Dataset

    tokenizer = AutoTokenizer.from_pretrained(checkpoint("qwen"))
    expected = list(Documents([str(texts)], tokenizer).epoch(0))
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1.jsonl").write_text("\n".join(json.dumps({"content": text}) for text in TEXTS[:20]))
    Dataset.from_list([{"text": text, "url": "x"} for text in TEXTS[20:40]]).to_parquet(tmp_path / "a/2.parquet")
    rows = list(pack(expected[40:], 64))
    Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows]).to_parquet(tmp_path / "a/3.parquet")
    found = list(Documents(find_sources([str(tmp_path / "a")]), tokenizer).epoch(0))
    assert found[:40] == expected[:40]
    Dataset.from_list(rows).to_parquet(tmp_path / "b.parquet")
    for packed in (found[40:], Documents([str(tmp_path / "b.parquet")], tokenizer).epoch(0)):
        again = list(pack(packed, 64))  # cut behind the end tokens, or where the row says so
        assert [(one["input_ids"], one["seq_lengths"]) for one in again] == [
            (one["input_ids"], one["seq_lengths"]) for one in rows
        ]
    alone = list(Documents([str(tmp_path / "a/1.jsonl")], tokenizer, is_ended=False).epoch(0))
    assert [[*ids, tokenizer.eos_token_id] for ids in alone] == expected[:20]


def test_texts_never_become_control_tokens(checkpoint, tmp_path):
    for name in ("qwen", "llama", "chatglm2"):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint(name))
        (tmp_path / "t.txt").write_text(f"a {tokenizer.eos_token} b")
        ((*ids, end),) = Documents([str(tmp_path / "t.txt")], tokenizer).epoch(0)
        assert end == tokenizer.eos_token_id and end not in ids


# ---- training


@pytest.mark.parametrize("row", ["baichuan alibi", "llama", pytest.param("bloom", marks=SLOW)])
def test_accumulated_gradients_are_those_of_one_batch(row, checkpoint, texts, tmp_path):
    """Max-z too, though each row has another number of documents, and so of tokens that are learned."""
    name, changes, template = ROWS[row]
    changes = {**changes, "z_loss_weight": 0.01} if "z_loss_weight" in changes else changes
    weights = []
    for steps in (1, 4):
        model, tokenizer = loaded(checkpoint(name), changes, template)
        make_rows = pieces if row == "bloom" else pack
        arguments = transformers.TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", max_steps=1, optim="sgd",
            learning_rate=1.0, lr_scheduler_type="constant", max_grad_norm=0.0, gradient_accumulation_steps=steps,
            per_device_train_batch_size=8 // steps, remove_unused_columns=False,
        )  # fmt: skip
        stream = Stream(Documents([str(texts)], tokenizer), lambda found, make=make_rows: make(found, 32))
        collate = CollatePacked(tokenizer.pad_token_id, has_positions=row != "bloom")
        PretrainTrainer(model, arguments, data_collator=collate, train_dataset=stream).train()
        weights.append(dict(model.named_parameters()))
    for key, value in weights[0].items():
        torch.testing.assert_close(
            value, weights[1][key], atol=1e-5, rtol=1e-5, msg=lambda said, key=key: f"{key}: {said}"
        )


@pytest.mark.parametrize("row", [row if row in ("qwen", "glm") else pytest.param(row, marks=SLOW) for row in ROWS])
def test_every_family_trains_resumes_and_loads_again(row, checkpoint, texts, tmp_path, monkeypatch):
    """With a batch of several rows, and several parts of it, a step: the stream goes on where it was."""
    name = ROWS[row][0]
    recipe = "pretrain_glm" if name in BLANKS else "pretrain"
    options = "--max_steps 4 --learning_rate 1e-3 --save_strategy steps --save_steps 2 --gradient_accumulation_steps 2"
    options = [
        *options.split(),
        "--per_device_train_batch_size",
        2,
        *(["--z_loss_weight", 2e-4] if name == "baichuan" else []),
    ]
    output, folder = tmp_path / "out", checkpoint(name)
    summary, losses = run(monkeypatch, folder, texts, output, *options, name=recipe)
    assert len(losses) == 4 and summary["last_loss"] < summary["first_loss"]
    kind = AutoModelForSeq2SeqLM if name in BLANKS else AutoModelForCausalLM
    assert kind.from_pretrained(output).config.use_cache and len(AutoTokenizer.from_pretrained(output))
    (output / "summary.json").unlink()
    (output / "checkpoint-4/complete").unlink()  # as if it was killed while it wrote this one
    assert json.loads((output / "checkpoint-2/stream.json").read_text())[0] == 8
    if row == "llama":
        (output / "checkpoint-2/stream.json").unlink()  # the stream is read again
    summary, again = run(monkeypatch, folder, texts, output, *options, "--resume", name=recipe)
    assert summary["resumed_from"] == "checkpoint-2"
    assert again == losses[2:]


@pytest.mark.parametrize("row", ["bloom", pytest.param("baichuan alibi", marks=SLOW), pytest.param("glm", marks=SLOW)])
def test_a_new_model_of_a_configuration(row, checkpoint, texts, tmp_path, monkeypatch):
    """Of a folder without weights, or of --config_name; the same for the same seed."""
    name, changes, _ = ROWS[row]
    recipe = "pretrain_glm" if name in BLANKS else "pretrain"
    options, new = ["--max_steps", 1, "--learning_rate", 1e-3, "--seed", 5], tmp_path / "new"
    AutoConfig.from_pretrained(checkpoint(name), num_hidden_layers=1, **changes).save_pretrained(new)
    _, of_name = run(monkeypatch, checkpoint(name), texts, tmp_path / "a", *options, "--config_name", new, name=recipe)
    AutoTokenizer.from_pretrained(checkpoint(name)).save_pretrained(new)
    _, of_folder = run(monkeypatch, new, texts, tmp_path / "b", *options, name=recipe)
    assert of_name == of_folder
    kind = AutoModelForSeq2SeqLM if name in BLANKS else AutoModelForCausalLM
    model = kind.from_pretrained(tmp_path / "b")
    assert model.config.num_hidden_layers == 1 and model.dtype == torch.float32
    if row == "bloom":
        assert model.transformer.word_embeddings_layernorm.weight.requires_grad


def test_glm_shows_its_objectives_and_fills_blanks(checkpoint, texts, tmp_path, monkeypatch):
    options = ["--max_steps", 4, "--learning_rate", 1e-3, "--mix", 0.2, 0.2, 0.6, "--infill", "今天[MASK]很好[MASK]。"]
    summary, _ = run(monkeypatch, checkpoint("glm"), texts, tmp_path / "out", *options, name="pretrain_glm")
    metrics = summary["metrics"]
    assert (
        all(metrics["after"][name] < loss for name, loss in metrics["before"].items()) and len(metrics["before"]) == 3
    )
    (answer,) = metrics["filled"].values()
    assert answer.startswith("今天") and "[MASK]" not in answer


def test_evaluation_and_an_adapter(checkpoint, texts, tmp_path, monkeypatch):
    options = [
        "--max_steps",
        2,
        "--learning_rate",
        1e-2,
        "--use_peft",
        "--eval_data",
        texts,
        "--eval_strategy",
        "steps",
    ]
    summary, _ = run(monkeypatch, checkpoint("baichuan"), texts, tmp_path / "out", *options, "--eval_steps", 1)
    assert summary["metrics"]["perplexity"] > 1 and (tmp_path / "out/adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", BLANKS)
def test_each_evaluation_has_the_same_blanks(name, checkpoint, texts, tmp_path, monkeypatch):
    options = f"--learning_rate 0 --max_steps 2 --eval_data {texts} --eval_strategy steps --eval_steps 1".split()
    evaluate, found = PretrainTrainer.evaluate, []
    monkeypatch.setattr(PretrainTrainer, "evaluate", lambda *a, **k: found.append(evaluate(*a, **k)) or found[-1])
    run(monkeypatch, checkpoint(name), texts, tmp_path / "out", *options, name="pretrain_glm")
    first, second = (one["eval_loss"] for one in found)
    assert first == second


CONFIGS = ["baichuan2", "qwen", "llama", "bloom", "chatglm", "glm"]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_papers_settings_are_understood(name, monkeypatch):
    kind = pretrain_glm.BlankArguments if name == "glm" else pretrain.CausalArguments
    monkeypatch.setattr(sys, "argv", ["x", *f"--config pretrain_{name}.yaml --model m --data d --output o".split()])
    arguments, training, _ = parse_arguments("", kind, transformers.TrainingArguments, ModelConfig)
    given = yaml.safe_load((Path(pretrain.__file__).parent / f"configs/pretrain_{name}.yaml").read_text("utf-8"))
    for key, value in given.items():
        found = getattr(training if hasattr(training, key) else arguments, key)
        assert getattr(found, "value", found) == value, key


def test_the_rate_warms_up_and_falls_to_a_tenth(checkpoint, texts, tmp_path, monkeypatch):
    rates = []
    monkeypatch.setattr(
        transformers.Trainer, "log", lambda self, logs, *a: rates.append(logs.get("learning_rate")) or None
    )
    words = f"--model {checkpoint('llama')} --data {texts} --output {tmp_path / 'out'} {COMMON} --warmup_steps 3"
    words += " --config pretrain_llama.yaml --max_steps 10 --max_length 16 --per_device_train_batch_size 1"
    monkeypatch.setattr(sys, "argv", ["pretrain", *words.split()])
    pretrain.main()
    rates = [rate for rate in rates if rate is not None]
    assert rates[:4] == pytest.approx([0, 1e-4, 2e-4, 3e-4]) and rates[-1] < 5e-5 and min(rates[1:]) >= 3e-5


# ---- what is refused

GOOD = '{"text": "你好"}'
BAD_INPUT = {
    "empty": ("", [], "there is no text"),
    "not JSON": ('{"text": ', [], "line 1: not valid JSON"),
    "no text": ('{"messages": []}', [], "line 1: field 'text' must be a text; has ['messages']"),
    "another field": (GOOD, ["--text_field", "body"], "line 1: field 'body' must be a text"),
    "no object": ("[7]", [], "line 1: expected an object"),
    "ids": ('{"input_ids": [1, 99999999]}', [], "line 1: field 'input_ids' must be a list of ids"),
    "lengths": ('{"input_ids": [1, 2], "seq_lengths": [1]}', [], "adds up to 1, but there are 2 ids"),
    "no lengths": ('{"input_ids": [1, 2], "seq_lengths": [2, 0]}', [], "must be a list of whole numbers above 0"),
    "no end": (GOOD, ["--max_steps", -1], "--max_steps is missing"),
    "GLM": (GOOD, ["--model", "glm"], "glm fills blanks, which recipes.pretrain_glm trains it on"),
    "ChatGLM": (GOOD, ["--model", "chatglm"], "chatglm fills blanks"),
    "max-z": (GOOD, ["--model", "llama", "--z_loss_weight", 1], "has no max-z loss"),
    "causal": (GOOD, ["--recipe", "pretrain_glm"], "baichuan is causal and fills no blanks"),
    "mix": (GOOD, ["--recipe", "pretrain_glm", "--model", "glm", "--mix", 1], "--mix needs 3 weights"),
    "too long": (
        GOOD,
        ["--recipe", "pretrain_glm", "--model", "glm", "--max_length", 99999],
        "the model has room for",
    ),
    "no blank": (
        GOOD,
        ["--recipe", "pretrain_glm", "--model", "glm", "--infill", "今天<mask>很好。"],
        "--infill: '今天<mask>很好。' has no blank: mark what is to be filled by [MASK], [sMASK] or [gMASK]",
    ),
    "GLM-130B": (GOOD, ["--recipe", "pretrain_glm", "--model", "glm130b"], "glm130b has other positions"),
    "no buffer": (GOOD, ["--shuffle_buffer", -1], "--shuffle_buffer must be at least 0"),
    "no length": (GOOD, ["--max_length", 0], "a row needs 2 tokens"),
    "vocabulary": (GOOD, ["--config_name", "llama"], "more than the model's vocab_size, 600"),
}


@pytest.mark.parametrize(("data", "options", "said"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_what_the_user_can_mend_is_one_line(data, options, said, checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "data.jsonl").write_text(data)
    given = {"--model": "baichuan", "--recipe": "pretrain", "--max_steps": 1} | dict(
        zip(options[::2], options[1::2], strict=True)
    )
    recipe = given.pop("--recipe")
    for name in ("--model", "--config_name"):
        given |= {name: checkpoint(given[name])} if name in given else {}
    words = [str(word) for pair in given.items() for word in pair]
    words += [
        "--data",
        str(tmp_path / "data.jsonl"),
        "--output",
        str(tmp_path / "out"),
        "--use_cpu",
        "--report_to",
        "none",
    ]
    monkeypatch.setattr(sys, "argv", [recipe, *words])
    with pytest.raises(SystemExit) as stopped:
        run_recipe(import_module(f"hf_cnllm.recipes.{recipe}").main)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"{recipe}: error: ")]
    assert stopped.value.code == 2 and said in line
    assert not (tmp_path / "out").exists()


def test_a_malformed_line_later_on_keeps_the_last_checkpoint(checkpoint, tmp_path, monkeypatch, capsys):
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (tmp_path / "data.jsonl").write_text("\n".join([*lines[:40], '{"text": 7}']))
    options = ["--max_steps", 100, "--save_strategy", "steps", "--save_steps", 1, "--per_device_train_batch_size", 2]
    with pytest.raises(SystemExit) as stopped:
        run_recipe(
            lambda: run(
                monkeypatch,
                checkpoint("llama"),
                tmp_path / "data.jsonl",
                tmp_path / "out",
                *options,
                "--shuffle_buffer",
                0,
            )
        )
    assert stopped.value.code == 2
    assert "data.jsonl, line 41: field 'text' must be a text" in capsys.readouterr().err
    left = [path.name for path in (tmp_path / "out").glob("checkpoint-*")]
    assert left and all((tmp_path / "out" / name / "complete").exists() for name in left)
    assert not (tmp_path / "out/summary.json").exists()


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text")
    with pytest.raises(ValueError, match=r"a.csv: of files .txt, .json, .jsonl, .parquet are read"):
        find_sources([str(tmp_path / "a.csv")])
    with pytest.raises(OSError, match=r"there is no \.txt"):
        find_sources([str(tmp_path)])


def test_a_byte_order_mark_is_no_text(checkpoint, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("llama"))
    (tmp_path / "plain.txt").write_text("Water boils.\n")
    (tmp_path / "marked.txt").write_text("Water boils.\n", encoding="utf-8-sig")
    plain, marked = (
        list(Documents([str(tmp_path / f"{name}.txt")], tokenizer).epoch(0)) for name in ("plain", "marked")
    )
    assert plain == marked
    (tmp_path / "chat.jinja").write_text("{{ messages }}", encoding="utf-8-sig")
    use_template(tokenizer, str(tmp_path / "chat.jinja"))
    assert tokenizer.chat_template == "{{ messages }}"


def test_a_damaged_parquet_is_named(checkpoint, tmp_path):
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1, and no more")
    with pytest.raises(ConversationError, match=rf"{re.escape(str(file))}, after 0 rows: the file is damaged"):
        list(Documents([str(file)], AutoTokenizer.from_pretrained(checkpoint("llama"))).epoch(0))


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])  # torch ends them in ten seconds
def test_several_workers_are_refused(checkpoint, texts, real, monkeypatch):
    stream = Stream(Documents([str(texts)], AutoTokenizer.from_pretrained(checkpoint("llama"))), lambda d: pack(d, 8))
    if not real:
        workers = SimpleNamespace(num_workers=2)
        monkeypatch.setattr("hf_cnllm.training.pretrain_data.get_worker_info", lambda: workers)
    with pytest.raises(ValueError, match="set dataloader_num_workers to 0 or 1"):
        next(iter(torch.utils.data.DataLoader(stream, num_workers=2 if real else 0, batch_size=None)))


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(checkpoint, texts, tmp_path):
    """Each reads the stream and takes its rows of it; max-z is that of all of them."""
    weights = []
    words = f"--model {checkpoint('baichuan')} --data {texts} {COMMON} --max_steps 3 --optim sgd --learning_rate 0.1 --z_loss_weight 0.01"
    for processes, size, steps in ((1, 4, 1), (2, 1, 2)):
        output = tmp_path / str(processes)
        command = (
            f"{words} --output {output} --per_device_train_batch_size {size} --gradient_accumulation_steps {steps}"
        )
        start = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone", "-m"]
        done = subprocess.run(
            [sys.executable, *start, "hf_cnllm.recipes.pretrain", *command.split(), "--ddp_backend", "gloo"],
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        weights.append(load_file(output / "model.safetensors"))
    for key, value in weights[0].items():
        torch.testing.assert_close(
            value, weights[1][key], atol=1e-5, rtol=0, msg=lambda said, key=key: f"{key}: {said}"
        )
