"""Which version a vocabulary file belongs to, and files that are none."""

import json
import shutil

import pytest

from hf_cnllm import ChatGLMTokenizer
from tokenizer_goldens import FIXTURES, TokenizerGolden

VOCAB = FIXTURES / "vocab"


@pytest.fixture
def chatglm3():
    return ChatGLMTokenizer.from_pretrained(VOCAB / "chatglm3_small")


@pytest.fixture
def bare(tmp_path):
    """The file of ChatGLM2 and ChatGLM3 with nothing beside it, under a name that says nothing."""
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(VOCAB / "chatglm2_small" / "tokenizer.model", folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}')
    return folder


ROLE_TOKEN = {"64795": {"content": "<|user|>", "special": True}}


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("tokenizer_config.json", {"name_or_path": "THUDM/chatglm3-6b-32k"}, "chatglm3"),
        ("tokenizer_config.json", {"name_or_path": "THUDM/codegeex2-6b"}, "chatglm2"),
        ("tokenizer_config.json", {"added_tokens_decoder": ROLE_TOKEN}, "chatglm3"),
        ("tokenizer_config.json", {"additional_special_tokens": ["<|user|>", "<|observation|>"]}, "chatglm3"),
        ("tokenizer_config.json", {"chat_template": "…<|assistant|>…"}, "chatglm3"),
        ("tokenizer_config.json", {"encode_special_tokens": False}, "chatglm3"),
        ("tokenizer_config.json", {"generation": "chatglm2"}, "chatglm2"),
        ("config.json", {"_name_or_path": "/data/ChatGLM2-6B", "model_type": "chatglm"}, "chatglm2"),
        ("special_tokens_map.json", {"additional_special_tokens": ["<|observation|>"]}, "chatglm3"),
        ("tokenization_chatglm.py", 'role_special_tokens = ["<|system|>", "<|user|>"]', "chatglm3"),
        ("tokenization_chatglm.py", 'special_tokens = ["[MASK]"]; raise SystemExit("must not run")', "chatglm2"),
    ],
)
def test_version_is_recognized(bare, file, content, expected):
    (bare / file).write_text(content if isinstance(content, str) else json.dumps(content))
    tokenizer = ChatGLMTokenizer.from_pretrained(bare)
    assert tokenizer.generation == expected
    assert len(tokenizer) == 2605 + 4 * (expected == "chatglm3")
    plain = TokenizerGolden(f"{expected}_small").load(ChatGLMTokenizer)
    assert tokenizer("<|user|> 你好")["input_ids"] == plain("<|user|> 你好")["input_ids"]


def test_version_by_the_name_it_is_loaded_by(bare):
    folder = bare.rename(bare.with_name("my-chatglm3-sft"))
    assert ChatGLMTokenizer.from_pretrained(folder).generation == "chatglm3"


def test_version_that_cannot_be_told(bare, tmp_path):
    with pytest.raises(ValueError, match="Pass generation='chatglm2' or generation='chatglm3'"):
        ChatGLMTokenizer.from_pretrained(bare)
    tokenizer = ChatGLMTokenizer.from_pretrained(bare, generation="chatglm2")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert ChatGLMTokenizer.from_pretrained(tmp_path / "saved").generation == "chatglm2"
    assert ChatGLMTokenizer(bare / "tokenizer.model", generation="chatglm3").generation == "chatglm3"


def test_a_tokenizer_json_of_somebody_else_is_not_trusted(bare, chatglm3, tmp_path):
    chatglm3.encode_special_tokens = True
    chatglm3.backend_tokenizer.save(str(bare / "tokenizer.json"))
    (bare / "tokenizer_config.json").write_text('{"name_or_path": "chatglm3-6b"}')
    tokenizer = ChatGLMTokenizer.from_pretrained(bare)
    assert tokenizer.get_command("<|user|>") not in tokenizer("<|user|>")["input_ids"]
    (bare / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json does not say which one it is of"):
        ChatGLMTokenizer.from_pretrained(bare)


@pytest.mark.parametrize(
    ("vocabulary", "name", "options", "problem"),
    [
        (
            "chatglm1_small/ice_text.model",
            "tokenizer.model",
            {},
            "holds the vocabulary of chatglm, whose name is ice_text",
        ),
        ("chatglm2_small/tokenizer.model", "ice_text.model", {}, "holds the vocabulary of chatglm2 and chatglm3"),
        (
            "chatglm1_small/ice_text.model",
            "ice_text.model",
            {"generation": "chatglm2"},
            "is 'chatglm2', but .* of chatglm",
        ),
        (
            "chatglm2_small/tokenizer.model",
            "tokenizer.model",
            {"generation": "chatglm"},
            "but .* of chatglm2 and chatglm3",
        ),
        ("chatglm2_small/tokenizer.model", "tokenizer.model", {"generation": "glm"}, "must be one of chatglm_early"),
        ("baichuan2_small/tokenizer.model", "tokenizer.model", {}, "is not a vocabulary of ChatGLM"),
        ("glm_chinese_small/cog-pretrain.model", "tokenizer.model", {}, "is not a vocabulary of ChatGLM"),
    ],
)
def test_vocabulary_of_another_version_or_family(tmp_path, vocabulary, name, options, problem):
    shutil.copy(VOCAB / vocabulary, tmp_path / name)
    with pytest.raises(ValueError, match=problem):
        ChatGLMTokenizer.from_pretrained(tmp_path, **options)


def test_configuration_of_another_version(tmp_path):
    shutil.copy(VOCAB / "chatglm2_small" / "tokenizer.model", tmp_path)
    shutil.copy(VOCAB / "chatglm1_small" / "tokenizer_config.json", tmp_path)
    with pytest.raises(ValueError, match="that of ChatGLM-6B"):
        ChatGLMTokenizer.from_pretrained(tmp_path)
    shutil.copy(VOCAB / "chatglm1_small" / "ice_text.model", tmp_path)
    with pytest.raises(ValueError, match="are two vocabularies"):
        ChatGLMTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ("missing", "empty", "cut", "text"))
@pytest.mark.parametrize("name", ("chatglm1_small/ice_text.model", "chatglm2_small/tokenizer.model"))
def test_damaged_vocabulary(tmp_path, name, damage):
    data = (VOCAB / name).read_bytes()
    target = tmp_path / name.rpartition("/")[2]
    if damage != "missing":
        target.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "text": b"not a model\n" * 50}[damage])
    with pytest.raises(ValueError, match=r"neither ice_text.model nor tokenizer.model|is not a SentencePiece model"):
        ChatGLMTokenizer.from_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} <= {target.name}
