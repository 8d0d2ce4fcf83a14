"""Qwen v1 past its trained length: dynamic NTK and LogN in every way of generating, and factors that follow the caches."""

import copy

import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.generation.continuous_batching.utils import WorkloadHints
from transformers.utils import logging

from goldens import assert_close
from hf_cnllm import QWenConfig, QWenLMHeadModel
from hf_cnllm._compat import CACHE
from qwen_models import LENGTHS, NEW_TOKENS, WAYS_OF_GENERATING, WIDTH, generate, load


@pytest.mark.parametrize("way", WAYS_OF_GENERATING)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_the_same_in_every_way(way, beams, batch):
    if beams > 1 and "chunks" in way:
        beams = 2
    model = load()
    expected = generate(model, *batch, num_beams=beams)
    assert torch.equal(generate(model, *batch, num_beams=beams, **WAYS_OF_GENERATING[way]), expected)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("own_positions", [False, True])
def test_each_row_of_a_batch_is_as_if_alone(own_positions, backend, batch):
    """NTK goes by each row's own length. LogN counts columns as the original does, except by positions of one's own."""
    model = load(backend=backend, use_logn_attn=own_positions)
    ids, mask = batch
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if own_positions else {}
    generated = generate(model, ids, mask, **positions)
    for row, length in enumerate(LENGTHS):
        alone = generate(model, ids[row : row + 1, -length:])
        assert generated[row, WIDTH:].tolist() == alone[0, length:].tolist()


def test_several_samples_of_a_prompt_share_its_factor(batch):
    model = load()
    ids, mask = batch
    torch.manual_seed(0)
    several = generate(model, ids, mask, do_sample=True, num_return_sequences=2)
    torch.manual_seed(0)
    repeated = generate(model, ids.repeat_interleave(2, 0), mask.repeat_interleave(2, 0), do_sample=True)
    assert torch.equal(several, repeated)


@pytest.mark.parametrize("length", [28, 32, 41, 64])  # the candidates may reach past 32 and 64, the prompt does not
@pytest.mark.parametrize("assistant", ["lookup", "same model", "other weights", "other family"])
def test_assisted_decoding_gives_greedy_ids(assistant, length, batch):
    model, ids = load(), batch[0][:1, :length]
    kwargs = {"prompt_lookup_num_tokens": 4}
    if assistant != "lookup":
        torch.manual_seed(0)
        helper = load() if assistant != "other family" else LlamaForCausalLM(
            LlamaConfig(vocab_size=151, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
        ).eval()  # fmt: skip
        if assistant == "other weights":
            torch.nn.init.normal_(helper.lm_head.weight)
        kwargs = {"assistant_model": helper}
    assert torch.equal(generate(model, ids, **kwargs), generate(model, ids))


@torch.no_grad()
def test_a_loop_by_hand_equals_generate_while_others_run(batch):
    model = load()
    prompts = [batch[0][:1, :length] for length in (70, 20, 40)]
    expected = [generate(model, prompt) for prompt in prompts]
    outputs = [model(prompt, use_cache=True) for prompt in prompts]
    sequences = list(prompts)
    for step in range(NEW_TOKENS):
        for index, output in enumerate(outputs):
            token = output.logits[:, -1:].argmax(-1)
            sequences[index] = torch.cat([sequences[index], token], dim=1)
            if step < NEW_TOKENS - 1:
                outputs[index] = model(token, cache=output.cache)
    for sequence, want in zip(sequences, expected, strict=True):
        assert torch.equal(sequence, want)


def new_cache(kind: str, model):
    return {
        "model's own": lambda: None,
        "lazy": lambda: DynamicCache(),
        "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=100),
    }[kind]()


@pytest.mark.parametrize("kind", ["model's own", "lazy", "dynamic", "static"])
@torch.no_grad()
def test_rows_take_their_factor_along_when_a_cache_is_rearranged(kind, batch):
    model = load()
    ids, mask = batch
    cache = model(ids, attention_mask=mask, cache=new_cache(kind, model), use_cache=True).cache
    tokens, mask = torch.tensor([[5], [6], [7]]), torch.cat([mask, mask.new_ones(3, 1)], dim=1)

    def step(cache, rows):
        return model(tokens[rows], attention_mask=mask[rows], cache=cache).logits

    expected = step(copy.deepcopy(cache), torch.arange(3))
    operations = {"reorder_cache": (torch.tensor([2, 0, 1]),) * 2}
    if kind != "static":
        operations["batch_repeat_interleave"] = (2, torch.tensor([0, 0, 1, 1, 2, 2]))
        operations["batch_select_indices"] = (torch.tensor([1, 2]),) * 2
    for operation, (argument, rows) in operations.items():
        changed = copy.deepcopy(cache)
        getattr(changed, operation)(argument)
        assert_close(step(changed, rows), expected[rows])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_a_generation_keeps_the_factor_of_its_first_call(kind, batch):
    model, ids = load(), batch[0][:1]
    for first in (20, 50):  # the factor is 1 resp. 3, that of the whole is 7
        cache = new_cache(kind, model)
        model(ids[:, :first], cache=cache)
        rest = model(ids[:, first:], cache=cache).logits
        assert_close(rest, model(ids, prompt_lengths=first).logits[:, first:])
        if kind == "static":  # `reset` does not empty a dynamic cache before transformers 5.17 or so
            cache.reset()
            assert_close(model(ids, cache=cache).logits, model(ids).logits)


@pytest.mark.parametrize("prompt", [20, 40])  # the factor is 1 resp. 3
@torch.no_grad()
def test_a_cache_made_of_bare_keys_does_not_forget_its_factor_silently(prompt, batch):
    model, ids = load(), batch[0][:1, :50]
    cache = model(ids[:, :prompt], use_cache=True).cache
    expected = model(ids[:, prompt:], cache=cache).logits

    def bare(length):
        return DynamicCache([(layer.keys[:, :, :length], layer.values[:, :, :length]) for layer in cache.layers])

    continued = model(ids[:, prompt:], cache=bare(prompt), prompt_lengths=prompt).logits
    assert_close(continued, expected)
    with pytest.raises(ValueError, match=r"the cache holds 50 tokens, more than .*`prompt_lengths`"):
        model(ids[:, :1], cache=bare(50))
    more = torch.cat([ids, ids[:, :3]], dim=1)
    lengths = torch.tensor([prompt])
    assert torch.equal(
        generate(model, more, cache=bare(50), prompt_lengths=lengths),
        generate(model, more, cache=copy.deepcopy(cache)),
    )
    if prompt <= model.config.seq_length:
        assert_close(model(ids[:, prompt:], cache=bare(prompt)).logits, expected)
        cache.crop(-3)
        cache.batch_repeat_interleave(2)
        assert_close(model(ids[:, -3:].expand(2, -1), cache=cache).logits, expected[:, -3:].expand(2, -1, -1))


def test_a_conversation_continues_on_its_cache(batch):
    model, ids = load(), batch[0][:1]
    first = generate(model, ids[:, :40], return_dict_in_generate=True)
    turn = torch.cat([first.sequences, ids[:, 40:60]], dim=1)
    continued = generate(model, turn, cache=first[CACHE])
    recomputed = generate(model, turn, prompt_lengths=torch.tensor([40]))
    assert torch.equal(continued, recomputed)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@torch.no_grad()
def test_packed_documents_are_as_if_alone(backend, batch):
    model, ids = load(backend=backend), batch[0][:1]
    documents = (40, 20, 10)
    positions = torch.cat([torch.arange(length) for length in documents])[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    alone = [model(document, use_cache=False).logits for document in ids.split(documents, dim=1)]
    assert_close(packed, torch.cat(alone, dim=1))


@torch.no_grad()
def test_a_mask_of_four_dimensions_tells_lengths_too(batch):
    model = load()
    ids, mask = batch
    causal = torch.ones(WIDTH, WIDTH, dtype=torch.bool).tril()[None, None] & mask[:, None, None, :].bool()
    causal |= torch.eye(WIDTH, dtype=torch.bool)  # rows that see nothing are not defined
    real = mask.bool()
    assert_close(model(ids, attention_mask=causal).logits[real], model(ids, attention_mask=mask).logits[real])


def test_neither_ntk_nor_logn_acts_in_training(batch):
    ids = batch[0][:1]
    plain = load(use_dynamic_ntk=False, use_logn_attn=False).train()
    assert torch.equal(load().train()(ids).logits, plain(ids).logits)
    assert not torch.equal(load()(ids).logits, load().train()(ids).logits)


@torch.no_grad()
def test_far_past_its_positions_a_model_works_and_warns_once_without_ntk(batch, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging.get_logger("hf_cnllm.models.qwen.modeling_qwen"), "warning", warnings.append)
    logging.get_logger("transformers").warning_once.cache_clear()
    ids = batch[0][:1].repeat(1, 5)  # 350 tokens; max_position_embeddings is 256
    assert load()(ids).logits.isfinite().all()
    assert warnings == []
    model = load(use_dynamic_ntk=False)
    cache = None
    for step in (ids, ids[:, :1], ids[:, :2]):
        outputs = model(step, cache=cache, use_cache=True)
        assert outputs.logits.isfinite().all()
        cache = outputs.cache
    assert len(warnings) == 1 and "past `max_position_embeddings` (256)" in warnings[0]


def test_prompt_lengths_of_other_rows_are_refused(batch):
    with pytest.raises(ValueError, match="`prompt_lengths` holds 3 lengths, but the inputs are 1 sequences"):
        load()(batch[0][:1, :9], prompt_lengths=torch.tensor([9, 9, 9]))


# --- continuous batching ------------------------------------------------------------------------------------------


CONTINUOUS = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("overrides", "lengths"),
    [({}, (30, 20, 9)), ({"use_dynamic_ntk": False, "window_sizes": [8, None]}, (70, 28, 9))],
)
def test_continuous_batching_gives_what_generate_gives(overrides, lengths, backend, batch):
    model = load(backend=backend, **overrides)
    prompts = [row[:length].tolist() for row, length in zip(batch[0].clamp(min=1), lengths, strict=True)]
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=128)
    outputs = model.generate_batch(prompts, generation_config=CONTINUOUS, continuous_batching_config=small)
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        model.set_attn_implementation(backend)
        assert output.generated_tokens == generate(model, torch.tensor([prompt]))[0, len(prompt) :].tolist()


def test_continuous_batching_refuses_what_it_cannot_do_right():
    model = load()
    with pytest.raises(ValueError, match=r"a prompt of 33 tokens needs: it is longer than `seq_length` \(32\)"):
        model.generate_batch([[5] * 33], generation_config=CONTINUOUS)
    with pytest.raises(ValueError, match="max_prompt_length"):
        model.init_continuous_batching(generation_config=CONTINUOUS)
    model.init_continuous_batching(CONTINUOUS, None, WorkloadHints(max_prompt_length=32))
    model = load(use_dynamic_ntk=False, window_sizes=[4, 8])
    with pytest.raises(ValueError, match="`window_sizes` holds several"):
        model.generate_batch([[5] * 9], generation_config=CONTINUOUS)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@torch.no_grad()
def test_sequences_packed_by_a_mask_count_for_themselves(backend):
    """Beyond the trained length of 8 tokens, LogN and NTK used to take the whole row for one sequence."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    config = QWenConfig(vocab_size=60, seq_length=8, use_dynamic_ntk=True, use_logn_attn=True, **sizes)
    config._attn_implementation = backend
    model = QWenLMHeadModel(config).eval()
    rows = [torch.randint(1, 60, (1, length)) for length in (20, 5, 11, 8)]
    numbers = torch.cat([torch.full_like(row, number) for number, row in enumerate(rows, start=1)], dim=1)
    ids, mask = (torch.nn.functional.pad(tensor, (3, 2)) for tensor in (torch.cat(rows, dim=1), numbers))
    logits = model(ids, attention_mask=mask, use_cache=False).logits
    for number, row in enumerate(rows, start=1):
        torch.testing.assert_close(logits[mask == number], model(row).logits[0], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="pass `use_cache=False`"):
        model(ids, attention_mask=mask)
    short = torch.cat([rows[1], rows[3]], dim=1)
    mask = torch.tensor([[1] * 5 + [2] * 8])
    outputs = model(short, attention_mask=mask)
    torch.testing.assert_close(outputs.logits[0, 5:], model(rows[3]).logits[0], atol=1e-5, rtol=0)
    longer = torch.cat([short, short[:, :1]], dim=1)
    mask = torch.nn.functional.pad(mask, (0, 1), value=2)
    step = model(longer[:, -1:], attention_mask=mask, cache=outputs.cache).logits
    whole = model(longer[:, 5:], prompt_lengths=8).logits[:, -1:]
    torch.testing.assert_close(step, whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("overrides", [{}, {"use_dynamic_ntk": False, "use_logn_attn": False, "seq_length": None}])
@pytest.mark.parametrize("given", [WIDTH, torch.tensor([WIDTH])], ids=["number", "tensor"])
def test_generate_takes_prompt_lengths_as_the_forward_pass_does(overrides, given, batch):
    model, ids = load(**overrides), batch[0][:1]
    assert torch.equal(generate(model, ids, prompt_lengths=given), generate(model, ids))


def test_ntk_and_logn_go_by_one_trained_length(batch):
    """By the one that the model was built with: a configuration that changes later must not move one without the other."""
    model = load(use_logn_attn=True)
    ids = batch[0][-1:]
    with torch.no_grad():
        logits, generated = model(ids).logits, generate(model, ids)
        model.config.seq_length = 2 * WIDTH
        assert torch.equal(model(ids).logits, logits)
    assert torch.equal(generate(model, ids), generated)
