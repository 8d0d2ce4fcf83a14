"""Every door of transformers' native models opens in every family, or says why not.

A plain run tries every door once and every family several times; `slow` has all pairs, and `python scripts/compatibility.py`
writes them into docs/compatibility.md.
"""

import json
import re
from importlib.util import find_spec

import pytest

from doors import DOORS, Place
from hf_cnllm.demo.tiny_checkpoints import TINY_FAMILIES, write_tiny_checkpoint

NO_CHAT = {"glm glm130b": "has no form for chats"}
NO_SEQ2SEQ = r"has no model for AutoModelForSeq2SeqLM: it has AutoModel, AutoModelForCausalLM,"
NO_CLASSIFIER = {
    "glm glm130b": r"has no model for AutoModelForSequenceClassification: it has AutoModel, AutoModelForSeq2SeqLM"
}
NO_CAUSAL = {"glm": "GLM is no causal language model, it fills blanks: load it with AutoModelForSeq2SeqLM"}
NO_CONTEXT = {"glm": "to find context and blanks in `input_ids` .*: let `hf_cnllm.infill`"}
PREFIX_LM = "is causal and has no place for the prefix of a prefix language model: use `generate`"
NEEDS_IDS = r"`inputs_embeds` do not tell where the context ends.*PEFT's prompt tuning.* cannot"
# Door -> families -> the sentence that refuses.
REFUSED: dict[str, dict[str, str]] = {
    "AutoModelForCausalLM": NO_CAUSAL,
    "AutoModelForSeq2SeqLM": {"baichuan qwen": NO_SEQ2SEQ},
    "AutoModelForSequenceClassification": NO_CLASSIFIER,
    "generate_batch": {"chatglm glm glm130b": PREFIX_LM},
    'pipeline("text-generation")': NO_CONTEXT,
    'pipeline("text-generation"), batched': NO_CONTEXT,
    "apply_chat_template": NO_CHAT,
    "model.chat": NO_CHAT,
    "transformers serve (class lookup)": NO_CHAT,
    "vLLM (model registry)": {
        "chatglm glm glm130b": "vLLM cannot serve this checkpoint: .* is a prefix language model"
    },
    "PEFT, prompt tuning": {"chatglm glm glm130b": NEEDS_IDS},
    "TRL, Reward": NO_CLASSIFIER,
    **{f"TRL, {trainer}": NO_CHAT for trainer in ("SFT", "DPO", "KTO", "GRPO", "RLOO")},
}
if not find_spec("bitsandbytes"):
    REFUSED["hf-cnllm quantize"] = {"baichuan qwen glm": "bitsandbytes is missing, .*: pip install bitsandbytes"}
FAMILIES = tuple(TINY_FAMILIES)
QUICK = {(name, FAMILIES[index % len(FAMILIES)]) for index, name in enumerate(DOORS)}
CELLS = [
    pytest.param(name, family, marks=() if (name, family) in QUICK else pytest.mark.slow, id=f"{name}-{family}")
    for name in DOORS
    for family in FAMILIES
]


def refusal_of(name: str, family: str) -> str | None:
    return next((text for families, text in REFUSED.get(name, {}).items() if family in families.split()), None)


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
    refusal = refusal_of(name, family)
    if refusal is None:
        DOORS[name](place)
        return record("works")
    with pytest.raises(Exception, match=refusal) as caught:
        DOORS[name](place)
    record("refused", first_sentence(str(caught.value), place))


def first_sentence(text: str, place: Place) -> str:
    for folder, stand_in in ((place.scratch, "FOLDER"), (place.folder, "CHECKPOINT")):
        text = text.replace(str(folder), stand_in)
    return re.split(r"(?<=[.!?])\s|\n", text.strip())[0]
