"""What every model's `generate` does alike: it ends where logits are no numbers, and runs no repository's code."""

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LogitsProcessor, LogitsProcessorList

import hf_cnllm  # noqa: F401
from goldens import GOLDENS

GLM_TOKENS = {"mask_token_id": 8, "sop_token_id": 9, "eop_token_id": 10}
MODELS = {
    "baichuan2_7b": (AutoModelForCausalLM, {}, [8, 9]),
    "baichuan2_13b": (AutoModelForCausalLM, {}, [8, 9]),
    "qwen": (AutoModelForCausalLM, {}, [8, 9]),
    "chatglm_6b_3layer": (AutoModel, {}, None),
    "chatglm2_6b": (AutoModel, {}, [8, 9]),
    "glm": (AutoModelForSeq2SeqLM, GLM_TOKENS, [8, 9]),
    "glm130b": (AutoModelForSeq2SeqLM, {"gmask_token_id": 8, "bos_token_id": 9}, [8, 9]),
}
WAYS = {
    "greedy": {},
    "greedy without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "sampling": {"do_sample": True},
    "beams": {"num_beams": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "one token": {"max_new_tokens": 1},
}
CODE = "open({mark!r}, 'w').close()\ndef generate(model, *args, **kwargs):\n    return 'planted'\n"


def load(name, folder=None, **options):
    auto_class, defaults, end = MODELS[name]
    model = auto_class.from_pretrained(folder or GOLDENS / name, dtype=torch.float32, **defaults, **options).eval()
    end = [model.config.gmask_token_id, model.config.bos_token_id] if end is None else end
    return model, torch.tensor([[5, 6, 7, *end]])


def generate(model, prompt, **options):
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1} | options
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_end_generation(name, way, value):
    model, prompt = load(name)
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.ndim == 1).fill_(value)
    with pytest.raises(RuntimeError, match=r"NaN or infinite logits|probability tensor contains"):
        generate(model, prompt, **WAYS[way])


class _At(LogitsProcessor):
    """Puts a value into the logits of one step."""

    def __init__(self, length, value):
        self.length, self.value = length, value

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        if input_ids.shape[1] == self.length:
            scores[0, 0] = self.value
        return scores


@pytest.mark.parametrize("name", MODELS)
def test_each_step_is_looked_at_the_last_one_too(name):
    model, prompt = load(name)
    embedding = model.get_input_embeddings().weight
    answer = generate(model, prompt, min_new_tokens=3)[0, prompt.shape[1] :].tolist()
    seen = {*prompt.flatten().tolist()}
    later = next(token for token in answer[:-1] if token not in seen)
    with torch.no_grad():
        embedding[later] = float("nan")
    with pytest.raises(RuntimeError, match="NaN or infinite logits"):
        generate(model, prompt, min_new_tokens=3)


@pytest.mark.parametrize("name", MODELS)
def test_callers_may_forbid_and_force_tokens(name):
    """Minus infinity forbids; a caller's own processors come behind the check."""
    model, prompt = load(name)
    for value in (-float("inf"), float("inf")):
        given = LogitsProcessorList([_At(prompt.shape[1], value)])
        output = generate(model, prompt, logits_processor=given)
        assert (output[0, prompt.shape[1]] == 0) == (value > 0) and len(given) == 1


@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes_where_logits_are_numbers(name):
    model, prompt = load(name)
    logits = model(prompt, attention_mask=torch.ones_like(prompt)).logits[:, -1]
    output = generate(model, prompt, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(output.logits[0], logits)
    assert output.sequences[0, prompt.shape[1]] == logits.argmax()


@pytest.mark.parametrize("name", MODELS)
def test_no_custom_generate_of_a_folder_runs(name, tmp_path):
    mark, folder = tmp_path / "it-ran", tmp_path / "model"
    load(name)[0].save_pretrained(folder)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(mark=str(mark)))
    for options in ({}, {"trust_remote_code": True}, {"trust_remote_code": False}):
        model, prompt = load(name, folder, **options)
        assert isinstance(generate(model, prompt), torch.Tensor)
        with pytest.raises(PermissionError, match=r"runs no code of repositories.*pass the function itself"):
            generate(model, prompt, custom_generate=str(folder), **options)
    with pytest.raises(PermissionError, match="transformers-community"):  # what transformers moved to the Hub
        generate(model, prompt, custom_generate="transformers-community/dola", trust_remote_code=True)
    assert not mark.exists()
    assert generate(model, prompt, custom_generate=lambda model, *args, **kwargs: "mine") == "mine"
