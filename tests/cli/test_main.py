"""What `main` does around the commands (what it says to wrong words is in test_info)."""

import argparse
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hf_cnllm import cli


@pytest.fixture
def command(monkeypatch):
    """A command `try` whose `run` is set by the test."""
    module = SimpleNamespace(
        add_arguments=lambda parser: parser.add_argument("--times", type=int, default=1), run=None
    )
    monkeypatch.setitem(cli.COMMANDS, "try", ("tests_only_command", "a command for tests"))
    monkeypatch.setitem(sys.modules, "tests_only_command", module)
    return module


def test_the_module_gets_its_arguments_and_gives_the_exit_code(command):
    command.run = lambda args: args.times
    assert cli.main(["try", "--times", "3"]) == 3


@pytest.mark.parametrize(
    "error", [ValueError("bad\n  value"), FileNotFoundError("bad value"), ImportError("bad value")]
)
def test_what_the_user_can_mend_is_one_line(command, error, capsys):
    def run(args: argparse.Namespace) -> int:
        raise error

    command.run = run
    assert cli.main(["try"]) == cli.USER_ERROR
    assert capsys.readouterr().err == "hf-cnllm try: error: bad value\n"
    with pytest.raises(type(error)):
        cli.main(["try", "--debug"])


def test_a_mistake_of_ours_is_one_line_too_and_another_exit_code(command, capsys):
    def run(args: argparse.Namespace) -> int:
        raise KeyError("ours")

    command.run = run
    assert cli.main(["try"]) == cli.OUR_ERROR
    said = capsys.readouterr().err
    assert said.startswith("hf-cnllm try: unexpected KeyError: 'ours' (--debug shows where;") and said.count("\n") == 1
    with pytest.raises(KeyError):
        cli.main(["try", "--debug"])


@pytest.mark.slow
def test_a_pipe_that_is_closed_early_is_no_error():
    code = (
        "import sys; from types import SimpleNamespace; from hf_cnllm import cli\n"
        "def run(args):\n    for n in range(10**5): print(n)\n    return 0\n"
        "sys.modules['tests_only'] = SimpleNamespace(add_arguments=lambda parser: None, run=run)\n"
        "cli.COMMANDS['try'] = ('tests_only', 'x'); sys.exit(cli.main(['try']))"
    )
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=reader.stdin, stderr=subprocess.PIPE, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c(command, capsys):
    def run(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    command.run = run
    assert cli.main(["try"]) == cli.INTERRUPTED and "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("ending", cli.ENDINGS)
def test_termination_runs_the_clean_up_and_the_handler_is_put_back(ending, command):
    cleaned = []

    def run(args: argparse.Namespace) -> int:
        try:
            os.kill(os.getpid(), ending)
            signal.pause()
        finally:
            cleaned.append(True)

    command.run = run
    inherited = signal.signal(ending, signal.SIG_DFL)  # nohup ignores SIGHUP
    try:
        with pytest.raises(SystemExit) as exit:
            cli.main(["try"])
        assert exit.value.code == 128 + ending and cleaned and signal.getsignal(ending) is signal.SIG_DFL
    finally:
        signal.signal(ending, inherited)


def test_help_names_every_command_and_imports_none():
    code = (
        "import sys; from hf_cnllm import cli\n"
        "try: cli.main(['--help'])\n"
        "finally: assert not {module for module, _ in cli.COMMANDS.values()} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("size", ["nan", "inf", "0", "-1"])
def test_the_size_of_converted_files_is_a_number(size, tmp_path, capsys):
    words = ["convert", "glm130b", str(tmp_path), str(tmp_path / "out"), f"--max-file-size={size}"]
    assert cli.main(words) == cli.USER_ERROR and "--max-file-size must be a number above 0" in capsys.readouterr().err
