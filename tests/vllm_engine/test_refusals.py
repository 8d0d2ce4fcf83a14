"""What vLLM refuses, and says, before it makes an engine."""

import builtins
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from goldens import GOLDENS
from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint
from vllm_engine.checkpoints import LONGEST, write_checkpoint

pytest.importorskip("vllm.version")

from vllm_engine.engine import engine  # sets vLLM's environment


def engine_config(folder, **options):
    """vLLM's configuration, made as for an engine."""
    from vllm.engine.arg_utils import EngineArgs

    options = {"skip_tokenizer_init": True, "dtype": "float32", **options}
    return EngineArgs(model=str(folder), **options).create_engine_config()


@pytest.mark.parametrize("golden", ("chatglm_6b", "glm", "chatglm3_6b_ptuning", "chatglm2_6b_mha"))
def test_unserved_checkpoints(golden):
    with pytest.raises(ValueError, match=r"vLLM cannot serve this checkpoint: .*Use transformers' `generate`"):
        engine_config(GOLDENS / golden)


def test_too_long(tmp_path):
    folder = write_checkpoint("chatglm2_6b", tmp_path)
    assert engine_config(folder).model_config.max_model_len == LONGEST
    with pytest.raises(
        ValueError, match=rf"max_model_len \({LONGEST + 1}\) is greater .*max_position_embeddings={LONGEST}"
    ):
        engine_config(folder, max_model_len=LONGEST + 1)


def test_dynamic_ntk_turns_prefix_caching_off(tmp_path):
    folder = write_checkpoint("qwen", tmp_path)
    for length, expected in ((64, True), (65, False)):
        config = engine_config(folder, max_model_len=length, enable_prefix_caching=True)
        assert config.cache_config.enable_prefix_caching is expected
        assert config.model_config.uses_mrope is not expected


@pytest.mark.parametrize("family, stops", [("qwen", 3), ("chatglm3", 3), ("baichuan", 1)])
def test_stop_ids_join_those_of_the_generation_config(family, stops, tmp_path):
    """Also in the copies that other processes get."""
    import copy
    import pickle

    write_tiny_checkpoint(family, tmp_path / family)
    config = engine_config(tmp_path / family, skip_tokenizer_init=False).model_config
    for model_config in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert len(model_config.try_get_generation_config()["eos_token_id"]) == stops


@pytest.fixture
def fresh(monkeypatch):
    """The plugin as in a process that has not asked for anything yet; vLLM's registry is put back afterwards."""
    import sys

    from vllm import ModelRegistry

    import hf_cnllm.vllm as plugin

    for module in [name for name in sys.modules if name.startswith("hf_cnllm.vllm.")]:
        monkeypatch.delitem(sys.modules, module)
    for module in ("hooks", "_compat", "unsupported"):
        monkeypatch.delattr(plugin, module, raising=False)
    models = dict(ModelRegistry.models)
    yield plugin
    ModelRegistry.models.clear()
    ModelRegistry.models.update(models)


def check_that_models_are_refused(plugin, reason):
    from vllm import ModelRegistry

    plugin.register()
    places = {place.module_name for name, place in ModelRegistry.models.items() if name in plugin.MODELS}
    assert places == {"hf_cnllm.vllm.unsupported"}
    from hf_cnllm.vllm.unsupported import UnsupportedModel

    config = SimpleNamespace(model_config=SimpleNamespace(architecture="QWenLMHeadModel"))
    with pytest.raises(
        RuntimeError, match=rf"serves QWenLMHeadModel with vLLM 0.31 to 0.33, not with {reason}"
    ) as refusal:
        UnsupportedModel(vllm_config=config)
    assert "\n" not in str(refusal.value)


def test_a_vllm_that_lacks_what_the_models_build_on(fresh, monkeypatch):
    """It serves other models as before and refuses these in a sentence."""
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "vllm.transformers_utils.model_arch_config_convertor":
            raise ImportError("no such module in this vLLM", name=name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    check_that_models_are_refused(fresh, r".* \(no such module in this vLLM\)")


@pytest.mark.parametrize("version", ["0.30.2", "0.34.0", "0.3.1", "1.0.0+cpu", "dev"])
def test_a_vllm_of_another_version(version, fresh, monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    check_that_models_are_refused(fresh, rf"{re.escape(version)} \(not tested\)")


@pytest.mark.parametrize("version", ["0.31.0", "0.32.0+cpu", "0.33.1rc1.dev2+g1a2b3c", "0.33.0"])
def test_versions_that_are_served(version, monkeypatch):
    import vllm

    import hf_cnllm.vllm as plugin

    monkeypatch.setattr(vllm, "__version__", version)
    plugin.add_hooks()


@pytest.mark.parametrize(
    "golden, tensor",
    [
        ("baichuan2_7b", "lm_head.weight"),
        ("baichuan2_13b", "layers.1.mlp.up_proj.weight"),  # half of what is one matrix in vLLM
        ("qwen", "h.0.attn.c_attn.bias"),
        ("qwen", "h.1.mlp.w2.weight"),
        ("chatglm3_6b", "layers.1.mlp.dense_4h_to_h.weight"),
    ],
)
def test_a_half_written_checkpoint_is_refused(golden, tensor, tmp_path):
    """vLLM by itself serves what is in memory by chance."""
    folder = write_checkpoint(golden, tmp_path)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    (name,) = (name for name in tensors if name.endswith(tensor))
    kept = {other: value for other, value in tensors.items() if other != name}
    save_file(kept, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"The checkpoint is incomplete: `.*"), engine(folder):
        pass


@pytest.mark.parametrize("load_format", ("auto", "dummy"))
def test_single_weights_can_be_replaced(load_format, tmp_path):
    """As trainers with a vLLM of their own do after each step. On a CPU vLLM takes norms only: it has repacked the rest."""
    expected = torch.arange(128.0)

    def replace(model):
        model.load_weights([("transformer.ln_f.weight", expected)])
        return model.model.norm.weight.tolist()

    with engine(write_checkpoint("qwen", tmp_path), load_format=load_format) as llm:
        assert llm.apply_model(replace) == [expected.tolist()]


def test_an_adapter_on_a_head_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    folder = write_checkpoint("baichuan_7b", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(model, LoraConfig(r=8, target_modules=["lm_head"])).save_pretrained(tmp_path / "adapter")
    with engine(folder, enable_lora=True, max_lora_rank=8) as llm:
        request = LoRARequest("adapter", 1, str(tmp_path / "adapter"))
        with pytest.raises(Exception, match=r"expected target modules .* but received \['lm_head'"):
            llm.generate([{"prompt_token_ids": [5]}], SamplingParams(max_tokens=1), lora_request=request)
