"""What the package imports is what its metadata asks pip for."""

import ast
import re
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads pyproject.toml")
ROOT = Path(__file__).parents[2]

# What a dependency brings along by itself.
WITH_OTHERS = {"jinja2": "torch", "numpy": "transformers", "packaging": "transformers", "pyarrow": "datasets"}
WITH_OTHERS |= {"regex": "transformers", "tqdm": "transformers", "yaml": "transformers"}
DISTRIBUTIONS = {"google": "protobuf", "flash_attn": "flash-attn"}  # top module -> name on the index, where it differs
# Used where they are there, or named with their `pip install` in the error.
NOT_REQUIRED = {"fasttext", "tiktoken", "vllm"}


def imported(path):
    """Names of the packages that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def test_every_import_has_its_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: rows for name, rows in project["optional-dependencies"].items() if name != "dev"}
    required = {re.match(r"[\w-]+", row)[0].lower() for row in sum(extras.values(), project["dependencies"])}
    assert {*WITH_OTHERS.values()} <= required
    missing = {}
    for path in sorted((ROOT / "src").rglob("*.py")):
        for name in {*imported(path)} - sys.stdlib_module_names - {"hf_cnllm"} - NOT_REQUIRED - {*WITH_OTHERS}:
            if DISTRIBUTIONS.get(name, name).lower().replace("_", "-") not in {r.replace("_", "-") for r in required}:
                missing.setdefault(name, path.name)
    assert not missing
