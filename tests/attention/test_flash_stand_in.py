"""The stand-in for flash-attn: that transformers takes it for the real one, and that its forms agree with each other."""

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

import flash_stand_in
from flash_stand_in import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, pad_input, unpad_input


def states(*lengths, dtype=torch.bfloat16, batch=2, heads=4):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, length, heads, 8, generator=generator).to(dtype) for length in lengths]


def test_transformers_sees_it_only_while_it_is_installed():
    assert not is_flash_attn_2_available() or torch.cuda.is_available()
    with flash_stand_in.installed():
        assert is_flash_attn_2_available()
        from flash_attn.bert_padding import index_first_axis

        assert index_first_axis is flash_stand_in.index_first_axis
    assert not is_flash_attn_2_available() or torch.cuda.is_available()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"q": torch.float32, "k": torch.float32, "v": torch.float32}, "only support fp16 and bf16"),
        ({"k": torch.float16}, "query and key must have the same dtype"),
        ({"v": torch.float16}, "query and value must have the same dtype"),
        ({"dropout_p": 1.0}, "p_dropout"),
        ({"softcap": 1.0, "dropout_p": 0.5}, "Softcapping does not support dropout"),
        ({"return_attn_probs": True}, "return_softmax is only supported"),
        ({"alibi_slopes": torch.ones(4).bfloat16()}, "must have dtype fp32"),
        ({"alibi_slopes": torch.ones(3)}, r"must have shape \(4,\) or \(2, 4\)"),
    ],
)
def test_it_refuses_what_the_real_one_refuses(change, complaint):
    q, k, v = (
        tensor.to(change.pop(name, torch.bfloat16)) for name, tensor in zip("qkv", states(5, 5, 5), strict=True)
    )
    with pytest.raises(RuntimeError, match=complaint):
        flash_attn_func(q, k, v, **change)


@pytest.mark.parametrize("window", [(-1, -1), (2, 2), (1, 0)])
@pytest.mark.parametrize("slopes", [None, torch.tensor([0.5, 0.25, 0.1, 0.0]), torch.rand(2, 4)])
@pytest.mark.parametrize("causal", [False, True])
def test_its_three_functions_agree(causal, slopes, window):
    q, k, v = states(3, 7, 7)
    options = {"causal": causal, "window_size": window, "alibi_slopes": slopes}
    expected = flash_attn_func(q, k, v, **options)
    ends = [torch.tensor([0, length, 2 * length], dtype=torch.int32) for length in (3, 7)]
    packed = flash_attn_varlen_func(*(tensor.flatten(0, 1) for tensor in (q, k, v)), *ends, 3, 7, **options)
    assert torch.equal(packed.view_as(expected), expected)

    rooms = [torch.cat([tensor[:, :4], torch.full_like(tensor, 9.0)], dim=1) for tensor in (k, v)]
    lengths = torch.tensor([4, 4], dtype=torch.int32)
    cached = flash_attn_with_kvcache(q, *rooms, k[:, 4:], v[:, 4:], cache_seqlens=lengths, **options)
    assert torch.equal(cached, expected) and torch.equal(rooms[0][:, :7], k)

    pages = [torch.zeros(6, 4, 4, 8, dtype=torch.bfloat16) for _ in range(2)]
    table = torch.tensor([[5, 0], [2, 3]], dtype=torch.int32)
    for row in range(2):
        for page, tensor in zip(pages, (k, v), strict=True):
            page[table[row, 0]] = tensor[row, :4]
    paged = flash_attn_with_kvcache(q, *pages, k[:, 4:], v[:, 4:], cache_seqlens=lengths, block_table=table, **options)
    assert torch.equal(paged, expected)


def test_padding_is_taken_out_and_put_back():
    (tokens,) = states(6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    packed, indices, borders, longest, used = unpad_input(tokens, mask)
    assert (borders.tolist(), longest, used.tolist()) == ([0, 4, 9], 5, [4, 5])
    assert torch.equal(pad_input(packed, indices, 2, 6), tokens * mask[..., None, None])
