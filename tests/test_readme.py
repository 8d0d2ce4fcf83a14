"""README's commands: what a newcomer copies is what the repository has, in both languages."""

import argparse
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from hf_cnllm import cli, demo

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]


def marked(block: str) -> str:
    (command,) = re.findall(rf"<!-- newcomer: {block} -->\n```bash\n(.+)\n```\n", READMES[0].read_text())
    return command


@pytest.mark.parametrize("block", ["run", "test"])
def test_a_marked_command_installs_what_is_declared(block):
    command = marked(block)
    constraints, extra = re.search(r'-c (\S+) -e "\.\[(\w+)\]"', command).groups()
    declared = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    assert (ROOT / constraints).is_file() and f"\n{extra} = [" in declared
    assert f"```bash\n{command}\n```" in READMES[1].read_text()


def test_the_run_command_is_the_demo_with_its_own_arguments():
    *_, interpreter, module, package, command, options = marked("run").split()
    assert (interpreter, module, package, command) == (".venv/bin/python", "-m", "hf_cnllm", "demo")
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    assert parser.parse_args([options]).overwrite


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_every_command_of_the_table_exists(readme):
    rows = [shlex.split(row) for row in re.findall(r"^\| `python (.+?)` \|", readme.read_text(), flags=re.M)]
    assert {words[2] for words in rows if words[:2] == ["-m", "hf_cnllm"]} == set(cli.COMMANDS)
    assert all(find_spec(words[1]) for words in rows if words[0] == "-m")
    assert all((ROOT / words[0]).exists() for words in rows if words[0] != "-m")


def test_every_family_of_the_demo_is_named():
    (row,) = [line for line in READMES[0].read_text().splitlines() if "demo --family" in line]
    assert set(re.findall(r"`(\w+)`", row)) == {*demo.TINY_FAMILIES, *demo.TINY_VARIANTS}


def test_an_index_shows_no_link_that_leads_nowhere():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    hook = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]["hooks"]
    (rule,) = hook["fancy-pypi-readme"]["substitutions"]
    shown = re.sub(rule["pattern"], rule["replacement"], READMES[0].read_text())
    assert "docs/security.md" in shown and "](https://github.com/huggingface/transformers)" in shown
    assert not re.findall(r"\]\((?!https://)", shown)
