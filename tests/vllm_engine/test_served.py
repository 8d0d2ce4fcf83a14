"""What needs no vLLM: which configurations are served, how long, and what ends an answer."""

import pytest
from transformers import AutoConfig, AutoTokenizer, GlmConfig

from goldens import GOLDENS
from hf_cnllm.vllm.served import check_served, longest, needs_ntk, stop_ids
from tokenizer_goldens import FIXTURES

SERVED = (
    "baichuan_7b", "baichuan_13b", "baichuan2_7b", "baichuan2_13b", "qwen", "qwen_early", "qwen_bias", "qwen_72b",
    "chatglm2_6b", "chatglm2_6b_32k", "chatglm2_6b_int8", "chatglm2_6b_int4", "chatglm3_6b", "chatglm3_6b_32k",
)  # fmt: skip
REFUSED = {
    "chatglm_6b": "prefix language model",
    "chatglm_6b_150k": "prefix language model",
    "glm": "prefix language model",
    "glm130b": "prefix language model",
    "chatglm2_6b_ptuning": "`pre_seq_len`",
    "chatglm3_6b_ptuning": "`pre_seq_len`",
    "chatglm2_6b_mha": "`multi_query_attention`",
}


def config_of(golden: str, **changes):
    return AutoConfig.from_pretrained(GOLDENS / golden, **changes)


@pytest.mark.parametrize("golden", SERVED)
def test_served(golden):
    check_served(config_of(golden))


@pytest.mark.parametrize("golden", REFUSED)
def test_refused_with_what_to_use_instead(golden):
    with pytest.raises(ValueError, match=rf"{REFUSED[golden]}.* Use transformers' `generate`\.$") as refusal:
        check_served(config_of(golden))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "golden, changes",
    [
        ("baichuan2_7b", {"hidden_act": "gelu"}),
        ("baichuan2_7b", {"tie_word_embeddings": True}),
        ("qwen", {"tie_word_embeddings": True}),
        ("chatglm2_6b", {"post_layer_norm": False}),
        ("chatglm2_6b", {"rmsnorm": False}),
    ],
)
def test_unpublished_kinds_are_refused(golden, changes):
    (field,) = changes
    with pytest.raises(ValueError, match=f"`{field}`"):
        check_served(config_of(golden, **changes))


def test_other_models_are_none_of_our_business():
    check_served(AutoConfig.for_model("llama"))
    check_served(GlmConfig())  # GLM-4


@pytest.mark.parametrize(
    "golden, changes, expected",
    [
        ("baichuan_7b", {}, (32, "max_position_embeddings")),
        ("baichuan2_13b", {}, (24, "model_max_length")),
        ("qwen", {}, (256, "max_position_embeddings")),  # dynamic NTK reaches beyond the trained length
        ("qwen", {"use_dynamic_ntk": False}, (32, "seq_length")),
        ("chatglm2_6b_32k", {}, (128, "max_position_embeddings")),
    ],
)
def test_longest(golden, changes, expected):
    assert longest(config_of(golden, **changes)) == expected


def test_needs_ntk():
    assert [needs_ntk(config_of("qwen"), length) for length in (32, 33)] == [False, True]
    assert not needs_ntk(config_of("qwen_72b"), 10**6)


@pytest.mark.parametrize(
    "vocabulary, ends",
    [
        ("baichuan1_small", ["</s>"]),
        ("baichuan2_small", ["</s>"]),
        ("qwen_small", ["<|im_end|>", "<|im_start|>"]),
        ("chatglm2_small", ["</s>"]),
        ("chatglm3_small", ["</s>", "<|user|>", "<|observation|>"]),
    ],
)
def test_stop_ids(vocabulary, ends):
    tokenizer = AutoTokenizer.from_pretrained(FIXTURES / "vocab" / vocabulary)
    names = [tokenizer.convert_ids_to_tokens(index) for index in stop_ids(tokenizer)]
    assert [name.decode() if isinstance(name, bytes) else name for name in names] == ends
