"""Baichuan's configuration: which architecture a checkpoint holds, and what is refused."""

import json

import pytest
from transformers import AutoConfig

from goldens import GOLDENS
from hf_cnllm import BaichuanConfig


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [("baichuan_7b", ("rope", False)), ("baichuan_13b", ("alibi", False)),
     ("baichuan2_7b", ("rope", True)), ("baichuan2_13b", ("alibi", True))],
)  # fmt: skip
def test_the_architecture_is_decided_once_and_saved(checkpoint, expected, tmp_path):
    config = AutoConfig.from_pretrained(GOLDENS / checkpoint)
    assert (config.position_embedding, config.norm_head) == expected
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["position_embedding"], saved["norm_head"]) == expected
    saved.pop("tokenizer_class", None)
    (tmp_path / "config.json").write_text(json.dumps(saved))
    again = AutoConfig.from_pretrained(tmp_path)
    assert (again.position_embedding, again.norm_head) == expected


def test_explicit_fields_win_over_the_checkpoints_keys():
    config = AutoConfig.from_pretrained(GOLDENS / "baichuan_7b", position_embedding="alibi", norm_head=True)
    assert (config.position_embedding, config.norm_head) == ("alibi", True)
    assert BaichuanConfig(vocab_size=64_000, model_max_length=4096).position_embedding == "alibi"
    assert BaichuanConfig(position_embedding="alibi").model_max_length == 4096
    assert BaichuanConfig(vocab_size=125_696).norm_head and not BaichuanConfig(vocab_size=64_000).norm_head


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_max_length": None}, "Set `position_embedding` to 'rope' or 'alibi'"),
        ({"num_attention_heads": 7}, "`hidden_size` .* is not a multiple of `num_attention_heads`"),
        ({"position_embedding": "relative"}, "position_embedding"),
        ({"model_max_length": -1}, "`model_max_length` must be a positive number"),
        ({"model_max_length": float("inf")}, "model_max_length"),
        ({"model_max_length": float("nan")}, "model_max_length"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"z_loss_weight": -1.0}, "`z_loss_weight` must not be negative"),
        ({"z_loss_weight": float("nan")}, "`z_loss_weight` must not be negative"),
        ({"z_loss_weight": float("inf")}, "`z_loss_weight` must not be negative"),
        ({"loss_chunk_size": 0}, "`loss_chunk_size` must be a positive number"),
        ({"model_type": "qwen"}, "model_type"),
    ],
)
def test_a_config_that_cannot_work_is_refused_with_its_field(change, complaint, tmp_path):
    config = json.loads((GOLDENS / "baichuan2_13b" / "config.json").read_text())
    config = {key: value for key, value in (config | change).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match=complaint):
        BaichuanConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["planted.Model", "LlamaTokenizer", ["BaichuanTokenizer"], 3, ""])
@pytest.mark.parametrize("checkpoint", ["baichuan_7b", "baichuan2_13b"])
def test_another_tokenizer_class_does_not_decide_the_head(name, checkpoint, tmp_path):
    config = json.loads((GOLDENS / checkpoint / "config.json").read_text()) | {"tokenizer_class": name}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"`tokenizer_class`.*Set `norm_head` to True"):
        AutoConfig.from_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path, norm_head=True).norm_head
    assert not BaichuanConfig(**config | {"vocab_size": 64_000}).norm_head
