"""The configurations of ChatGLM: what is decided from a checkpoint's keys, and that the answers are kept."""

import copy
import json
import pickle

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from goldens import GOLDENS
from hf_cnllm import ChatGLM1Config, ChatGLM2Config, ChatGLMConfig
from hf_cnllm.hub.publishing import needs_package
from hf_cnllm.models.chatglm.vocabulary_chatglm import version_beside

HEAD = {"model_type": "chatglm", "architectures": ["ChatGLMModel"]}
V1 = {**HEAD, "position_encoding_2d": True, "inner_hidden_size": 16384, "vocab_size": 130528, "pad_token_id": 3}
V2 = {**HEAD, "ffn_hidden_size": 13696, "multi_query_attention": True, "multi_query_group_num": 2, "kv_channels": 128}


def read(tmp_path, values: dict, **overrides) -> ChatGLMConfig:
    (tmp_path / "config.json").write_text(json.dumps(values))
    return AutoConfig.from_pretrained(tmp_path, **overrides)


@pytest.mark.parametrize("path", sorted(GOLDENS.glob("chatglm*")), ids=lambda path: path.name)
def test_the_goldens_are_recognized_and_survive_a_save(path, tmp_path):
    config = AutoConfig.from_pretrained(path)
    assert config.architecture == ("chatglm" if path.name.startswith("chatglm_6b") else "chatglm2")
    assert config.early_positions == (path.name == "chatglm_6b_150k" if config.architecture == "chatglm" else None)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    ignored = {"_name_or_path": None}
    assert {**again.to_dict(), **ignored} == {**config.to_dict(), **ignored}
    # What the originals' own code reads is still there under their names.
    saved = json.loads((tmp_path / "config.json").read_text())
    original = json.loads((path / "config.json").read_text())
    renamed = {"architectures", "auto_map", "torch_dtype", "transformers_version", "_name_or_path"}
    assert {key: saved.get(key) for key in original if key not in renamed} == {
        key: value for key, value in original.items() if key not in renamed
    }
    assert saved["auto_map"] == needs_package("AutoConfig")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (V1, {"early_positions": False, "mask_token_id": 130000, "bos_token_id": 130004}),
        ({**V1, "vocab_size": 150528}, {"early_positions": True, "gmask_token_id": 150001, "eos_token_id": 150005}),
        ({**V1, "vocab_size": 140000}, {"early_positions": False, "mask_token_id": None}),
        ({**V1, "vocab_size": 150528, "early_positions": False}, {"early_positions": False}),
        (V1, {"head_dim": 128, "num_key_value_heads": 32, "intermediate_size": 16384, "max_position_embeddings": 2048}),
        (V2, {"head_dim": 128, "num_key_value_heads": 2, "intermediate_size": 13696, "num_hidden_layers": 28}),
        ({**V2, "multi_query_attention": False}, {"num_key_value_heads": 32}),
        ({**V2, "padded_vocab_size": 65024, "vocab_size": 64794}, {"vocab_size": 65024, "padded_vocab_size": 65024}),
        ({**V2, "rope_ratio": 50}, {"rope_ratio_type": "base"}),
        ({**V2, "rope_ratio": 50, "_name_or_path": "THUDM/chatglm2-6b-32k"}, {"rope_ratio_type": "linear"}),
        ({**V2, "_name_or_path": "THUDM/chatglm3-6b-32k"}, {"rope_ratio_type": "base"}),
        ({**V2, "_name_or_path": "THUDM/chatglm2-6b-32k", "rope_ratio_type": "base"}, {"rope_ratio_type": "base"}),
        ({**V2, "quantization_bit": 4}, {"quantization_config": {"quant_method": "chatglm", "bits": 4, "quantize_embeddings": False}}),
        # A key of the other architecture's tokens does not confuse it.
        ({**V2, "gmask_token_id": 64790}, {"architecture": "chatglm2", "gmask_token_id": 64790}),
    ],
)  # fmt: skip
def test_decisions(values, expected, tmp_path):
    config = read(tmp_path, values)
    assert {key: getattr(config, key) for key in expected} == expected


def test_the_checkpoints_own_name_counts_before_the_folder_it_is_in(tmp_path):
    folder = tmp_path / "chatglm2-6b-32k"
    folder.mkdir()
    assert read(folder, V2).rope_ratio_type == "linear"
    assert read(folder, {**V2, "_name_or_path": "THUDM/chatglm3-6b-32k"}).rope_ratio_type == "base"


@pytest.mark.parametrize("path", ["chatglm2-runs/chatglm3-6b-32k", "chatglm3-runs/chatglm2-6b-32k"])
def test_the_last_name_in_a_path_counts(path, tmp_path):
    folder = tmp_path / path
    folder.mkdir(parents=True)
    expected = {"chatglm2": "linear", "chatglm3": "base"}[folder.name[:8]]
    assert read(folder, V2).rope_ratio_type == expected
    assert version_beside(folder / "tokenizer.model", {"name_or_path": str(folder)}) == folder.name[:8]


def test_overrides_take_part_in_the_decisions(tmp_path):
    config = read(tmp_path, {**V2, "quantization_bit": 0}, rope_ratio=8, rope_ratio_type="linear", pre_seq_len=16)
    assert (config.rope_ratio, config.rope_ratio_type, config.pre_seq_len) == (8, "linear", 16)
    assert read(tmp_path, HEAD, architecture="chatglm").inner_hidden_size == 16384


@pytest.mark.parametrize("config_class", [ChatGLM1Config, ChatGLM2Config])
def test_each_architecture_has_a_configuration_however_it_is_made(config_class):
    config = config_class()
    for same in (
        ChatGLMConfig(architecture=config.architecture),
        ChatGLMConfig.from_dict(config.to_dict()),
        ChatGLMConfig(**config.to_dict()),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert type(same) is config_class and same.to_dict() == config.to_dict()
    assert type(AutoConfig.for_model("chatglm")) is type(ChatGLMConfig()) is ChatGLM2Config


def test_resizing_moves_both_names_of_the_vocabulary_size():
    config = ChatGLMConfig(padded_vocab_size=100, ffn_hidden_size=8)
    config.vocab_size = 120
    assert config.padded_vocab_size == config.to_dict()["padded_vocab_size"] == 120


def test_the_derived_sizes_are_in_the_dictionary_that_peft_reads():
    config = ChatGLMConfig(**V2)
    assert config.to_dict()["num_key_value_heads"] == 2 and config.to_dict()["head_dim"] == 128
    assert ChatGLMConfig(**config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (HEAD, "Set `architecture` to \"chatglm\""),
        ({**V1, **V2}, "mixes keys of ChatGLM-6B .* Set `architecture`"),
        ({**V2, "architecture": "chatglm4"}, "architecture"),
        ({**V2, "num_attention_heads": 7}, "`num_attention_heads` .7. is not a multiple of `multi_query_group_num` .2."),
        ({**V1, "num_attention_heads": 7}, "`hidden_size` .4096. is not a multiple of `num_attention_heads` .7."),
        ({**V2, "pre_seq_len": 0}, "`pre_seq_len` must be a positive number, got 0"),
        ({**V2, "loss_chunk_size": 0}, "`loss_chunk_size` must be a positive number, got 0"),
        ({**V2, "kv_channels": -8}, "`kv_channels` must be a positive number, got -8"),
        ({**V2, "quantization_bit": 3}, "`quantization_bit` must be 0, 4 or 8"),
        ({**V2, "num_key_value_heads": 4}, r"`num_key_value_heads` \(4\) contradicts .* `multi_query_group_num`"),
        ({**V2, "ffn_hidden_size": "wide"}, "ffn_hidden_size"),
        ({"model_type": "baichuan"}, "`model_type`"),
    ],
)  # fmt: skip
def test_bad_values_are_named(values, complaint, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises((ValueError, StrictDataclassError), match=complaint):
        ChatGLMConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "sizes"),
    [
        ("chatglm_6b_3layer", {"num_attention_heads": 2}, (24, 2)),
        ("chatglm_6b_3layer", {"hidden_size": 96}, (24, 4)),
        ("chatglm2_6b", {"kv_channels": 24}, (24, 2)),
        ("chatglm2_6b", {"multi_query_group_num": 1}, (8, 1)),
        ("chatglm2_6b", {"multi_query_attention": False}, (8, 6)),
    ],
)
def test_sizes_follow_the_fields_that_say_them(name, changes, sizes, tmp_path):
    config = AutoConfig.from_pretrained(GOLDENS / name)
    config.save_pretrained(tmp_path)
    config.update(changes)
    made = copy.deepcopy(config)
    config.save_pretrained(tmp_path / "changed")
    for same in (
        config,
        made,
        AutoConfig.from_pretrained(tmp_path / "changed"),
        AutoConfig.from_pretrained(tmp_path, **changes),
        AutoConfig.from_pretrained(GOLDENS / name, **changes),
    ):
        assert (same.head_dim, same.num_key_value_heads) == sizes
        assert "_follows" not in same.to_dict()
