"""`remote_code=True`: a copy of this package's code beside a checkpoint, which `trust_remote_code=True` runs without it.

transformers copies single files of one folder, those that an `auto_map` names and what these import as `from .module import
name`. So every module that is needed becomes a file, `models/baichuan/chat.py` for example
`hf_cnllm_models_baichuan_chat.py`, in which nothing but the relative imports is changed; and one file more imports them all.
"""

import ast
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .._stack import own_version
from .json_files import read_object
from .saving import write_json

PACKAGE = Path(__file__).parents[1]
NAME = PACKAGE.name
MODEL, TOKENIZER = f"{NAME}_model", f"{NAME}_tokenizer"  # the files that import all others

# A copy that is saved again brings its files along.
FINISH = f'''"""The last touch on a folder that a copy of {NAME} saves: the copy goes along."""

import json
import shutil
from pathlib import Path


def check_copyable(source):
    pass


def finish_model(model, folder, repo_id):
    _finish(folder, "config.json", "{MODEL}")


def finish_tokenizer(tokenizer, folder, repo_id):
    _finish(folder, "tokenizer_config.json", "{TOKENIZER}")


def _finish(folder, config_file, entry):
    if not (folder / config_file).is_file():
        return  # an adapter alone
    here = Path(__file__).parent
    for file in here.glob("{NAME}_*.py"):
        shutil.copyfile(file, folder / file.name)
    auto_map = json.loads((here / f"{{entry}}.py").read_text(encoding="utf-8").split("AUTO_MAP = ")[1])
    config = json.loads((folder / config_file).read_text(encoding="utf-8")) | {{"auto_map": auto_map}}
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / config_file).write_text(text + "\\n", encoding="utf-8")
'''


def write_model_code(model: Any, folder: Path) -> None:
    """Puts the code of a model's family into the folder that it is saved in, and names its classes in config.json there."""
    from ..families import family_of

    config_class = type(model.config)
    classes = {"AutoConfig": config_class}
    for auto_class, model_class in family_of(model.config).models.items():
        has_doors = hasattr(model_class, "for_config")
        classes[auto_class] = model_class.for_config(config_class) if has_doors else model_class
    _write(folder, MODEL, classes, "config.json")


def write_tokenizer_code(tokenizer: Any, folder: Path) -> None:
    """Puts the code of a tokenizer into the folder that it is saved in, and names its class in tokenizer_config.json there."""
    _write(folder, TOKENIZER, {"AutoTokenizer": type(tokenizer)}, "tokenizer_config.json")


def check_copyable(source: Any) -> None:
    """Refuses a model or tokenizer whose code this package has not, or that is saved as an adapter, which has none.

    Raises:
        ValueError: saying so.
    """
    kind = type(source)
    if not kind.__module__.startswith(f"{NAME}."):
        raise ValueError(
            f"remote_code=True copies the classes of {NAME}, and {kind.__name__} is defined in {kind.__module__}. Save an "
            f"object of {NAME}'s class, or put your file into the folder and name it in `auto_map` yourself."
        )
    if getattr(source, "_hf_peft_config_loaded", False):
        raise ValueError(
            "remote_code=True copies the code of a model, and this one is saved as an adapter alone, which is loaded with the "
            "code of its base model. Leave remote_code out, or merge the adapter."
        )


def _write(folder: Path, entry: str, classes: Mapping[str, type], config_file: str) -> None:
    """Writes the modules that the classes need, the file that imports them, and the `auto_map`: auto class -> class."""
    modules = {kind: kind.__module__.removeprefix(f"{NAME}.") for kind in classes.values()}
    places = {auto_class: f"{entry}.{kind.__name__}" for auto_class, kind in classes.items()}
    auto_map = {name: [place, place] if name == "AutoTokenizer" else place for name, place in places.items()}
    copies = _copies(modules.values())
    named = sorted({f"from .{_flat(module)} import {kind.__name__}" for kind, module in modules.items()})
    others = [
        f"from .{name} import __name__ as _" for name in sorted(copies.keys() - set(map(_flat, modules.values())))
    ]
    copies[entry] = "\n".join(
        [
            f'"""The classes that {config_file} names, of a copy of {NAME} {own_version()}."""',
            *("", "# ruff: noqa", *named),
            *("", "# Not used here: transformers takes the files along that it sees imported.", *others),
            *(_registration(classes) if entry == MODEL else ()),
            *("", f"AUTO_MAP = {json.dumps(auto_map, indent=4)}", ""),
        ]
    )
    for name, source in copies.items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    write_json(folder / config_file, read_object(folder / config_file) | {"auto_map": auto_map}, sort_keys=True)


def _registration(classes: Mapping[str, type]) -> list[str]:
    config, model = classes["AutoConfig"].__name__, classes["AutoModel"].__name__
    register = f"AutoModel.register({config}, {model}, exist_ok=True)"
    return ["", "from transformers import AutoModel", "", f"{register}  # with which heads make their backbone"]


def _copies(modules: Iterable[str]) -> dict[str, str]:
    """Name of the file, without `.py`, -> source, for modules of this package and all that they import of it."""
    copies: dict[str, str] = {}
    pending = list(modules)
    while pending:
        module = pending.pop()
        if _flat(module) not in copies:
            source, imported = _flattened(module)
            copies[_flat(module)] = f"# {module}, copied from {NAME} {own_version()} (Apache-2.0)\n{source}"
            pending += imported
    return copies


def _flattened(module: str) -> tuple[str, list[str]]:
    """A module's source with its relative imports as they are where all modules lie in one folder, and those modules."""
    if module in REPLACED:
        return REPLACED[module](), []
    path = _file(module)
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    imported: list[str] = []
    parts = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in sorted(_relative_imports(source), key=lambda node: -node.lineno):
        target = ".".join([*parts[: len(parts) - node.level + 1], *(node.module.split(".") if node.module else [])])
        statements = []
        for alias in node.names:
            submodule = f"{target}.{alias.name}".strip(".")
            if _file(submodule) is not None:
                imported.append(submodule)
                statements.append(f"from . import {_flat(submodule)} as {alias.asname or alias.name}")
            else:
                imported.append(target)
                name = alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"
                statements.append(f"from .{_flat(target)} import {name}")
        indent = " " * node.col_offset
        lines[node.lineno - 1 : node.end_lineno] = [indent + statement for statement in statements]
    return "\n".join(lines) + "\n", imported


def _relative_imports(source: str) -> list[ast.ImportFrom]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and node.level]


def _file(module: str) -> Path | None:
    path = PACKAGE.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _flat(module: str) -> str:
    return f"{NAME}_{module.replace('.', '_')}"


def _templates() -> str:
    files = sorted((PACKAGE / "tokenization" / "templates").glob("*.jinja"))
    templates = {file.stem: file.read_text(encoding="utf-8") for file in files}
    return f"TEMPLATES = {templates!r}\n\n\ndef read_template(name):\n    return TEMPLATES[name]\n"


# Modules that copies have others in place of.
REPLACED = {"hub.finish": lambda: FINISH, "tokenization.templates": _templates}
