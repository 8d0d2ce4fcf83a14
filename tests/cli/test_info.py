"""`hf-cnllm info` and the command line around it."""

import json

import pytest

from goldens import GOLDENS
from hf_cnllm.cli import USER_ERROR, main


def told(checkpoint, capsys) -> dict[str, str]:
    assert main(["info", str(checkpoint)]) == 0
    return dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("checkpoint", sorted(path.name for path in GOLDENS.iterdir()))
def test_every_checkpoint_is_described(checkpoint, capsys):
    rows = told(GOLDENS / checkpoint, capsys)
    assert checkpoint.startswith(rows["family"].strip()) or checkpoint.startswith("baichuan")
    assert len(rows) > 2 and all(value.strip() for value in rows.values())


@pytest.mark.parametrize(
    ("checkpoint", "family", "positions", "head"),
    [
        ("baichuan_7b", "baichuan", "RoPE", "linear"),
        ("baichuan_13b", "baichuan", "ALiBi", "linear"),
        ("baichuan2_7b", "baichuan2", "RoPE", "NormHead"),
        ("baichuan2_13b", "baichuan2", "ALiBi", "NormHead"),
    ],
)
def test_what_was_decided_about_baichuan(checkpoint, family, positions, head, capsys):
    rows = {name: value.strip() for name, value in told(GOLDENS / checkpoint, capsys).items()}
    assert (rows["family"], rows["positions"], rows["output head"]) == (family, positions, head)


def test_a_checkpoint_of_transformers_is_left_to_it(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "served by LlamaConfig of transformers" in told(tmp_path, capsys)["family"]


@pytest.mark.parametrize("config", [{"model_type": "baichuan"}, {"model_type": "no such type"}, None])
def test_what_cannot_be_described_is_one_line_and_exit_code_2(config, tmp_path, capsys):
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["info", str(tmp_path)]) == USER_ERROR
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("hf-cnllm info: error: ") and err.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["no-such-command"], ["info"]])
def test_a_wrong_command_line_is_answered_with_the_usage(words, capsys):
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == USER_ERROR and "usage: hf-cnllm" in capsys.readouterr().err
