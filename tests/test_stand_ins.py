"""Stand-ins: as good as their classes, and places that users or failed imports have changed."""

import inspect
import pickle
import subprocess
import sys
from importlib import import_module

import pytest

import hf_cnllm
from hf_cnllm import stand_ins
from hf_cnllm.stand_ins import StandIn, put


@pytest.fixture
def stand_in():
    return StandIn("hf_cnllm.models.qwen.modeling_qwen", "QWenLMHeadModel", config_class=hf_cnllm.QWenConfig)


def test_a_stand_in_somebody_kept_is_its_class(stand_in):
    model_class = hf_cnllm.QWenLMHeadModel
    assert stand_in == model_class == stand_in and stand_in in [model_class] and {stand_in: 1}[model_class] == 1
    assert stand_in == pickle.loads(pickle.dumps(stand_in)) and stand_in != hf_cnllm.QWenModel
    assert (stand_in | None) == (model_class | None) and (None | stand_in) == (None | model_class)
    assert inspect.signature(stand_in) == inspect.signature(model_class)
    assert dir(stand_in) == dir(model_class)


def test_what_is_set_on_a_stand_in_is_set_on_its_class(stand_in):
    stand_in.set_by_a_test = 1
    assert hf_cnllm.QWenLMHeadModel.set_by_a_test == 1
    del stand_in.set_by_a_test
    assert not hasattr(hf_cnllm.QWenLMHeadModel, "set_by_a_test")


REGISTERED_BY_A_USER = """
import hf_cnllm
from transformers import AutoModelForCausalLM, PreTrainedModel
class Mine(PreTrainedModel):
    config_class = hf_cnllm.QWenConfig
AutoModelForCausalLM.register(hf_cnllm.QWenConfig, Mine, exist_ok=True)
hf_cnllm.QWenLMHeadModel
assert AutoModelForCausalLM._model_mapping[hf_cnllm.QWenConfig] is Mine
"""


def test_a_class_that_a_user_registered_stays():
    done = subprocess.run([sys.executable, "-c", REGISTERED_BY_A_USER], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


HALF = """
import os
from hf_cnllm.stand_ins import take_places
class Thing:
    pass
take_places(Thing)
if "BREAK_HALFWAY" in os.environ:
    raise KeyboardInterrupt
"""


def test_the_class_of_an_import_that_was_interrupted_gives_way_to_the_next(tmp_path, monkeypatch):
    (tmp_path / "half_imported.py").write_text(HALF)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(stand_ins, "_places", {})
    monkeypatch.setenv("BREAK_HALFWAY", "1")
    placed = []

    def place(defined, in_place_of):
        assert in_place_of in placed or in_place_of is defined
        placed[:] = [defined]

    put(place, "half_imported", "Thing")
    with pytest.raises(KeyboardInterrupt):
        placed[0].imported()
    monkeypatch.delenv("BREAK_HALFWAY")
    assert import_module("half_imported").Thing is placed[0]
    del sys.modules["half_imported"]
