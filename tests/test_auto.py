"""Registration: the auto classes give this package's classes, and no code file of a checkpoint is ever imported."""

import json
import pickle
import shutil
import subprocess
import sys

import pytest
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hf_cnllm
from goldens import GOLDENS
from hf_cnllm._compat import name_in_transformers
from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint
from hf_cnllm.families import CONTROL_IDS, Shape, family_of

VOCABULARIES = GOLDENS.parent / "tokenizers" / "vocab"
CHECKPOINTS = {
    # golden: (its vocabulary, what the Hub's config.json and tokenizer_config.json point to)
    "baichuan2_13b": ("baichuan2_small", "baichuan", "Baichuan"),
    "qwen": ("qwen_small", "qwen", "QWen"),
    "chatglm3_6b": ("chatglm3_small", "chatglm", "ChatGLM"),
}


@pytest.fixture(params=CHECKPOINTS)
def booby_trapped(request, tmp_path):
    """A checkpoint in the Hub's layout whose code files leave a trace and end the process that imports them."""
    vocabulary, module, prefix = CHECKPOINTS[request.param]
    if not (VOCABULARIES / vocabulary).is_dir():
        pytest.skip(f"no vocabulary {vocabulary}")
    folder, trace = tmp_path / "checkpoint", tmp_path / "trace"
    shutil.copytree(VOCABULARIES / vocabulary, folder)
    shutil.copytree(GOLDENS / request.param, folder, dirs_exist_ok=True)
    for kind in ("configuration", "modeling", "tokenization"):
        (folder / f"{kind}_{module}.py").write_text(f"open({str(trace)!r}, 'w').close()\nraise SystemExit\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": f"configuration_{module}.{prefix}Config",
        "AutoModelForCausalLM": f"modeling_{module}.{prefix}ForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "tokenizer_config.json"
    tokenizer_config = json.loads(path.read_text()) if path.exists() else {}
    tokenizer_config |= {
        "tokenizer_class": f"{prefix}Tokenizer",
        "auto_map": {"AutoTokenizer": [f"tokenization_{module}.{prefix}Tokenizer", None]},
    }
    path.write_text(json.dumps(tokenizer_config))
    yield folder
    assert not trace.exists()


@pytest.mark.parametrize("old_habits", [{}, {"trust_remote_code": True}], ids=str)
def test_no_code_of_a_checkpoint_runs(booby_trapped, old_habits):
    tokenizer = AutoTokenizer.from_pretrained(booby_trapped, use_fast=False, **old_habits)
    loaded = (
        AutoConfig.from_pretrained(booby_trapped, **old_habits),
        AutoModelForCausalLM.from_pretrained(booby_trapped, **old_habits),
        tokenizer,
    )
    for thing in loaded:
        assert type(thing).__module__.startswith("hf_cnllm.")
    assert tokenizer.is_fast


def test_registering_again_changes_nothing():
    before = AutoModelForCausalLM._model_mapping.keys()
    hf_cnllm.register()
    assert AutoModelForCausalLM._model_mapping.keys() == before


@pytest.mark.parametrize(
    "name, title", [("chatglm_6b", "ChatGLM-6B"), ("chatglm2_6b", "ChatGLM2-6B"), ("baichuan2_13b", "Baichuan 2")]
)
def test_a_class_that_a_family_lacks_is_refused_by_the_name_of_the_checkpoint(name, title):
    config = AutoConfig.from_pretrained(GOLDENS / name)
    for load, given in (("from_pretrained", GOLDENS / name), ("from_config", config)):
        with pytest.raises(
            ValueError, match=f"^{title} has no model for AutoModelForMultipleChoice: it has AutoModel,"
        ):
            getattr(transformers.AutoModelForMultipleChoice, load)(given)


LATE_PEFT = """
import sys, warnings
warnings.simplefilter("error", UserWarning)
import hf_cnllm
assert not {"flash_attn", "trl", "datasets", "peft", "bitsandbytes", "optimum"} & sys.modules.keys()
import transformers
models = []
for family in hf_cnllm.FAMILIES:
    config = family.make_config(next(iter(family.architectures)), hf_cnllm.families.Shape(16, 1, 2, 16, 64))
    models.append(getattr(transformers, family.generates_with).from_config(config))
from peft import LoraConfig, get_peft_model
warnings.simplefilter("ignore", FutureWarning)  # renamed attributes between PEFT and transformers
for model in models:
    targets = model.config.adapter_targets.attention
    assert get_peft_model(model, LoraConfig(r=2)).peft_config["default"].target_modules == set(targets)
"""


def test_importing_prints_nothing_and_leaves_other_packages_until_they_are_used():
    done = subprocess.run([sys.executable, "-c", LATE_PEFT], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# What comes with models, of transformers' and of ours; peft and trl come with nothing.
HEAVY = ("torch._dynamo", "transformers.modeling_utils", "peft", "trl", "hf_cnllm._compat.modeling")

TOKENIZER_ALONE = f"""
import sys
from transformers import AutoTokenizer
before = set(sys.modules)
import hf_cnllm
AutoTokenizer.from_pretrained(sys.argv[1])("你好", return_tensors="pt")
added = sys.modules.keys() - before
assert not added & {set(HEAVY)}, added & {set(HEAVY)}
assert not [name for name in added if ".modeling_" in name], added
"""


def test_a_tokenizer_comes_without_models(tmp_path):
    write_tiny_checkpoint("baichuan", tmp_path / "baichuan")
    done = subprocess.run(
        [sys.executable, "-c", TOKENIZER_ALONE, tmp_path / "baichuan"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# What a process that has not made a model yet does with one of the names, and what it has then.
FIRST_USES = {
    "by the auto class": "model = transformers.AutoModelForCausalLM.from_pretrained(folder)",
    "after transformers has replaced its own module": """
from transformers import Trainer
config = transformers.AutoConfig.from_pretrained(folder)
model = getattr(sys.modules["transformers"], config.architectures[0]).from_pretrained(folder)""",
    "in a pipeline": """
model = transformers.pipeline("text-generation", model=folder).model""",
    "by the class's module": """
from hf_cnllm.models.baichuan.modeling_baichuan import BaichuanForCausalLM
model = BaichuanForCausalLM.from_pretrained(folder)""",
    "by the module as an attribute": """
assert not hasattr(hf_cnllm.models.baichuan, "modeling_nothing")
model = hf_cnllm.models.baichuan.modeling_baichuan.BaichuanForCausalLM.from_pretrained(folder)""",
    "unpickled": """
model = pickle.loads((pathlib.Path(folder) / "model.pkl").read_bytes())""",
    "by a star": """
from hf_cnllm import *
model = BaichuanForCausalLM.from_pretrained(folder)
assert {name for name in dir(hf_cnllm)} >= set(hf_cnllm.__all__)""",
    "by a subclass": """
class Mine(transformers.BaichuanForCausalLM): ...
assert issubclass(Mine, hf_cnllm.BaichuanForCausalLM) and Mine is not hf_cnllm.BaichuanForCausalLM
model = Mine.__base__.from_pretrained(folder)""",
    "after questions about the class": """
found = transformers.BaichuanForCausalLM
assert pickle.loads(pickle.dumps(found)) is hf_cnllm.BaichuanForCausalLM
assert issubclass(found, transformers.PreTrainedModel) and inspect.isclass(found)
assert issubclass(hf_cnllm.BaiChuanForCausalLM, found) and issubclass(found, hf_cnllm.BaichuanForCausalLM)
model = found(transformers.AutoConfig.from_pretrained(folder))
assert isinstance(model, found)""",
}
FIRST_USE = """
import inspect, pathlib, pickle, sys
import transformers
import hf_cnllm
assert "hf_cnllm.models.baichuan.modeling_baichuan" not in sys.modules
folder = sys.argv[1]
{use}
real = sys.modules["hf_cnllm.models.baichuan.modeling_baichuan"].BaichuanForCausalLM
assert type(model) is real is hf_cnllm.BaichuanForCausalLM is hf_cnllm.models.baichuan.BaichuanForCausalLM
assert transformers.AutoModelForCausalLM._model_mapping[type(model.config)] is real
assert transformers.BaichuanForCausalLM is sys.modules["transformers"].BaichuanForCausalLM is real
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "baichuan"
    write_tiny_checkpoint("baichuan", folder)
    (folder / "model.pkl").write_bytes(pickle.dumps(AutoModelForCausalLM.from_pretrained(folder)))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("use", FIRST_USES)
def test_a_class_is_there_whatever_uses_it_first(use, saved):
    code = FIRST_USE.format(use=FIRST_USES[use])
    done = subprocess.run([sys.executable, "-c", code, saved], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there_once():
    assert len(set(hf_cnllm.__all__)) == len(hf_cnllm.__all__)
    functions_and_classes = [getattr(hf_cnllm, name) for name in hf_cnllm.__all__ if name != "FAMILIES"]
    assert all(public.__module__.startswith("hf_cnllm.") for public in functions_and_classes)


@pytest.mark.parametrize("family", hf_cnllm.FAMILIES, ids=lambda family: family.config.model_type)
def test_every_row_of_the_table_is_what_the_auto_classes_give(family):
    for auto_class, model_class in family.models.items():
        assert getattr(transformers, auto_class)._model_mapping[family.config] is model_class


@pytest.mark.parametrize("family", hf_cnllm.FAMILIES, ids=lambda family: family.config.model_type)
def test_the_names_that_are_saved_are_found_on_transformers(family):
    for model_class in family.models.values():
        assert getattr(transformers, model_class.__name__) is model_class


def test_a_name_that_transformers_has_is_left_alone():
    before = transformers.LlamaModel
    name_in_transformers(type("LlamaModel", (), {}))
    assert transformers.LlamaModel is before


@pytest.mark.parametrize("golden", ["chatglm_6b_3layer", "chatglm2_6b", "chatglm3_6b", "glm"])
def test_where_the_hub_names_the_backbone_it_is_the_model_that_generates(golden, tmp_path):
    config = json.loads((GOLDENS / golden / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | {"architectures": ["GLMModel" if golden == "glm" else "ChatGLMModel"]})
    )
    (name,) = AutoConfig.from_pretrained(tmp_path).architectures
    assert hasattr(getattr(transformers, name), "generate")


@pytest.mark.parametrize("family", hf_cnllm.FAMILIES, ids=lambda family: family.config.model_type)
def test_every_architecture_of_the_table_is_a_model_of_its_family(family):
    shape = Shape(hidden_size=32, layers=1, heads=4, ffn_size=48, vocab_size=96)
    for name, architecture in family.architectures.items():
        config = family.make_config(name, shape)
        model = getattr(transformers, family.generates_with).from_config(config)
        assert family_of(config) is family and family.line_of(config) in family.lines
        assert isinstance(model, family.models[family.generates_with])
        ends = [getattr(config, end) for end in architecture.prompt_end]
        assert all(shape.vocab_size - CONTROL_IDS <= token < shape.vocab_size for token in ends)


def test_a_model_of_transformers_is_of_no_family():
    assert family_of(transformers.GlmConfig()) is None


def test_glm_as_a_causal_model_says_what_to_load(tmp_path):
    for ask in (
        lambda: AutoModelForCausalLM.from_pretrained(GOLDENS / "glm"),
        lambda: AutoModelForCausalLM.from_config(hf_cnllm.GLMConfig()),
    ):
        with pytest.raises(ValueError, match=r"GLM is no causal language model.*load it with AutoModelForSeq2SeqLM"):
            ask()
    # The pipeline, which cannot load it so, takes the class that config.json names.
    write_tiny_checkpoint("glm", tmp_path / "glm")
    with pytest.raises(ValueError, match="to find context and blanks"):
        transformers.pipeline("text-generation", model=str(tmp_path / "glm"))("text")
    assert family_of(hf_cnllm.GLMConfig()).generates_with == "AutoModelForSeq2SeqLM"
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4}
    glm4 = transformers.GlmConfig(vocab_size=16, num_key_value_heads=1, pad_token_id=0, **tiny)
    assert isinstance(AutoModelForCausalLM.from_config(glm4), transformers.GlmForCausalLM)
