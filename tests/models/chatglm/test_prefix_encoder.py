"""The prefix encoder by itself, and loading what the original P-tuning scripts save."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, StaticCache, set_seed
from transformers.cache_utils import DynamicCache

from goldens import GOLDENS
from hf_cnllm.models.chatglm.prefix_encoder import load_prefix_encoder

# goldens with a trained prefix, and the settings of the tuning run
TUNED = {
    "chatglm2_6b_ptuning": {"pre_seq_len": 5},
    "chatglm_6b_ptuning": {"pre_seq_len": 5},
    "chatglm_6b_ptuning_proj": {"pre_seq_len": 5, "prefix_projection": True},
}
tuned = pytest.mark.parametrize("name", TUNED)


def weights_of(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The golden's weights: those of the base model, and those of the prefix encoder."""
    weights = load_file(GOLDENS / name / "model.safetensors")
    prefix = {key: weights.pop(key) for key in list(weights) if "prefix_encoder" in key}
    return weights, prefix


def load_base(name: str, folder, **settings):
    """The base model as its own checkpoint, loaded for tuning."""
    config = json.loads((GOLDENS / name / "config.json").read_text())
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in TUNED["chatglm_6b_ptuning_proj"]})
    )
    save_file(weights_of(name)[0], folder / "model.safetensors", {"format": "pt"})
    return AutoModel.from_pretrained(folder, **settings).eval()


@tuned
@torch.no_grad()
def test_keys_and_values_are_laid_out_as_the_original_reshapes_them(name):
    encoder = AutoModel.from_pretrained(GOLDENS / name).transformer.prefix_encoder.eval()
    states = encoder.trans(encoder.embedding(torch.arange(5)))
    # The original: (tokens, 2 * layers, heads, dim) -> split into pairs per layer, keys first.
    layout = states.view(5, 2 * encoder.num_layers, encoder.num_heads, encoder.head_dim)
    for layer, (keys, values) in enumerate(encoder(3, torch.float32)):
        assert keys.shape == (3, encoder.num_heads, 5, encoder.head_dim)
        for row in range(3):
            torch.testing.assert_close(keys[row], layout[:, 2 * layer].transpose(0, 1))
            torch.testing.assert_close(values[row], layout[:, 2 * layer + 1].transpose(0, 1))


@tuned
def test_the_prefix_goes_into_an_empty_cache_once(name):
    model = AutoModel.from_pretrained(GOLDENS / name, eos_token_id=None).eval()
    encoder, embeddings = model.transformer.prefix_encoder, torch.empty(2, 1, 1)
    static = StaticCache(config=model.config, max_cache_len=12)
    for _ in range(2):
        in_hand, past = encoder.put_in_front(static, embeddings, encoder.num_layers)
        assert in_hand is None and int(past.get_seq_length()) == int(static.get_seq_length()) == 5
    dynamic = DynamicCache(config=model.config)
    for cache in (dynamic, None):  # the layers write it, with the first tokens
        in_hand, past = encoder.put_in_front(cache, embeddings, encoder.num_layers)
        assert len(in_hand) == encoder.num_layers and past.get_seq_length() == 5
    ends = [] if name.startswith("chatglm2") else [model.config.gmask_token_id, model.config.bos_token_id]
    output = model.generate(
        torch.tensor([[20, 21, *ends]]), cache=dynamic, max_new_tokens=3, do_sample=False, pad_token_id=0
    )
    assert dynamic.get_seq_length() == 5 + output.shape[1] - 1


@pytest.mark.parametrize("chunk", [1, 3, 50])
@pytest.mark.parametrize("new", [2, 5, 8])
def test_a_conversation_goes_on_in_chunks(new, chunk):
    model = AutoModel.from_pretrained(GOLDENS / "chatglm2_6b_ptuning", eos_token_id=None, pad_token_id=0).eval()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "prefill_chunk_size": chunk}
    cache = DynamicCache(config=model.config)
    first = model.generate(torch.arange(10, 17)[None], cache=cache, **options)
    prompt = torch.cat([first, torch.arange(30, 30 + new)[None]], dim=1)
    answer = model.generate(prompt, cache=cache, **options)
    del options["prefill_chunk_size"]
    assert torch.equal(answer, model.generate(prompt, use_cache=False, **options))


@tuned
def test_a_new_prefix_starts_as_the_originals_does(name, tmp_path):
    torch.manual_seed(0)
    encoder = load_base(name, tmp_path / "base", **TUNED[name]).transformer.prefix_encoder
    assert encoder.embedding.weight.std().item() == pytest.approx(1.0, abs=0.15)
    for part in encoder.trans.children():
        if isinstance(part, torch.nn.Linear):
            assert part.weight.abs().max() <= part.in_features**-0.5 and part.bias.abs().sum() > 0


@pytest.mark.parametrize("settings", [{}, {"prefix_dropout": 0.5}])
@pytest.mark.parametrize("name", [*TUNED, "chatglm3_6b_ptuning"])
def test_gradient_checkpointing_gives_the_same_gradients(name, settings):
    """The prefix alone is trained: reentrant checkpoints, too, have to see that their outputs depend on it."""
    ids = torch.tensor([[*range(20, 27), 141, 144, *range(30, 36)]])
    model = AutoModel.from_pretrained(GOLDENS / name, **settings).train()
    gradients = []
    for how in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if how is not None:
            model.gradient_checkpointing_enable(how)
        model.zero_grad()
        set_seed(0)
        model(ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    assert all(gradient.norm() > 0 for gradient in gradients[0].values())
    for checkpointed in gradients[1:]:
        torch.testing.assert_close(checkpointed, gradients[0], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("name", [*TUNED, "chatglm3_6b_ptuning"])
def test_a_checkpointed_model_in_training_generates_as_ever(name):
    ids = torch.tensor([[*range(20, 27), 141, 144]])
    model = AutoModel.from_pretrained(GOLDENS / name)
    model.gradient_checkpointing_enable()
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(*(model.train(training).generate(ids, **settings) for training in (True, False)))


@tuned
@pytest.mark.parametrize("form", ["folder", "bin", "safetensors"])
@torch.no_grad()
def test_official_prefix_checkpoints_load_onto_the_base_model(name, form, tmp_path):
    """The scripts save the trained weights only, under the names of the whole model."""
    source = {
        "folder": tmp_path,
        "bin": tmp_path / "pytorch_model.bin",
        "safetensors": tmp_path / "prefix.safetensors",
    }
    prefix = weights_of(name)[1]
    if form == "safetensors":
        save_file(prefix, source[form])
    else:
        torch.save(prefix, tmp_path / "pytorch_model.bin")
    model = load_base(name, tmp_path / "base", **TUNED[name])
    ids = torch.tensor([[5, 6, 7, 141, 144, 9]])
    expected = AutoModel.from_pretrained(GOLDENS / name).eval()(ids).logits
    assert not torch.equal(model(ids).logits, expected)
    load_prefix_encoder(model, source[form])
    assert torch.equal(model(ids).logits, expected)


def test_what_does_not_fit_is_refused(tmp_path):
    name = "chatglm2_6b_ptuning"
    save_file(weights_of(name)[1], tmp_path / "model.safetensors")
    shorter = load_base(name, tmp_path / "base", pre_seq_len=4)
    before = shorter.transformer.prefix_encoder.embedding.weight.clone()
    with pytest.raises(ValueError, match=r"\(5, 96\).*\(4, 96\).*`pre_seq_len` and `prefix_projection`"):
        load_prefix_encoder(shorter, tmp_path)
    assert torch.equal(shorter.transformer.prefix_encoder.embedding.weight, before)
    with pytest.raises(ValueError, match="no prefix encoder"):
        load_prefix_encoder(shorter, tmp_path / "base")
    with pytest.raises(ValueError, match="load it with `pre_seq_len`"):
        load_prefix_encoder(AutoModel.from_pretrained(tmp_path / "base"), tmp_path)
    with pytest.raises(FileNotFoundError, match="no prefix encoder weights at"):
        load_prefix_encoder(shorter, tmp_path / "elsewhere")
