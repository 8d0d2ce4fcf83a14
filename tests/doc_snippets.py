"""The examples in the README, the docs and the model cards, and a Hub of tiny checkpoints that they find without a network.

A page's blocks belong together: those in Python share their names, all share a working folder, and they run from top to
bottom. An HTML comment before a block says what is special about it:

    <!-- slow -->                 runs behind the mark `slow` only
    <!-- not run: needs a GPU --> cannot run in tests; the reason is one of `test_snippets.NOT_RUN`
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import transformers

from hf_cnllm import cli
from hf_cnllm.data.conversations import load_instructions
from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("README*.md"), ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("model_cards/*.md")]
)
BLOCK = re.compile(r"((?:^<!-- .+? -->\n)*)^```(python|bash)\n(.*?)^```$", flags=re.M | re.S)

# The start of a published name -> the tiny checkpoint of the same family.
TINY = {
    "baichuan-inc/Baichuan": "baichuan",
    "Qwen/Qwen-": "qwen",
    "THUDM/chatglm-6b": "chatglm",
    "THUDM/chatglm2-6b": "chatglm2",
    "THUDM/chatglm3-6b": "chatglm3",
    "THUDM/glm-large-chinese": "glm",
    "THUDM/glm-10b-chinese": "glm",
    "THUDM/glm-2b": "glm_gpt2",
    "THUDM/glm-515m": "glm_bert",
    "THUDM/glm-roberta-large": "glm_roberta",
    "THUDM/GLM-130B": "glm130b",
}
NAME = re.compile(r"\b(?:baichuan-inc|Qwen|THUDM|zai-org)/[\w.-]+")


class Block(NamedTuple):
    page: Path
    line: int  # of its first line of code
    language: str
    code: str
    notes: tuple[str, ...]

    @property
    def not_run(self) -> str | None:
        return next((note.removeprefix("not run: ") for note in self.notes if note.startswith("not run: ")), None)

    @property
    def is_slow(self) -> bool:
        return "slow" in self.notes

    @property
    def meaning(self) -> str:
        """The code less comments and layout: what a translated page must share with the English one."""
        if self.language == "python":
            return ast.dump(ast.parse(self.code))
        return "\n".join(shlex.join(shlex.split(line, comments=True)) for line in commands(self.code))


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text[: match.start(3)].count("\n") + 1,
            match[2],
            match[3],
            tuple(re.findall(r"<!-- (.+?) -->", match[1])),
        )
        for match in BLOCK.finditer(text)
    ]


def commands(code: str) -> list[str]:
    lines = code.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def run_blocks(blocks: list[Block]) -> None:
    transformers.set_seed(1)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks:
        if block.language == "python":
            # Empty lines in front, so that a traceback has the page's own line numbers.
            exec(compile("\n" * (block.line - 1) + block.code, block.page, "exec"), names)
        else:
            for command in commands(block.code):
                run_command(command)


def run_command(command: str) -> None:
    words = shlex.split(command, comments=True)
    if words[:3] == ["python", "-m", "hf_cnllm"]:
        words[:3] = ["hf-cnllm"]
    if words[0] == "hf-cnllm" and not set(words) & {"|", "&&", ">"}:
        try:
            code = cli.main(words[1:])
        except SystemExit as end:  # of --help
            code = end.code
        assert code == 0, command
        return
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def write_hub(cache: Path) -> None:
    """Fills `cache`, in the layout of `HF_HUB_CACHE`, with a tiny checkpoint for each name of the Hub in an example."""
    code = "\n".join(block.code for page in PAGES for block in blocks_of(page))
    for name in sorted(set(NAME.findall(code))):
        repository = cache / f"models--{name.replace('/', '--')}"
        (repository / "snapshots").mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0")
        write_checkpoint(name, repository / "snapshots" / "0")


def tiny_family(name: str) -> str:
    (family,) = [family for start, family in TINY.items() if name.startswith(start)]
    return family


def tiny_name(code: str) -> str:
    """Code with the names of checkpoints replaced by their families."""
    return NAME.sub(lambda name: tiny_family(name[0]), code)


def write_checkpoint(name: str, folder: Path) -> None:
    write_tiny_checkpoint(tiny_family(name), folder)
    if bits := re.search(r"int([48])$", name):
        model = transformers.AutoModel.from_pretrained(folder).quantize(int(bits[1]))
        model.save_pretrained(folder)
    settings = folder / "generation_config.json"
    if settings.exists():  # random weights end no answer, so published lengths would take minutes
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"max_new_tokens": 16}))


def write_working_folder(folder: Path) -> None:
    """What examples may take for granted: conversations in `data.jsonl`, and the clone's `scripts`."""
    rows = [json.dumps({"messages": chat}, ensure_ascii=False) for chat in load_instructions()[:8]]
    (folder / "data.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "scripts").symlink_to(ROOT / "scripts")
