"""`hf-cnllm doctor`: all well here, and what it says where something is not."""

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest
import torch

from hf_cnllm import _stack
from hf_cnllm.cli import doctor, main
from hf_cnllm.models.validation import cached_length


def test_all_is_well(capsys):
    code = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["broken promises"] == []
    results = {(model, check): result for model, row in report["models"].items() for check, result in row.items()}
    assert len(results) == len(doctor.PATIENTS) * len(doctor.CHECKS)
    assert not [(where, result) for where, result in results.items() if not result.startswith(("ok", "n/a"))]
    assert sum(result == "ok" for result in results.values()) >= 60
    assert code == bool(report["unmet requirements"])


@pytest.fixture
def one_model(monkeypatch):
    monkeypatch.setattr(doctor, "PATIENTS", {"Qwen": doctor.PATIENTS["qwen"]})
    monkeypatch.setattr(doctor, "unmet_requirements", list)


def test_a_model_that_counts_wrong_is_a_failure(one_model, monkeypatch, capsys):
    """Positions that do not count what the cache holds: cached decoding goes wrong, and nothing raises."""
    monkeypatch.setattr("hf_cnllm.models.qwen.modeling_qwen.cached_length", lambda cache: cached_length(cache) and 1)
    assert main(["doctor"]) == 1
    told = capsys.readouterr().out
    assert "FAIL" in told
    assert "Qwen" in told


def test_a_check_that_raises_is_one_line_and_the_others_go_on(one_model, monkeypatch, capsys):
    def broken(patient):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setitem(doctor.CHECKS, "padding", broken)
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["padding", "FAIL:", "first", "line", "second", "line"] for line in lines)
    assert any(line.split() == ["saving", "ok"] for line in lines)


def test_a_broken_promise_of_transformers_is_a_failure(one_model, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "broken_promises", lambda: ["`generate` no longer calls _prefill"])
    assert main(["doctor"]) == 1
    assert "no longer calls _prefill" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asking", "asks", "library", "found"),
    [
        ("transformers", 'accelerate>=99.0; extra == "accelerate"', "accelerate", None),
        ("hf-cnllm", "peft>=99.0", "peft", None),
        ("transformers", "huggingface-hub<1.0", "huggingface-hub", None),
    ],
)
def test_a_half_upgraded_environment_is_named_with_what_it_needs(monkeypatch, asking, asks, library, found):
    monkeypatch.setattr(_stack, "requires", lambda name: [asks] if name == asking else [])
    (told,) = _stack.unmet_requirements()
    assert told.startswith(f"{library} {metadata.version(library)} is installed, but {asking} ")
    assert 'pip install "' in told


@pytest.mark.slow
def test_a_library_that_cannot_be_imported_is_named(tmp_path):
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text("raise AttributeError('transformers has no such thing')")
    (tmp_path / "peft-0.1.dist-info").mkdir()
    (tmp_path / "peft-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "hf_cnllm", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    # Nothing here imports peft before it is used.
    (line,) = [line for line in done.stdout.splitlines() if "peft 0.1 is installed, but hf-cnllm" in line]
    assert 'pip install "peft>=' in line and "Traceback" not in done.stderr


def test_what_only_tests_of_a_library_need_does_not_count(monkeypatch):
    monkeypatch.setattr(_stack, "requires", lambda name: ['torch==1.0; extra == "tests"', 'peft<0.1; extra == "dev"'])
    assert _stack.unmet_requirements() == []


def test_the_random_state_is_left_alone(one_model):
    state = torch.random.get_rng_state()
    doctor.examine()
    assert torch.equal(torch.random.get_rng_state(), state)
