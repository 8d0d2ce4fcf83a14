"""`hf-cnllm info` and the command line around it."""

import json

import pytest
import torch
import transformers
from transformers import AutoConfig

from goldens import GOLDENS
from hf_cnllm.cli import USER_ERROR, main
from hf_cnllm.cli.memory import sizes_of, stored_bytes
from hf_cnllm.families import family_of
from hf_cnllm.hub.model_card import create_model_card


def told(checkpoint, capsys) -> dict[str, str]:
    assert main(["info", str(checkpoint)]) == 0
    return dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("checkpoint", sorted(path.name for path in GOLDENS.iterdir()))
def test_every_checkpoint_is_described(checkpoint, capsys):
    rows = told(GOLDENS / checkpoint, capsys)
    assert checkpoint.startswith(rows["family"].strip()) or checkpoint.startswith("baichuan")
    assert len(rows) > 2 and all(value.strip() for value in rows.values())


@pytest.mark.parametrize(
    ("checkpoint", "family", "positions", "head"),
    [
        ("baichuan_7b", "baichuan", "RoPE", "linear"),
        ("baichuan_13b", "baichuan", "ALiBi", "linear"),
        ("baichuan2_7b", "baichuan2", "RoPE", "NormHead"),
        ("baichuan2_13b", "baichuan2", "ALiBi", "NormHead"),
    ],
)
def test_what_was_decided_about_baichuan(checkpoint, family, positions, head, capsys):
    rows = {name: value.strip() for name, value in told(GOLDENS / checkpoint, capsys).items()}
    assert (rows["family"], rows["positions"], rows["output head"]) == (family, positions, head)


@pytest.mark.parametrize("checkpoint", ["chatglm_6b", "chatglm2_6b"])
def test_trl_packs_chatglm(checkpoint, capsys):
    """As tests/integrations/test_trl.py has it."""
    assert told(GOLDENS / checkpoint, capsys)["TRL"].strip() == "trainers of causal models"


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("tokenizer_config.json", {"generation": "chatglm3"}),
        ("tokenizer_config.json", {"encode_special_tokens": False}),
        ("config.json", {"_name_or_path": "THUDM/chatglm3-6b"}),
        (None, None),
    ],
)
def test_what_a_folder_of_any_name_holds(file, says, tmp_path, capsys):
    """Not of a name with chatglm3 in it, that is. Cards and licenses go by it, too."""
    config = json.loads((GOLDENS / "chatglm3_6b" / "config.json").read_bytes())
    config.pop("_name_or_path", None)
    files = {"config.json": config} | ({file: (config if file == "config.json" else {}) | says} if file else {})
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    expected = "chatglm3" if file else "chatglm2"
    assert told(tmp_path, capsys)["family"].strip() == expected
    card = create_model_card(tmp_path).data.to_dict()
    assert card["license_name"] == f"{expected}-6b-license"


def test_glm_asks_for_no_blanks_that_its_vocabulary_lacks(tmp_path, capsys):
    """BERT's has one kind."""
    config = {"model_type": "glm", "vocab_size": 30592, "max_sequence_length": 512, "block_position_encoding": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    blanks = "those of mask_token_id, gmask_token_id, smask_token_id that the vocabulary has"
    assert told(tmp_path, capsys)["control tokens"].strip() == f"unknown: set sop_token_id, eop_token_id, {blanks}"
    config |= {"mask_token_id": 103, "sop_token_id": 30522, "eop_token_id": 30523}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert told(tmp_path, capsys)["control tokens"].strip() == "known"


def test_a_checkpoint_of_transformers_is_left_to_it(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "served by LlamaConfig of transformers" in told(tmp_path, capsys)["family"]


@pytest.mark.parametrize(
    ("config", "title"),
    [
        ({"model_type": "chatglm", "padded_vocab_size": 151552, "rope_ratio": 500}, "GLM-4-9B"),
        ({"model_type": "glm", "num_key_value_heads": 2, "hidden_size": 64, "num_attention_heads": 4}, "glm"),
        ({"model_type": "glm4"}, "Glm4Config of transformers"),
        ({"model_type": "qwen2"}, "Qwen2Config of transformers"),
        ({"model_type": "qwen", "visual": {}}, "Qwen-VL"),
        ({"model_type": "qwen", "audio": {}}, "Qwen-Audio"),
        ({"model_type": "baichuan_m1"}, "Baichuan-M1"),
        ({"model_type": "chatglm", "image_size": 224}, "VisualGLM-6B"),
    ],
)
@pytest.mark.parametrize("command", ["info", "chat", "verify", "quantize"])
def test_other_families_are_named_with_who_serves_them(config, title, command, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = [command, str(tmp_path), *([str(tmp_path / "out"), "--bits", "4"] if command == "quantize" else [])]
    assert main(words) == (0 if command == "info" else USER_ERROR)
    out, err = capsys.readouterr()
    said = (out if command == "info" else err).strip()
    assert title in said and "not of this package, served by" in said and "\n" not in said


@pytest.mark.parametrize("config", [{"model_type": "baichuan"}, {"model_type": "no such type"}, {}, [], "{", None])
def test_what_cannot_be_described_is_one_line_and_exit_code_2(config, tmp_path, capsys):
    if config is not None:
        (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    assert main(["info", str(tmp_path)]) == USER_ERROR
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("hf-cnllm info: error: ") and err.count("\n") == 1


@pytest.mark.parametrize("path", ["/no/such", "./none", "a/b/c", "owner/name", "name"])
def test_what_is_not_there_is_one_line(path, capsys):
    assert main(["info", path]) == USER_ERROR
    said = capsys.readouterr().err
    assert said.startswith(f"hf-cnllm info: error: there is no folder {path}") and said.count("\n") == 1
    assert ("HF_HUB_OFFLINE is set" in said) == (path in ("owner/name", "name"))


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", sorted(path.name for path in GOLDENS.iterdir()))
def test_memory_is_what_a_model_takes(checkpoint):
    """The weights' bytes and, after a prompt, the cache's: to the byte."""
    config = AutoConfig.from_pretrained(GOLDENS / checkpoint)
    family = family_of(config)
    ends = [getattr(config, name) for name in family.architectures[family.architecture_of(config)].prompt_end]
    inputs = {"input_ids": torch.tensor([[*range(20, 31), *(end for end in ends if end is not None)]])}
    length = inputs["input_ids"].shape[1]
    if None in ends:  # GLM's configuration does not know its blanks
        inputs["position_ids"] = torch.stack([torch.arange(length), torch.zeros(length, dtype=torch.long)])[None]
    auto_class = getattr(transformers, family.generates_with)
    sizes, stored = sizes_of(config), stored_bytes(config)
    for dtype, dtype_bytes in ((torch.float32, 4), (torch.bfloat16, 2)):
        model = auto_class.from_pretrained(GOLDENS / checkpoint, dtype=dtype, ignore_mismatched_sizes=True)
        told = sizes.weight_bytes(8 * dtype_bytes, dtype_bytes)
        if stored is not None:
            if dtype != config.dtype:
                continue
            told = stored
        if config.tie_word_embeddings and not shares_head(model):  # the file holds two matrices
            told += model.get_output_embeddings().weight.nbytes
        assert model.get_memory_footprint(return_buffers=False) == told
        layers = model(**inputs, use_cache=True).cache.layers
        assert sum(layer.keys.nbytes + layer.values.nbytes for layer in layers) == sizes.cache_bytes(
            length, dtype_bytes
        )


def shares_head(model):
    return model.get_output_embeddings() is None or (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )


@pytest.mark.parametrize(("bits", "family"), [(4, "chatglm2_6b"), (8, "chatglm2_6b"), (8, "chatglm3_6b")])
def test_the_memory_of_fewer_bits_is_that_of_a_quantized_model(bits, family):
    sizes = sizes_of(AutoConfig.from_pretrained(GOLDENS / family))
    model = transformers.AutoModelForCausalLM.from_pretrained(GOLDENS / family, dtype=torch.bfloat16).quantize(bits)
    assert model.get_memory_footprint(return_buffers=False) == sizes.weight_bytes(bits)


@pytest.mark.parametrize("model_class", ["", "adapter"])
def test_published_sizes_and_adapters(model_class, tmp_path, capsys):
    """Baichuan2-7B has 7.5 billion parameters, 512 KiB of cache for each token in 16 bits."""
    folder = tmp_path / "Baichuan2-7B"
    folder.mkdir()
    published = {
        "model_type": "baichuan", "vocab_size": 125696, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096, "model_max_length": 4096,
        "tokenizer_class": "BaichuanTokenizer", "torch_dtype": "bfloat16", "z_loss_weight": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(published))
    path = folder
    if model_class == "adapter":
        path = tmp_path / "lora"
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    rows = {name: value.strip() for name, value in told(path, capsys).items()}
    assert rows["parameters"] == "7,505,973,248 (7.51 billion)"
    assert rows["bfloat16, float16"].startswith("14.0 GiB; 15.0 GiB with 2,048 tokens, 18.0 GiB with 8,192 tokens")
    assert rows["trained length"] == "4,096 tokens" and rows["PEFT"].startswith("LoRA on W_pack")
    assert rows.get("adapter for") == (str(folder) if model_class else None)


@pytest.mark.parametrize("words", [[], ["no-such-command"], ["info"]])
def test_a_wrong_command_line_is_answered_with_the_usage(words, capsys):
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == USER_ERROR and "usage: hf-cnllm" in capsys.readouterr().err


def test_a_folder_of_checkpoints_names_them(tmp_path, capsys):
    """Such as the demo's and the recipes' outputs."""
    for name in ("merged/config.json", "adapter/adapter_config.json", "logs/other.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{}")
    assert main(["info", str(tmp_path)]) == USER_ERROR
    assert capsys.readouterr().err.endswith(f"; these are: {tmp_path / 'adapter'}, {tmp_path / 'merged'}\n")
