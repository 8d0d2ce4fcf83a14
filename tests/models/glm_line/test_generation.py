import pytest
import torch

from hf_cnllm.models.chatglm import ChatGLMConfig
from hf_cnllm.models.chatglm.modeling_chatglm import ChatGLMForConditionalGeneration
from hf_cnllm.models.glm import GLMConfig, GLMForConditionalGeneration

SIZES = {"vocab_size": 100, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "max_sequence_length": 64}
TOKENS = {"pad_token_id": 3, "mask_token_id": 90, "gmask_token_id": 91, "eos_token_id": 99}
PROMPTS = torch.tensor([[5, 6, 7, 8, 91, 92], [3, 3, 9, 5, 91, 92]])

FAMILIES = {
    "chatglm": (
        ChatGLMForConditionalGeneration,
        lambda: ChatGLMConfig(architecture="chatglm", inner_hidden_size=64, bos_token_id=92, **SIZES, **TOKENS),
    ),
    "glm": (
        GLMForConditionalGeneration,
        lambda: GLMConfig(smask_token_id=94, sop_token_id=92, eop_token_id=99, **SIZES, **TOKENS),
    ),
}


def generate(family, attn_implementation, cache_implementation):
    model_class, config = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class._from_config(config(), attn_implementation=attn_implementation).eval()
    outputs = model.generate(
        PROMPTS,
        attention_mask=(PROMPTS != 3).long(),
        max_new_tokens=5,
        do_sample=False,
        cache_implementation=cache_implementation,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(outputs.logits)


@pytest.mark.parametrize("cache_implementation", ["dynamic", "static"])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_backend_generates_alike_with_either_cache(family, attn_implementation, cache_implementation):
    expected = generate(family, "eager", "dynamic")
    torch.testing.assert_close(
        generate(family, attn_implementation, cache_implementation), expected, rtol=1e-4, atol=1e-5
    )
