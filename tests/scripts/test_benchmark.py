"""The benchmark on models of a few thousand weights, and the arithmetic that its figures rest on."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmark.machine import Machine
from benchmark.measure import Times, peak_growth, take_turns
from benchmark.runner import main
from benchmark.subjects import (
    SUBJECTS,
    attention_flops,
    auto_class_for,
    linear_flops_per_token,
    llama_config,
    weight_bytes,
)
from benchmark.tasks import MODEL_TASKS
from hf_cnllm.families import Shape

CPU = torch.device("cpu")
BENCHMARK = Path(__file__).parents[2] / "scripts" / "benchmark"
FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizers" / "vocab"
SHAPE = Shape(hidden_size=48, layers=2, heads=4, ffn_size=64, vocab_size=300)
QUICK = ["baichuan-alibi", "glm"]  # a causal and a prefix model
SMALL = [
    *("--hidden-size", "48", "--layers", "1", "--heads", "4", "--ffn-size", "64", "--vocab-size", "300"),
    *("--lengths", "16", "48", "--batch-sizes", "2", "--prompt", "6", "--new-tokens", "3"),
    *("--train-tokens", "16", "--train-vocab", "400", "--rounds", "1", "--clock", "cpu"),
]


@pytest.fixture(autouse=True)
def no_real_vocabularies(monkeypatch):
    monkeypatch.delenv("HF_CNLLM_VOCABULARIES", raising=False)


def run_benchmark(*arguments):
    return main([*SMALL, *map(str, arguments)])


def refused(capsys, *arguments) -> str:
    """What a run that ends before it measures says."""
    with pytest.raises(SystemExit) as exit:
        run_benchmark(*arguments)
    assert exit.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "families",
    [QUICK, pytest.param([name for name in SUBJECTS if name not in QUICK], marks=pytest.mark.slow)],
    ids=["two", "the others"],
)
def test_every_task(families, tmp_path, capsys):
    output = tmp_path / "result"
    assert run_benchmark("--families", *families, "--tasks", *MODEL_TASKS, "load", "--output", output) == 0
    rows = json.loads((output / "summary.json").read_text())["rows"]
    for family in families:
        done = [row["task"] for row in rows if row["family"] == family and row["task"] != "memory"]
        assert done == ["load", "prefill", "prefill", "decode", "train", "train"]
    for row in rows:
        assert row["error"] is None and row["value"] > 0
        if row["ratio"] is not None:
            assert row["ratio"] == pytest.approx(row["value"] / row["reference_value"])  # of a single round
        if row["task"] == "prefill":
            assert row["flop_share"] > 0 and row["peak_mib"] is not None
    assert {row["reference"] for row in rows if row["task"] == "train"} == {"plain loss", "llama"}
    assert (output / "ratios.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert printed.count("| prefill") == 2 * len(families) and "not measured" not in printed


def test_tokenizer(tmp_path, capsys):
    (tmp_path / "qwen").symlink_to(FIXTURES / "qwen_small")
    assert run_benchmark("--tasks", "tokenizer", "--families", "qwen", "--vocabularies", tmp_path) == 0
    assert "real vocabulary" in capsys.readouterr().out
    assert run_benchmark("--tasks", "tokenizer", "--families", "qwen") == 0
    assert "tiny vocabulary" in capsys.readouterr().out


@pytest.mark.slow
def test_run_as_a_user_runs_it():
    """The import time, which only a process of its own can tell."""
    command = [sys.executable, str(BENCHMARK), "--tasks", "import", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "beyond what it imports" in done.stdout


@pytest.mark.parametrize("backend", ["eager", "flex_attention"])
def test_other_backends(backend, capsys):
    assert run_benchmark("--tasks", "prefill", "--families", "baichuan-alibi", "qwen", "--backends", backend) == 0
    assert capsys.readouterr().out.count(f"{backend}, float32") == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="flash-attn may be installed there")
def test_what_cannot_be_measured_is_said(capsys):
    assert run_benchmark("--tasks", "prefill", "--families", "qwen", "--backends", "flash_attention_2") == 1
    printed = capsys.readouterr().out
    assert "not measured: prefill qwen flash_attention_2 float32: " in printed


def test_a_run_does_not_replace_what_is_not_its_own(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert "not an empty folder" in refused(capsys, "--tasks", "load", "--families", "qwen", "--output", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden-size", "50"], "--hidden-size 50 must be a multiple"),
        (["--vocab-size", "20"], "--vocab-size 20"),
        (["--device", "mps"], "--device mps"),
        (["--tasks", "tokenizer", "--vocabularies", "/nonexistent"], "there is no folder"),
        (["--rounds", "0"], "must be at least 1"),
        (["--families", "gpt"], "invalid choice: 'gpt'"),
        (["--lengths", "many"], "invalid _positive value: 'many'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert message in refused(capsys, "--families", "qwen", *arguments)


@pytest.mark.parametrize("name", SUBJECTS)
def test_llama_has_the_same_shape(name):
    """The same linear weights; and the counts agree with torch's."""
    subject = SUBJECTS[name]
    model, llama = (
        auto_class_for(config).from_config(config, attn_implementation="eager").eval()
        for config in (subject.config(SHAPE), llama_config(subject, SHAPE))
    )
    assert linear_flops_per_token(model) == linear_flops_per_token(llama)
    length = 20
    input_ids = subject.input_ids(SHAPE, 1, length, torch.Generator().manual_seed(0))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids, logits_to_keep=1)
    head = 2 * SHAPE.hidden_size * SHAPE.vocab_size
    eager = attention_flops(SHAPE, pairs=length**2)  # eager attention computes what the mask then hides
    counted = counter.get_total_flops() - head
    assert counted == pytest.approx(length * linear_flops_per_token(model) + eager, rel=0.02)  # rotary angles
    assert weight_bytes(model) <= sum(4 * p.numel() for p in model.parameters())


def test_attended_pairs():
    causal, prefix = SUBJECTS["qwen"], SUBJECTS["chatglm"]
    assert causal.attended_pairs(4) == 10
    assert prefix.attended_pairs(4) == 9 + 4


def test_turns_alternate_and_the_warm_up_does_not_count():
    calls = []
    work = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = take_turns(work, rounds=2, device=CPU)
    assert "".join(calls) == "abbaab"
    assert [len(seconds) for seconds in times.seconds.values()] == [2, 2]


def test_seconds_that_the_work_counts_itself():
    times = take_turns({"a": lambda: 3.0, "b": lambda: time.sleep(0.001)}, rounds=1, device=CPU)
    assert times.seconds["a"] == [3.0] and times.seconds["b"][0] > 0.0005


def test_a_ratio_lies_in_its_quartiles():
    """The median of the rounds' own ratios: the ratio of the medians is 2, that of the best rounds 3."""
    times = Times({"a": [4.0, 3.0, 10.0], "b": [2.0, 1.0, 4.0]})
    assert times.median("a") == 4.0
    assert times.ratio("a", "b") == (2.25, 2.5, 2.75)


def test_peak_growth_sees_what_is_freed_again():
    growth = peak_growth(lambda: torch.ones(64, 2**20 // 4), CPU)
    if growth is None:
        pytest.skip("this system does not tell peak memory")
    assert 55 < growth < 90


def test_shares():
    machine = Machine("x", "cpu", 1, "2", flops={"float32": 100.0, "bfloat16": 200.0}, bandwidth=10.0)
    assert machine.flop_share(50, "float32") == 0.5 and machine.bandwidth_share(5) == 0.5
    gpu = Machine("x", "cuda", 1, "2", {"float32": 100.0, "bfloat16": 200.0}, 10.0, peak_flops=400, peak_bandwidth=20)
    assert gpu.flop_share(100, "bfloat16") == 0.25 and gpu.flop_share(50, "float32") == 0.5
    assert gpu.bandwidth_share(5) == 0.25
