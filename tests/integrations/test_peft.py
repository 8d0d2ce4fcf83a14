"""PEFT's methods on every family without a word about modules: the table in `families.py` names their defaults."""

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import constants
from transformers import AutoModelForSequenceClassification

import hf_cnllm
from goldens import GOLDENS
from test_features import FAMILIES, load, prompt

ROWS = [row for row in FAMILIES if row.checkpoint in {"baichuan_7b", "baichuan2_13b", "qwen", "chatglm2_6b"}]
PREFIX_ROWS = [row for row in FAMILIES if row.prompt_end]
families = pytest.mark.parametrize("row", ROWS + PREFIX_ROWS, ids=lambda row: row.checkpoint)
prefix_families = pytest.mark.parametrize("row", PREFIX_ROWS, ids=lambda row: row.checkpoint)

# The tiny models are narrower than some defaults allow.
SETTINGS = {
    "AdaLora": {"total_step": 5, "tinit": 1, "tfinal": 1},
    "C3A": {"block_size": 4},
    "Miss": {"r": 4},
    "PTuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "PrefixTuning": {"num_virtual_tokens": 3},
    "PromptTuning": {"num_virtual_tokens": 3},
    "Road": {"group_size": 4},
    "Shira": {"r": 4},
    "VBLoRA": {"vector_length": 4, "num_vectors": 8, "topk": 2},
}
CONFIGS = {"PTuning": "PromptEncoderConfig", "LNTuning": "LNTuningConfig"}
QUICK = ("IA3", "Vera", "OFT", "LNTuning", "Lora", "AdaLora", "PrefixTuning", "PromptTuning", "PTuning")
MORE = (
    *("BOFT", "C3A", "Deft", "DeLora", "FourierFT", "Frod", "Glora", "Gralora", "HRA", "Hira", "Lily", "LoHa", "LoKr", "Miss"),
    *("Osf", "OSF", "Peanut", "Psoft", "PVera", "RandLora", "Road", "Shira", "SuperTuning", "TinyLora", "UniLora", "VBLoRA"),
    "WaveFT",
)  # fmt: skip
METHODS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in (*QUICK, *MORE)
    if hasattr(peft, CONFIGS.get(name, f"{name}Config"))
]
NEEDS_IDS = ("PromptTuning", "PTuning")  # of a prefix language model, and PEFT gives embeddings


def adapted(row, method, **settings):
    torch.manual_seed(0)
    config_class = getattr(peft, CONFIGS.get(method, f"{method}Config"))
    config = config_class(task_type="CAUSAL_LM", **SETTINGS.get(method, {}), **settings)
    return get_peft_model(load(row), config)


def run(model, ids, **kwargs):
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), **kwargs)


@pytest.mark.parametrize("method", METHODS)
@families
def test_a_step_changes_the_adapter_alone_and_it_reloads(row, method, tmp_path):
    if row in PREFIX_ROWS and method in NEEDS_IDS:
        pytest.skip("refused: test_prompts_without_ids_are_refused_on_prefix_models")
    model, ids = adapted(row, method).train(), prompt(row, 9)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):  # where one half of an adapter begins at zero, the other moves in the second step
        optimizer.zero_grad()
        run(model, ids, labels=ids).loss.backward()
        optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed and changed <= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        logits = run(model.eval(), ids).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(load(row), tmp_path).eval()
        torch.testing.assert_close(run(again, ids).logits, logits, atol=2e-5, rtol=0)
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)


@prefix_families
@pytest.mark.parametrize("method", NEEDS_IDS)
def test_prompts_without_ids_are_refused_on_prefix_models(row, method):
    ids = prompt(row, 9)
    with pytest.raises(ValueError, match=r"PEFT's prompt tuning, P-tuning and CPT cannot: use its PrefixTuningConfig"):
        run(adapted(row, method), ids, labels=ids)


def test_every_mapping_of_peft_knows_every_family():
    """Also those that the next release adds."""
    names = [name for name in vars(constants) if name.endswith("_MODULES_MAPPING")]
    assert len(names) >= 20
    for family in hf_cnllm.FAMILIES:
        missing = {name for name in names if family.config.model_type not in getattr(constants, name)}
        assert missing <= {"TRANSFORMERS_MODELS_TO_BEFT_TARGET_MODULES_MAPPING"}


@families
def test_modules_to_save_are_trained_by_their_own_names_or_refused(row):
    model = load(row)
    modules = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    ours = [modules[id(module)] for module in (model.get_input_embeddings(), model.get_output_embeddings())]
    saved = adapted(row, "Lora", modules_to_save=ours)
    assert sum("modules_to_save" in name for name, p in saved.named_parameters() if p.requires_grad) >= 2
    for name in {"embed_tokens", "lm_head", "wte", "word_embeddings", "output_layer"} - set(ours):
        with pytest.raises(
            ValueError, match=rf"has no module '{name}'. Its embedding and head are '{ours[0]}' and '{ours[1]}'"
        ):
            adapted(row, "Lora", modules_to_save=[name])


@pytest.mark.parametrize("targets", [None, "all-linear"])
@pytest.mark.parametrize("checkpoint", ["qwen", "baichuan_7b", "chatglm_6b_3layer", "chatglm2_6b"])
@torch.no_grad()
def test_the_head_of_a_classifier_is_trained_and_comes_with_the_adapter(checkpoint, targets, tmp_path):
    def classifier():
        return AutoModelForSequenceClassification.from_pretrained(GOLDENS / checkpoint, num_labels=2, pad_token_id=0)

    model = get_peft_model(
        classifier(), peft.LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, target_modules=targets)
    )
    head = [p for name, p in model.named_parameters() if p.requires_grad and "lora" not in name]
    assert head and not any("lora" in name for name, _ in model.named_parameters() if "modules_to_save" in name)
    for parameter in head:
        parameter.normal_()
    ids = torch.arange(10, 20)[None]
    if "6b_3layer" in checkpoint:
        ids = torch.cat([ids, torch.tensor([[141, 144]])], dim=1)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(classifier(), tmp_path).eval()  # whose head is another random one
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_heads_of_classifiers_are_saved_as_ever_and_adapters_unload():
    model = AutoModelForSequenceClassification.from_pretrained(GOLDENS / "qwen", num_labels=2)
    wrapped = get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS"))
    assert any("score.modules_to_save" in name for name, p in wrapped.named_parameters() if p.requires_grad)
    assert hasattr(model, "peft_config")
    bare = wrapped.unload()
    assert not any("lora" in name for name, _ in bare.named_parameters())
    model = AutoModelForSequenceClassification.from_pretrained(GOLDENS / "qwen", num_labels=2)
    assert not hasattr(model, "peft_config")
    peft.inject_adapter_in_model(peft.LoraConfig(), model, "mine")
    assert model.peft_config.keys() == {"mine"}
