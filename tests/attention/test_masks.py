"""The mask room: every form of `attention_mask` checked and brought into the form that each backend takes."""

from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_cnllm import QWenConfig
from hf_cnllm.attention import alibi
from hf_cnllm.attention.alibi import create_alibi_mask
from hf_cnllm.attention.mask_values import check_mask
from hf_cnllm.attention.masks import as_bool, create_causal_mask, create_window_masks, make_mask, read_mask
from hf_cnllm.attention.prefix_lm import create_prefix_lm_mask

NUMBERS = torch.tensor([[1, 1, 1, 2, 2, 0], [0, 1, 1, 1, 1, 1]])


def config_of(backend):
    config = QWenConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, intermediate_size=16)
    config._attn_implementation = backend
    return config


def dense(mask, batch, queries, keys):
    """Any backend's mask as bool [batch, queries, keys]."""
    if mask is None:
        return torch.ones(queries, keys, dtype=torch.bool).tril().expand(batch, -1, -1)
    if isinstance(mask, torch.Tensor):
        return as_bool(mask)[:, 0].expand(batch, -1, -1)
    indices = torch.meshgrid(torch.arange(batch), torch.arange(queries), torch.arange(keys), indexing="ij")
    return mask.mask_mod(indices[0], 0, *indices[1:]).bool()


def who_sees_whom(numbers):
    """The definition, in loops."""
    batch, length = numbers.shape
    pairs = torch.zeros(batch, length, length, dtype=torch.bool)
    for row in range(batch):
        for query in range(length):
            for key in range(query + 1):
                pairs[row, query, key] = numbers[row, key] != 0 and numbers[row, key] == numbers[row, query]
    return pairs


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
def test_numbers_in_a_2d_mask_pack_sequences(backend):
    embeds = torch.empty(2, 6, 16)
    mask = create_causal_mask(config_of(backend), embeds, NUMBERS, None)
    tokens = NUMBERS != 0
    assert torch.equal(dense(mask, 2, 6, 6)[tokens], who_sees_whom(NUMBERS)[tokens])
    windows = create_window_masks(config_of(backend), embeds, NUMBERS, None)
    assert torch.equal(dense(windows["full_attention"], 2, 6, 6)[tokens], who_sees_whom(NUMBERS)[tokens])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
def test_numbers_in_a_2d_mask_reach_over_a_cache(backend, kind):
    config = config_of(backend)
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=config, max_cache_len=9)
    states = torch.zeros(2, 2, 4, 8)
    for layer in range(2):
        cache.update(states, states, layer)
    keys = 6 if kind == "dynamic" else 9
    mask = create_causal_mask(config, torch.empty(2, 2, 16), NUMBERS, cache)
    expected = torch.zeros(2, 2, keys, dtype=torch.bool)
    expected[..., :6] = who_sees_whom(NUMBERS)[:, 4:]
    tokens = NUMBERS[:, 4:] != 0
    assert torch.equal(dense(mask, 2, 2, keys)[tokens], expected[tokens])


@pytest.mark.parametrize("create", [create_causal_mask, create_prefix_lm_mask, create_alibi_mask])
@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
def test_a_4d_mask_says_everything_in_whatever_dtype(backend, dtype, create, monkeypatch):
    """transformers' functions add a bool mask to the scores: on eager and flex attention it said nothing."""
    monkeypatch.setattr(alibi, "DENSE_PAIRS", 1)  # so that SDPA folds, as for long prompts
    pairs = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.4
    pairs |= torch.eye(4, dtype=torch.bool)
    given = pairs.to(dtype) if dtype != torch.float32 else torch.where(pairs, 0.0, -1e9)
    more = (None,) if create is create_prefix_lm_mask else ()
    mask = create(config_of(backend), torch.empty(2, 4, 16), given, None, *more)
    if create is create_alibi_mask and backend != "eager":
        mask = mask.mask if backend == "sdpa" else mask.block_mask
    elif backend == "eager":
        assert mask.is_floating_point()
        mask = mask[:, :1] > -1e8
    assert torch.equal(dense(mask, 2, 4, 4), pairs[:, 0])


@pytest.mark.parametrize("create", [create_causal_mask, create_prefix_lm_mask])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_the_minimum_of_another_dtype_is_not_minus_infinity(backend, dtype, given, create):
    """A row of padding that looks nowhere would be NaN, and all rows of the next layer with it."""
    pairs = torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()
    pairs[..., 0] = False
    additive = torch.zeros(pairs.shape, dtype=given).masked_fill(~pairs, torch.finfo(given).min)
    more = (None,) if create is create_prefix_lm_mask else ()
    mask = create(config_of(backend), torch.empty(2, 4, 16, dtype=dtype), additive, None, *more)
    assert mask.dtype == dtype and mask.isfinite().all()
    assert torch.equal(mask == 0, pairs)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_4d_mask_leaves_out_learned_keys_and_the_free_room_of_a_static_cache(backend):
    config = config_of(backend)
    cache = StaticCache(config=config, max_cache_len=9)
    states = torch.zeros(1, 2, 2, 8)
    for layer in range(2):
        cache.update(states, states, layer)
    pairs = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]
    mask = create_prefix_lm_mask(config, torch.empty(1, 3, 16), pairs, cache, None, learned_keys=2)
    expected = torch.zeros(1, 3, 9, dtype=torch.bool)
    expected[..., :2], expected[..., 2:5] = True, pairs[0]
    assert torch.equal(dense(mask, 1, 3, 9), expected)


def test_flex_attention_follows_restarts_and_the_callers_own_mask_too():
    """Restarting positions used to replace what the caller's mask function said."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    embeds = torch.empty(1, 6, 16)
    window = make_mask(config_of("flex_attention"), embeds, read_mask(embeds, None, None), None, positions, window=2)
    expected = who_sees_whom(torch.tensor([[1, 1, 1, 2, 2, 2]])) & torch.ones(6, 6, dtype=torch.bool).triu(-1)
    assert torch.equal(dense(window, 1, 6, 6), expected)
    prefix = make_mask(
        config_of("flex_attention"),
        embeds,
        read_mask(embeds, None, None),
        None,
        positions,
        or_mask_function=lambda batch, head, query, key: key == 5,
    )
    expected = who_sees_whom(torch.tensor([[1, 1, 1, 2, 2, 2]]))
    expected[0, 3:, 5] = True
    assert torch.equal(dense(prefix, 1, 6, 6), expected)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
def test_numbers_are_followed_while_compiling_too(backend, monkeypatch):
    """Values cannot be read then: padding looks as it does otherwise, and sequences are apart."""
    padding, tokens = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0]]), NUMBERS != 0
    embeds, config = torch.empty(2, 6, 16), config_of(backend)
    expected = dense(create_causal_mask(config, embeds, padding, None), 2, 6, 6)
    for module in ("masks", "mask_values"):
        monkeypatch.setattr(f"hf_cnllm.attention.{module}.is_tracing", lambda tensor: True)
    assert torch.equal(dense(create_causal_mask(config, embeds, padding, None), 2, 6, 6), expected)
    packed = dense(create_causal_mask(config, embeds, NUMBERS, None), 2, 6, 6)
    assert torch.equal(packed[tokens], who_sees_whom(NUMBERS)[tokens])


def test_flash_attention_does_not_see_the_free_room_of_a_static_cache():
    config = config_of("flash_attention_2")
    cache = StaticCache(config=config, max_cache_len=9)
    mask = create_causal_mask(config, torch.empty(2, 4, 16), None, cache)
    assert mask.tolist() == [[1] * 4] * 2
    assert create_causal_mask(config, torch.empty(2, 4, 16), None, DynamicCache()) is None


@pytest.mark.parametrize("mask", [NUMBERS, torch.ones(2, 1, 6, 6, dtype=torch.bool)], ids=["numbers", "4-D"])
def test_flash_attention_refuses_what_it_cannot_follow(mask):
    with pytest.raises(ValueError, match="takes no mask for single queries and keys"):
        create_causal_mask(config_of("flash_attention_2"), torch.empty(2, 6, 16), mask, None)


def original_mask(length, context, padding=0):
    """As the original ChatGLM-6B makes it, True where a key is hidden."""
    mask = torch.ones(length, length).tril()
    mask[:, :context] = 1
    return torch.nn.functional.pad(mask < 0.5, (padding, 0, padding, 0), value=True)[None, None]


@pytest.mark.parametrize("create", [create_causal_mask, create_prefix_lm_mask, create_alibi_mask])
@pytest.mark.parametrize(
    "mask",
    [original_mask(8, 3), original_mask(8, 8), original_mask(5, 2, padding=3)],
    ids=["text", "context", "padded"],
)
def test_masks_that_are_true_where_hidden_are_refused(mask, create):
    more = (None,) if create is create_prefix_lm_mask else ()
    with pytest.raises(ValueError, match="Pass `~attention_mask`"):
        create(config_of("sdpa"), torch.empty(1, 8, 16), mask, None, *more)
    create(config_of("sdpa"), torch.empty(1, 8, 16), ~mask, None, *more)


def test_masks_with_rows_of_padding_are_not_taken_for_inverted_ones():
    pairs = torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()
    pairs[1, :, :3] = pairs[0, :, :2] = False
    config = config_of("sdpa")
    create_causal_mask(config, torch.empty(2, 4, 16), pairs, None)
    create_causal_mask(config, torch.empty(2, 4, 16), torch.ones(2, 1, 4, 4, dtype=torch.bool), None)
    cache = DynamicCache()
    cache.update(torch.zeros(2, 2, 2, 8), torch.zeros(2, 2, 2, 8), 0)
    create_causal_mask(config, torch.empty(2, 2, 16), pairs[:, :, 2:], cache)
    with pytest.raises(ValueError, match="Pass `~attention_mask`"):  # the diagonal begins behind the cache
        create_causal_mask(
            config, torch.empty(2, 2, 16), ~torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()[:, :, 2:], cache
        )


@pytest.mark.parametrize(
    "shape", [(2, 3), (2, 9), (1, 8), (2, 3, 8), (8,), (), (3, 1, 3, 8), (2, 1, 2, 8), (2, 1, 3, 7)]
)
def test_masks_of_another_shape(shape):
    for fitting in (None, torch.ones(2, 8), torch.ones(2, 1, 3, 8), torch.ones(1, 1, 3, 8), {"full_attention": None}):
        check_mask(fitting, batch=2, past=5, queries=3)
    with pytest.raises(ValueError, match=r"has shape .*2 sequences of 8 tokens.* shape \[2, 8\] or \[2, 1, 3, 8\]"):
        check_mask(torch.ones(shape), batch=2, past=5, queries=3)
    cache = DynamicCache()
    cache.update(torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 8), 0)
    for create in (create_causal_mask, create_window_masks):
        with pytest.raises(ValueError, match=r"`attention_mask` has shape"):
            create(config_of("sdpa"), torch.empty(2, 3, 16), torch.ones(shape), cache)


def test_a_4d_mask_longer_than_the_keys_is_refused():
    config = SimpleNamespace(_attn_implementation="sdpa")
    with pytest.raises(ValueError, match=r"shape \[1, 4\] or \[1, 1, 4, 4\]"):
        create_causal_mask(config, torch.empty(1, 4, 8), torch.ones(1, 1, 4, 5, dtype=torch.bool), None)
