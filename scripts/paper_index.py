"""Writes the line numbers of docs/papers.md: each `path.py:LINE` is where the name behind it is defined.

python scripts/paper_index.py
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "papers.md"
ENTRY = re.compile(r"`([\w/]+\.py):(\d+)` `(\w+)`")


def line_of(path: str, name: str) -> int:
    """Where `name` is defined at the top level of a file of the package. Raises LookupError if it is not."""
    tree = ast.parse((ROOT / "src" / "hf_cnllm" / path).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node.lineno
    raise LookupError(f"docs/papers.md: {path} defines no {name}")


def with_lines(text: str) -> str:
    return ENTRY.sub(lambda entry: f"`{entry[1]}:{line_of(entry[1], entry[3])}` `{entry[3]}`", text)


if __name__ == "__main__":
    PAGE.write_text(with_lines(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
