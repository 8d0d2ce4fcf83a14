"""Writes docs/licenses.md: the licenses of what is installed for this package, from the metadata of the packages.

python scripts/licenses.py
"""

import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PAGE = Path(__file__).resolve().parents[1] / "docs" / "licenses.md"
TEXT = """# Licenses of dependencies

Written by `python scripts/licenses.py` from the metadata of the installed packages: what `pip install "hf-cnllm[train,data]"` brings, on
Linux, less the CUDA libraries of torch's GPU build, which have a license of NVIDIA's. hf_cnllm is
Apache-2.0 and contains none of them, nor any weights.

| package | license | needed |
|---|---|---|
"""


def required(name: str, extras: frozenset[str], seen: set[tuple[str, frozenset[str]]]) -> Iterator[Distribution]:
    """The installed distribution of that name and all it requires, each once."""
    if (name, extras) in seen:
        return
    seen.add((name, extras))
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return  # for another platform, or optional there
    yield found
    for line in found.requires or ():
        requirement = Requirement(line)
        marker = requirement.marker
        environments = [default_environment() | {"extra": extra} for extra in extras or {""}]
        if marker is None or any(marker.evaluate(environment) for environment in environments):
            yield from required(canonicalize_name(requirement.name), frozenset(requirement.extras), seen)


def license_of(found: Distribution) -> str:
    """The SPDX expression, else the classifiers, else the first line of the license field."""
    metadata = found.metadata
    if expression := metadata.get("License-Expression"):
        return expression
    classifiers = [name for name in metadata.get_all("Classifier") or () if name.startswith("License ::")]
    names = [re.sub(r".*:: ", "", name) for name in classifiers if name != "License :: OSI Approved"]
    lines = (metadata.get("License") or "").strip().splitlines()
    return " or ".join(names) or (lines[0] if lines else "not stated in the metadata")


def table() -> dict[str, tuple[str, str]]:
    """Package -> (license, `always`, or the extra that needs it)."""
    rows: dict[str, tuple[str, str]] = {}
    for extras, needed in ((frozenset(), "always"), (frozenset({"train"}), "train"), (frozenset({"data"}), "data")):
        for found in required("hf-cnllm", extras, set()):
            name = canonicalize_name(found.metadata["Name"])
            if not name.startswith("hf-cnllm"):
                rows.setdefault(name, (license_of(found), needed))
    return dict(sorted(rows.items()))


if __name__ == "__main__":
    rows = "".join(f"| {name} | {license} | {needed} |\n" for name, (license, needed) in table().items())
    PAGE.write_text(TEXT + rows, encoding="utf-8")
