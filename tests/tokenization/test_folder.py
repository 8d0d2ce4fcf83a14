"""Folders whose files contradict each other: they give the right tokenizer or are refused, and no code of theirs runs."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from goldens import GOLDENS
from hf_cnllm import BaichuanTokenizer, ChatGLMTokenizer, GLMBertTokenizer, GLMGPT2Tokenizer, QWenTokenizer
from hf_cnllm.tokenization.folder import SETTINGS, check_settings
from tokenizer_goldens import FIXTURES

VOCAB = FIXTURES / "vocab"
VOCABULARIES = {  # -> its file, and the model that it is for
    "baichuan1_small": ("tokenizer.model", "baichuan_13b"),
    "baichuan2_small": ("tokenizer.model", "baichuan2_13b"),
    "chatglm1_small": ("ice_text.model", "chatglm_6b_3layer"),
    "chatglm2_small": ("tokenizer.model", "chatglm2_6b"),
    "chatglm3_small": ("tokenizer.model", "chatglm3_6b"),
    "glm_chinese_small": ("cog-pretrain.model", "glm"),
    "glm_gpt2_small": ("vocab.json", "glm"),
    "glm_bert_small": ("vocab.txt", "glm"),
    "glm_roberta_small": ("vocab.json", "glm"),
    "qwen_small": ("qwen.tiktoken", "qwen"),
}
TEXT = "Hello, 你好 [MASK] world\n"
every_vocabulary = pytest.mark.parametrize("name", VOCABULARIES)


@pytest.fixture
def folder(name, tmp_path):
    """The tokenizer in the Hub's layout, and config.json."""
    shutil.copytree(VOCAB / name, tmp_path / "checkpoint")
    shutil.copy(GOLDENS / VOCABULARIES[name][1] / "config.json", tmp_path / "checkpoint")
    change(
        tmp_path / "checkpoint" / "config.json", **dict.fromkeys(("mask_token_id", "gmask_token_id", "bos_token_id"))
    )
    change(tmp_path / "checkpoint" / "config.json", eos_token_id=None)
    return tmp_path / "checkpoint"


def change(path, **keys):
    """Sets keys of a JSON file; those that are None go."""
    content = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def right(name):
    return AutoTokenizer.from_pretrained(VOCAB / name)(TEXT)["input_ids"]


def shorten(path, count):
    """The whole file without its last entries."""
    if path.suffix == ".model":
        model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
        del model.pieces[-count:]
        path.write_bytes(model.SerializeToString())
    elif path.suffix == ".json":
        path.write_text(json.dumps(dict(list(json.loads(path.read_text()).items())[:-count])))
    else:
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-count]))


# --- which class, and no code -----------------------------------------------------------------------------------------


@every_vocabulary
@pytest.mark.parametrize("content", (None, "{}"))
def test_without_a_class_name_it_is_ours_or_refused(name, content, folder):
    path = folder / "tokenizer_config.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    if name.startswith(("baichuan", "glm")):
        with pytest.raises(
            ValueError, match=r"tokenizer_config\.json in .* is missing, or names no `tokenizer_class`"
        ):
            AutoTokenizer.from_pretrained(folder)
    else:
        assert AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] == right(name)


@every_vocabulary
@pytest.mark.parametrize("class_name", (None, "", "Tokenizer", "LlamaTokenizer"))
@pytest.mark.parametrize("trust", (None, True))
def test_code_without_our_class_name_is_refused_and_not_run(name, class_name, trust, folder, tmp_path):
    ran = tmp_path / "ran"
    (folder / "planted.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Tokenizer: ...\n")
    auto_map = {"AutoTokenizer": ["planted.Tokenizer", None]}
    change(folder / "tokenizer_config.json", tokenizer_class=class_name, auto_map=auto_map)
    with pytest.raises(ValueError, match=r"points to code \(`auto_map`\), which is never run"):
        AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    assert not ran.exists()


@every_vocabulary
def test_a_class_that_there_is_not(name, folder):
    change(folder / "tokenizer_config.json", tokenizer_class="NoSuchTokenizer", auto_map=None)
    with pytest.raises(ValueError, match="`tokenizer_class` that there is not, 'NoSuchTokenizer'"):
        AutoTokenizer.from_pretrained(folder)


def test_the_hooks_of_a_configuration_leave_no_trace(tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(GOLDENS / "qwen")
    assert not hasattr(config, "model_name") and config.tokenizer_class == "QWenTokenizer"
    config.model_name = "mine"
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_name == "mine"
    assert "tokenizer_class" not in AutoConfig.from_pretrained(GOLDENS / "chatglm2_6b").to_dict()


# --- which vocabulary -------------------------------------------------------------------------------------------------


@every_vocabulary
@pytest.mark.parametrize("other", VOCABULARIES)
def test_another_vocabulary_is_refused(name, other, folder):
    if other == name or {other, name} == {"chatglm2_small", "chatglm3_small"}:  # the same file
        return
    shutil.copy(VOCAB / other / VOCABULARIES[other][0], folder / VOCABULARIES[name][0])
    with pytest.raises(ValueError, match=r"vocab|tokenizer\.model|ice_text|cog-pretrain|tiktoken"):
        AutoTokenizer.from_pretrained(folder)


@every_vocabulary
@pytest.mark.parametrize("other", VOCABULARIES)
def test_another_tokenizer_json_is_refused(name, other, folder, tmp_path):
    if other == name or {other, name} == {"chatglm2_small", "chatglm3_small"}:
        return
    if {other, name} == {"baichuan1_small", "baichuan2_small"}:  # a model of one's own may have either vocabulary
        return
    AutoTokenizer.from_pretrained(VOCAB / name).save_pretrained(folder)
    AutoTokenizer.from_pretrained(VOCAB / other).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "tokenizer.json", folder)
    with pytest.raises(ValueError):
        AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("count", (1, 10))
@pytest.mark.parametrize("name", [name for name in VOCABULARIES if not name.startswith("baichuan")])
def test_a_shortened_vocabulary_gives_listed_tokens_other_ids(name, count, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").unlink()
    assert AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] == right(name)
    shorten(folder / VOCABULARIES[name][0], count)
    with pytest.raises(ValueError, match=r"the id|no token for some|which a merge makes|has no|256 byte pieces"):
        AutoTokenizer.from_pretrained(folder)


def test_a_shortened_vocabulary_does_not_fit_the_model(tmp_path):
    folder = shutil.copytree(VOCAB / "qwen_small", tmp_path / "qwen")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = {"model_type": "qwen", "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eod_id}
    (folder / "config.json").write_text(json.dumps(config))
    AutoTokenizer.from_pretrained(folder)
    shorten(folder / "qwen.tiktoken", 1)
    with pytest.raises(ValueError, match=r"config\.json gives the eos_token_id"):
        QWenTokenizer.from_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen", "vocab_size": 151936}')
    with pytest.raises(ValueError, match="the vocabulary is cut"):
        QWenTokenizer.from_pretrained(folder)


def test_a_model_of_another_family(tmp_path):
    folder = shutil.copytree(VOCAB / "baichuan2_small", tmp_path / "baichuan")
    (folder / "config.json").write_text('{"model_type": "qwen"}')
    with pytest.raises(ValueError, match=r"config\.json is that of a model of type 'qwen'"):
        BaichuanTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", ("glm_gpt2_small", "glm_bert_small", "glm_roberta_small"))
def test_english_vocabularies_are_saved_and_missed(name, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(VOCAB / name)
    tokenizer.add_tokens(["<later>"])
    tokenizer.save_pretrained(tmp_path)
    files = [file for file in ("vocab.txt", "vocab.json", "merges.txt") if (VOCAB / name / file).exists()]
    assert all((tmp_path / file).is_file() for file in files)
    (tmp_path / "tokenizer.json").unlink()
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(TEXT + "<later>")["input_ids"] == tokenizer(TEXT + "<later>")["input_ids"]
    for file in files:
        content = (tmp_path / file).read_bytes()
        (tmp_path / file).unlink()
        with pytest.raises(ValueError, match=f"neither tokenizer.json nor {file} was found"):
            AutoTokenizer.from_pretrained(tmp_path)
        (tmp_path / file).write_bytes(content)
    if "merges.txt" in files:
        shorten(tmp_path / "merges.txt", 1)
        with pytest.raises(ValueError, match="which no merge makes"):
            AutoTokenizer.from_pretrained(tmp_path)


def test_a_word_piece_file_that_ends_within_a_line(tmp_path):
    folder = shutil.copytree(VOCAB / "glm_bert_small", tmp_path / "bert")
    content = (folder / "vocab.txt").read_bytes()
    (folder / "vocab.txt").write_bytes(content[:-3])
    with pytest.raises(ValueError, match=r"vocab\.txt is cut"):
        GLMBertTokenizer.from_pretrained(folder)


def test_files_that_say_different_generations(tmp_path):
    folder = shutil.copytree(VOCAB / "chatglm3_small", tmp_path / "chatglm3")
    (folder / "tokenization_chatglm.py").write_text('special_tokens = ["[MASK]", "[gMASK]"]')
    with pytest.raises(ValueError, match="say different things"):
        ChatGLMTokenizer.from_pretrained(folder)
    assert ChatGLMTokenizer.from_pretrained(folder, generation="chatglm3").generation == "chatglm3"


# --- settings ---------------------------------------------------------------------------------------------------------


@every_vocabulary
@pytest.mark.parametrize("role", ("eos_token", "unk_token"))
def test_special_tokens_that_are_no_tokens(name, role, folder):
    change(folder / "tokenizer_config.json", **{role: "nonsense"})
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=f"`{role}` is 'nonsense', which is no token of the vocabulary"):
        AutoTokenizer.from_pretrained(folder)


@every_vocabulary
def test_the_caller_may_add_one(name, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(VOCAB / name, sep_token="<new>")
    assert tokenizer.sep_token_id == len(tokenizer) - 1
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).sep_token_id == tokenizer.sep_token_id


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from([name for name, (what, _) in SETTINGS.items() if what == "true or false"]),
    value=st.integers() | st.floats() | st.text() | st.lists(st.booleans()) | st.dictionaries(st.text(), st.none()),
)
def test_a_switch_is_true_or_false(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be true or false"):
        check_settings("Tokenizer", {name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("errors", "nonsense"), ("errors", True), ("model_max_length", -1), ("model_max_length", float("nan"))),
        *(
            ("padding_side", 3),
            ("num_image_tokens", 0.5),
            ("eos_token", 3),
            ("eos_token", ""),
            ("extra_special_tokens", "x"),
        ),
    ],
)
def test_other_settings(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be "):
        check_settings("Tokenizer", {name: value})


@every_vocabulary
def test_a_switch_that_ends_in_token(name, folder):
    change(folder / "tokenizer_config.json", add_bos_token="nonsense")
    with pytest.raises(ValueError, match="`add_bos_token` must be true or false"):
        AutoTokenizer.from_pretrained(folder)


def test_a_checkpoint_whose_setting_means_nothing(tmp_path):
    folder = shutil.copytree(VOCAB / "glm_gpt2_small", tmp_path / "gpt2")
    change(folder / "tokenizer_config.json", add_prefix_space="yes")
    with pytest.raises(ValueError, match="`add_prefix_space` must be true or false"):
        GLMGPT2Tokenizer.from_pretrained(folder)
