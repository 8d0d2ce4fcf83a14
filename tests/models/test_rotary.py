"""The shared rotary embedding keeps its frequencies exact whatever the model is cast to."""

import pytest
import torch

from hf_cnllm import BaichuanConfig, BaichuanModel


def small_model() -> BaichuanModel:
    config = BaichuanConfig(
        vocab_size=20, hidden_size=256, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, norm_head=False,
    )  # fmt: skip
    return BaichuanModel(config)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float16).float()])
def test_casting_a_model_leaves_the_angles_exact(cast):
    exact = small_model().rotary_emb.inv_freq
    rotary = cast(small_model()).rotary_emb
    assert rotary.inv_freq.dtype == torch.float32
    assert torch.equal(rotary.inv_freq, exact) and torch.equal(rotary.original_inv_freq, exact)
    cos, _ = rotary(torch.zeros(1, dtype=torch.float64), torch.tensor([[4000]]))
    torch.testing.assert_close(cos[0, 0, :64], torch.cos(4000.0 * exact).double())


def test_the_table_stays_a_buffer():
    rotary = small_model().to("meta").rotary_emb
    assert rotary.inv_freq.is_meta and dict(rotary.named_buffers()).keys() == {"inv_freq", "original_inv_freq"}
    assert not rotary.state_dict()
