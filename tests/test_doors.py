"""Every door of transformers' native models opens in every family, or says why not.

A plain run tries every door once and every family several times; `slow` has all pairs, and `python scripts/compatibility.py`
writes them into docs/compatibility.md.
"""

import json
import re

import pytest

from doors import DOORS, Place
from hf_cnllm.demo.tiny_checkpoints import TINY_FAMILIES, write_tiny_checkpoint

# Door -> families -> the sentence that refuses.
REFUSED: dict[str, dict[str, str]] = {}
# The same for what neither works nor says why.
BROKEN: dict[str, dict[str, str]] = {}
FAMILIES = tuple(TINY_FAMILIES)
QUICK = {(name, FAMILIES[index % len(FAMILIES)]) for index, name in enumerate(DOORS)}
CELLS = [
    pytest.param(name, family, marks=() if (name, family) in QUICK else pytest.mark.slow, id=f"{name}-{family}")
    for name in DOORS
    for family in FAMILIES
]


def said(table: dict[str, dict[str, str]], name: str, family: str) -> str | None:
    return next((text for families, text in table.get(name, {}).items() if family in families.split()), None)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Family -> its checkpoint, written when it is first asked for."""
    root = tmp_path_factory.mktemp("doors")

    def folder(family):
        if not (root / family).exists():
            write_tiny_checkpoint(family, root / family)
        return root / family

    return folder


@pytest.mark.parametrize(("name", "family"), CELLS)
def test_door(name, family, folders, tmp_path, record_property):
    def record(outcome, sentence=""):
        record_property("door", json.dumps([name, family, outcome, sentence]))

    record("failed")
    place = Place(folders(family), family, tmp_path)
    refusal, fault = said(REFUSED, name, family), said(BROKEN, name, family)
    if not (refusal or fault):
        DOORS[name](place)
        return record("works")
    with pytest.raises(Exception, match=refusal or fault) as caught:
        DOORS[name](place)
    record("refused" if refusal else "does not work", first_sentence(str(caught.value), place))


def first_sentence(text: str, place: Place) -> str:
    for folder, stand_in in ((place.scratch, "FOLDER"), (place.folder, "CHECKPOINT")):
        text = text.replace(str(folder), stand_in)
    return re.split(r"(?<=[.!?])\s|\n", text.strip())[0]
