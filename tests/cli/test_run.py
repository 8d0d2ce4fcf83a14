"""`hf-cnllm run`: a tool runs as if started without us, except that it knows the families."""

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points
from importlib.resources import files

import pytest

from hf_cnllm.cli import USER_ERROR, main
from hf_cnllm.cli.run import LAUNCHERS
from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint
from hf_cnllm.recipes import config_file

TOOL = """
import json, pickle, signal, sys, transformers

class Own:
    pass

assert isinstance(pickle.loads(pickle.dumps(Own())), Own)
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
assert __name__ == "__main__" and transformers.AutoConfig.for_model("baichuan").model_type == "baichuan"
print(json.dumps([sys.argv, sys.path[0], __file__]))
"""


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """What a tool may change of the process it has for itself."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def tool(tmp_path, monkeypatch):
    path = tmp_path / "tool_for_tests.py"
    path.write_text(TOOL)
    monkeypatch.chdir(tmp_path)
    yield path
    sys.modules.pop("tool_for_tests", None)


ARGUMENTS = ["--", "sub", "-m", "--help", "--traceback", "--", "-x"]


def test_a_file(tool, capsys):
    assert not main(["run", str(tool), *ARGUMENTS])
    assert json.loads(capsys.readouterr().out) == [[str(tool), *ARGUMENTS], str(tool.parent), str(tool)]


def test_a_module(tool, capsys):
    assert not main(["run", "-m", "tool_for_tests", *ARGUMENTS])
    assert json.loads(capsys.readouterr().out) == [[str(tool), *ARGUMENTS], str(tool.parent), str(tool)]


def test_a_package_runs_its_main(tool, capsys):
    package = tool.parent / "package_for_tests"
    package.mkdir()
    (package / "__init__.py").touch()
    tool.rename(package / "__main__.py")
    assert not main(["run", "-m", "package_for_tests", "a"])
    assert json.loads(capsys.readouterr().out)[0] == [str(package / "__main__.py"), "a"]


def test_a_command_of_an_installed_package(capsys):
    (script,) = {script.value for script in entry_points(group="console_scripts", name="accelerate")}
    assert script.startswith("accelerate.")
    with pytest.raises(SystemExit) as exit:
        main(["run", "accelerate", "estimate-memory", "--help"])
    assert exit.value.code == 0 and "library_name" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("end", "error"),
    [("raise SystemExit(7)", SystemExit), ("raise ValueError('its own')", ValueError), ("1 / 0", ZeroDivisionError)],
)
def test_how_it_ends_is_its_own(tool, end, error):
    tool.write_text(end)
    with pytest.raises(error) as raised:
        main(["run", str(tool)])
    assert getattr(raised.value, "code", 7) == 7


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no-such-tool"], "no installed package has a command no-such-tool"),
        (["-m", "no.such.module"], "there is no module no.such.module"),
        (["-m", "no_such_module"], "there is no module no_such_module"),
        (["-m", "json"], "there is no module json that can be run"),
        (["no_such_file.py"], "there is no file no_such_file.py"),
        (["./"], "there is no file ./"),
    ],
)
def test_what_is_not_there_is_one_line(words, said, capsys):
    assert main(["run", *words]) == USER_ERROR
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"hf-cnllm run: error: {said}") and err.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["-m"]])
def test_nothing_to_run_is_answered_with_the_usage(words, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["run", *words])
    assert exit.value.code == USER_ERROR and "usage: hf-cnllm run" in capsys.readouterr().err


OURS = "--module hf_cnllm run"
TASKS = files("hf_cnllm.evaluation") / "tasks"
FSDP2, TP = (config_file(name, "accelerate") for name in ("fsdp2.yaml", "tp.yaml"))


@pytest.mark.parametrize(
    ("launcher", "given", "made"),
    [
        ("accelerate", "launch --cpu x.py -m --n 1", "launch --module --cpu hf_cnllm run x.py -m --n 1"),
        ("accelerate", "launch --num_processes 2 -m lm_eval -m", "launch --module --num_processes 2 -m hf_cnllm run -m lm_eval -m"),
        ("accelerate", "launch --no_python x.sh 1", "launch --no_python x.sh 1"),
        ("accelerate", "launch --config_file fsdp2.yaml x.py --config_file tp.yaml",
         f"launch --module --config_file {FSDP2} hf_cnllm run x.py --config_file tp.yaml"),
        ("accelerate", "launch --config_file=tp.yaml -m x", f"launch --module --config_file={TP} -m hf_cnllm run -m x"),
        ("accelerate", "env", "env"),
        ("accelerate-launch", "x.py", f"{OURS} x.py"),
        ("lm_eval", "--include_path hf_cnllm --model hf", f"--include_path {TASKS} --model hf"),
        ("lm-eval", "ls tasks --include_path=hf_cnllm", f"ls tasks --include_path={TASKS}"),
        ("lm_eval", "--include_path mine --tasks hf_cnllm", "--include_path mine --tasks hf_cnllm"),
        ("torchrun", "--nproc-per-node 2 x.py -- a", "--module --nproc-per-node 2 hf_cnllm run x.py a"),
        ("torchrun", "--no-python x.sh", "--no-python x.sh"),
        ("trl", "dpo --output_dir run", f"dpo --output_dir run {OURS}"),
        ("trl", "vllm-serve --model x", "vllm-serve --model x"),
        ("trl", "env", "env"),
        ("trl", "", ""),
    ],
)  # fmt: skip
def test_launchers_start_their_processes_through_us(launcher, given, made):
    assert LAUNCHERS[launcher](given.split()) == made.split()


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("ddp", "MULTI_GPU", {"multi_gpu": True}),
        ("fsdp2", "FSDP", {"use_fsdp": True, "fsdp_version": 2, "fsdp_state_dict_type": "SHARDED_STATE_DICT"}),
        ("tp", "MULTI_GPU", {"use_parallelism_config": True, "parallelism_config_tp_size": 2}),
        ("zero2", "DEEPSPEED", {"use_deepspeed": True, "zero_stage": 2}),
        ("zero3", "DEEPSPEED", {"use_deepspeed": True, "zero_stage": 3, "zero3_save_16bit_model": True}),
    ],
)
def test_accelerate_understands_our_configurations(name, kind, settings):
    launch = import_module("accelerate.commands.launch")
    words = ["--config_file", config_file(f"{name}.yaml", "accelerate"), "--num_processes", "2", "x.py"]
    options, defaults, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    assert defaults.distributed_type.value == kind and options.mixed_precision == "no" and not options.use_cpu
    assert {key: getattr(options, key) for key in settings} == settings


def started(*words: str) -> str:
    command = [sys.executable, "-m", "hf_cnllm", "run", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate launch --cpu", "torchrun --nproc-per-node 2"])
@pytest.mark.parametrize("is_module", [False, True])
def test_a_launched_process_knows_the_families(launcher, is_module, tool):
    words = ["-m", "tool_for_tests"] if is_module else [str(tool)]
    lines = started(*launcher.split(), *words, "--x").splitlines()
    assert {tuple(json.loads(line)[0]) for line in lines} == {(str(tool), "--x")}


@pytest.mark.slow
@pytest.mark.parametrize("without_us", [False, True], ids=["run trl sft", "trl sft --module"])
def test_trl_sft(without_us, tmp_path):
    """TRL starts accelerate's launcher. It can be told the same without us."""
    write_tiny_checkpoint("chatglm3", tmp_path / "checkpoint")
    chat = {"messages": [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}]}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(chat) + "\n")
    words = [
        *("sft", "--model_name_or_path", tmp_path / "checkpoint", "--dataset_name", tmp_path / "data"),
        *("--output_dir", tmp_path / "out", "--max_steps", 1, "--report_to", "none", "--use_cpu", "--bf16", "false"),
    ]
    if without_us:
        subprocess.run(
            [sys.executable, "-c", "from trl.cli import main; main()", *map(str, words), *OURS.split()], check=True
        )
    else:
        started("trl", *map(str, words))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [
        "ChatGLMForConditionalGeneration"
    ]
