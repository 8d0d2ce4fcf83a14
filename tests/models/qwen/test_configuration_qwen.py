"""Qwen v1's configuration: the original's keys, transformers' names, and what is refused."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from goldens import GOLDENS
from hf_cnllm import QWenConfig
from qwen_models import load


def test_every_original_key_is_read():
    config = AutoConfig.from_pretrained(GOLDENS / "qwen_early")
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (48, 2, 3)
    assert (config.intermediate_size, config.max_position_embeddings, config.vocab_size) == (112, 256, 151)
    assert (config.eos_token_id, config.head_dim, config.rms_norm_eps) == (148, 16, 1e-6)
    config = AutoConfig.from_pretrained(GOLDENS / "qwen_72b")
    assert config.rope_theta == config.rotary_emb_base == 1_000_000
    assert (config.use_dynamic_ntk, config.use_flash_attn, config.onnx_safe) == (False, False, None)
    for name in ("rotary_emb_base", "rope_theta"):
        assert AutoConfig.from_pretrained(GOLDENS / "qwen_72b", **{name: 500}).rope_theta == 500
    assert QWenConfig(vocab_size=151_851, padded_vocab_size=151_936).vocab_size == 151_936


@pytest.mark.parametrize(
    ("flag", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_the_originals_dtype_flags(flag, dtype, tmp_path):
    model = load(**{flag: True})
    assert model.dtype == dtype and model.transformer.rotary_emb.inv_freq.dtype == torch.float32
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == dtype
    assert load(**{flag: True}, dtype=torch.float64).dtype == torch.float64


def test_windows_have_transformers_names_too(tmp_path):
    config = QWenConfig(num_hidden_layers=3, window_sizes=[8, None, 16])
    assert config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert config.sliding_window == 16
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).window_sizes == [8, None, 16]
    config.sliding_window = 4
    assert config.window_sizes == [4, None, 4]
    config.sliding_window = None
    assert config.window_sizes is None
    config.sliding_window = 4
    assert config.window_sizes == [4, 4, 4]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rotary_pct": 0}, r"`rotary_pct` must be in \(0, 1\], got 0"),
        ({"rotary_pct": 1.5}, "`rotary_pct` must be in"),
        ({"rotary_pct": 0.125}, "`rotary_pct` .* gives 2 rotated dimensions. It must be at least 3"),
        ({"rotary_pct": 0.01, "use_dynamic_ntk": False}, "gives 0 rotated dimensions. It must be at least 1"),
        ({"kv_channels": 15}, "gives 15 rotated dimensions.* needs one more"),
        ({"seq_length": None}, "`use_dynamic_ntk` is on, but `seq_length`, the trained length, is missing"),
        ({"seq_length": None, "use_dynamic_ntk": False}, "`use_logn_attn` is on, but `seq_length`"),
        ({"seq_length": 0}, "`seq_length` must be a positive number"),
        ({"loss_chunk_size": 0}, "`loss_chunk_size` must be a positive number"),
        ({"seq_length": 1}, "`use_logn_attn` needs a `seq_length` of at least 2"),
        ({"window_sizes": [8]}, "`window_sizes` has 1 entries, but there are 2 layers"),
        ({"window_sizes": [8, 0]}, "`window_sizes` must hold positive numbers or None, got 0"),
        ({"window_sizes": ["wide", None]}, "window_sizes"),
        ({"intermediate_size": 111}, r"`intermediate_size` \(111\) must be even"),
        ({"num_attention_heads": 0}, "`num_attention_heads` must be a positive number"),
        ({"bf16": True, "fp32": True}, "Only one of `bf16`, `fp16` and `fp32`"),
        ({"rope_theta": 1_000_000}, "`rotary_emb_base` has two values, 10000 and 1000000"),
        ({"n_embd": 96}, "`hidden_size` has two values, 48 and 96"),
        ({"pos_emb": "alibi"}, "`pos_emb` is 'alibi', but Qwen models have 'rotary'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "`rope_scaling` is .*, but Qwen models have None"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "`rope_parameters` is .*Qwen models have"),
        ({"rope_parameters": {"rope_theta": 1_000_000}}, "`rope_parameters` is .*`rotary_emb_base`"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "`layer_types` is .* follows from `window_sizes`"),
        ({"model_type": "baichuan"}, "baichuan"),
    ],
)
def test_a_config_that_cannot_work_is_refused_with_its_field(change, complaint, tmp_path):
    config = json.loads((GOLDENS / "qwen" / "config.json").read_text()) | change
    config = {key: value for key, value in config.items() if value is not None or key == "window_sizes"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match=complaint):
        QWenConfig.from_pretrained(tmp_path)


def test_overrides_are_checked_like_the_file():
    with pytest.raises(Exception, match="`window_sizes` has 3 entries"):
        AutoConfig.from_pretrained(GOLDENS / "qwen", window_sizes=[1, 2, 3])
