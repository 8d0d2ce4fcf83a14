"""Every family says how its layers are cut over processes: tensor parallel, pipeline and FSDP plans that name what is there."""

import re

import pytest
import torch
import transformers
from torch import nn

from hf_cnllm.training.sft_data import fills_blanks
from sft_models import ROWS, write_checkpoint


@pytest.fixture(params=[row for row in ROWS if row not in ("llama", "bloom")], scope="module")
def model(request, tmp_path_factory):
    name, changes, _ = ROWS[request.param]
    folder = write_checkpoint(name, tmp_path_factory.mktemp("plans") / name)
    config = transformers.AutoConfig.from_pretrained(folder, **changes)
    kind = transformers.AutoModelForSeq2SeqLM if fills_blanks(config) else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(config)


def named(pattern, names):
    return {name for name in names if re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name)}


def test_all_large_matrices_are_cut(model):
    modules = dict(model.named_modules())
    covered = set()
    for pattern in model.tp_plan:
        found = named(pattern, modules)
        assert found, pattern
        covered |= found
    kinds = (nn.Linear, nn.Embedding)
    large = {name for name, module in modules.items() if isinstance(module, kinds) or name.endswith("lm_head")}
    assert {name for name in large - covered if "position" not in name} == set()


@pytest.mark.parametrize("plan", ["_pp_plan", "_fsdp_plan"])
def test_every_parameter_has_a_place(model, plan):
    modules = dict(model.named_modules())
    places = set()
    for pattern in getattr(model, plan):
        found = named(pattern, modules)
        assert found, pattern
        places |= found
    for name, _ in model.named_parameters():
        is_table = "position" in name  # of GLM, which is beside the layers
        assert is_table or any(name.startswith(f"{place}.") for place in places), name
