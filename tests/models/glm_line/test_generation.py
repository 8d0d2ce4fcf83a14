import pytest
import torch

from hf_cnllm.models.chatglm import ChatGLMConfig
from hf_cnllm.models.chatglm.modeling_chatglm import ChatGLMForConditionalGeneration
from hf_cnllm.models.glm import GLMConfig, GLMForConditionalGeneration
from hf_cnllm.models.glm_line import generation

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


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("chatglm", {}),
        ("chatglm", {"early_positions": True}),
        ("chatglm", {"position_encoding_2d": False}),
        ("glm", {}),
        ("glm", {"block_position_encoding": False}),
    ],
)
@torch.no_grad()
def test_positions_are_continued_as_if_worked_out_anew(family, overrides, side, monkeypatch):
    model_class, config = FAMILIES[family]
    config = config()
    config.update(overrides)
    torch.manual_seed(0)
    model = model_class(config).eval()
    prompts = PROMPTS if side == "left" else torch.tensor([[5, 6, 7, 8, 91, 92], [90, 9, 5, 92, 3, 3]])
    mask, calls = (prompts != 3).long(), []
    find = generation.find_positions
    monkeypatch.setattr(generation, "find_positions", lambda *args, **kwargs: calls.append(1) or find(*args, **kwargs))
    generated = model.generate(prompts, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert len(calls) == 1  # the prompt's positions are found, and continued in all steps
    expected = prompts
    for _ in range(5):
        positions = model.positions_of_prompt(expected, mask)
        logits = model(expected, attention_mask=mask, position_ids=positions, use_cache=False).logits
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(generated, expected)


ONE_ROW = {"chatglm": {"position_encoding_2d": False}, "glm": {"block_position_encoding": False}}


def one_row_model(family):
    model_class, config = FAMILIES[family]
    config = config()
    config.update(ONE_ROW[family])
    torch.manual_seed(0)
    return model_class(config).eval()


def test_positions_of_one_row_go_on_in_both_of_their_shapes():
    model, prompt = one_row_model("chatglm"), PROMPTS[:1]
    positions = model.positions_of_prompt(prompt, None)
    assert positions.shape == (1, 1, 6) and positions[0, 0].tolist() == list(range(6))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(prompt, **options)
    for given in (positions, positions[:, 0]):
        assert torch.equal(model.generate(prompt, position_ids=given, **options), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_that_do_not_reach_the_prompts_end_are_refused(family):
    model_class, config = FAMILIES[family]
    model = model_class(config()).eval()
    positions = model.positions_of_prompt(PROMPTS[:1], None)[..., :-1]
    with pytest.raises(ValueError, match=r"`position_ids` has shape \(1, 2, 5\), but the prompt has 6 tokens"):
        model.generate(PROMPTS[:1], position_ids=positions, max_new_tokens=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_with_one_row_of_positions_do_not_tell_the_context(family):
    model = one_row_model(family)
    embeds = model.get_input_embeddings()(PROMPTS[:1])
    with pytest.raises(ValueError, match="only `input_ids` tell where the context ends"):
        model.generate(inputs_embeds=embeds, position_ids=torch.arange(6)[None, None], max_new_tokens=2)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_positions_of_one_row_that_begin_anew_part_the_texts_of_a_packed_row(family):
    model, (first, second) = one_row_model(family), (PROMPTS[:1], PROMPTS[1:, 2:])
    positions = torch.cat([torch.arange(6), torch.arange(4)])[None]
    logits = model(torch.cat([first, second], dim=1), position_ids=positions, use_cache=False).logits
    for part, ids in ((logits[:, :6], first), (logits[:, 6:], second)):
        torch.testing.assert_close(part, model(ids, attention_mask=torch.ones_like(ids)).logits, rtol=0, atol=1e-5)
