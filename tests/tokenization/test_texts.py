"""Texts that are nearly nothing, and what is no text, in every family."""

import pytest
from transformers import AutoTokenizer

from hf_cnllm import BaichuanTokenizer
from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint
from hf_cnllm.models.glm.tokenization_glm_english import GLMBertTokenizer, GLMGPT2Tokenizer, GLMRobertaTokenizer
from tokenizer_goldens import TokenizerGolden

NO_PAIRS = ("glm_chinese", "glm_gpt2")
CLASSES = {"glm_bert": GLMBertTokenizer, "glm_gpt2": GLMGPT2Tokenizer, "glm_roberta": GLMRobertaTokenizer}
NAMES = ("baichuan1", "baichuan2", "qwen", "chatglm1", "chatglm2", "chatglm3", "glm_chinese", *CLASSES, "glm130b")


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(name, tmp_path_factory):
    if name == "glm130b":
        folder = tmp_path_factory.mktemp("tiny") / name
        write_tiny_checkpoint(name, folder)
        return AutoTokenizer.from_pretrained(folder)
    return TokenizerGolden(f"{name}_small").load(CLASSES.get(name, AutoTokenizer))


def test_an_empty_second_text_is_one(tokenizer, name):
    options = {"add_special_tokens": name not in NO_PAIRS, "return_length": True}
    alone, batch = tokenizer("Hi 你好", "", **options), tokenizer(["Hi 你好"], [""], **options)
    length = batch.pop("length")
    assert alone.pop("length") == length == [len(alone["input_ids"])]
    assert dict(alone) == {column: rows[0] for column, rows in batch.items()}
    assert alone.encodings[0].ids == alone["input_ids"]
    assert tokenizer("Hi 你好", "", return_tensors="pt", **options)["input_ids"].tolist() == batch["input_ids"]


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True)])
def test_what_an_empty_second_text_is_surrounded_by(bos, eos):
    """As in the original, whose `build_inputs_with_special_tokens` asks whether there is a second text, not what it says."""
    folder = TokenizerGolden("baichuan2_small").vocabulary
    tokenizer = BaichuanTokenizer.from_pretrained(folder, add_bos_token=bos, add_eos_token=eos)
    ids = tokenizer.encode("Hi 你好", add_special_tokens=False)
    assert tokenizer("Hi 你好", "")["input_ids"] == [1] * bos + ids + [2] * eos + [1] * bos + [2] * eos


HALF = "a\ud83d"
WAYS = {
    "a text": lambda t: t(HALF),
    "a long one": lambda t: t(300 * "a" + HALF + 300 * "b"),
    "one of several": lambda t: t(["fine", HALF]),
    "offsets": lambda t: t(HALF, return_offsets_mapping=True),
    "a second text": lambda t: t("fine", HALF, add_special_tokens=False),
    "words": lambda t: t(["fine", HALF], is_split_into_words=True),
    "tokens": lambda t: t.tokenize(HALF),
}
IN_CHATS = {
    "a message": lambda t: t.encode_message(HALF),
    "a chat": lambda t: t.apply_chat_template([{"role": "user", "content": HALF}]),
}


def refuses_the_half(run, tokenizer):
    with pytest.raises(TypeError, match=r"half a surrogate pair, '\\ud83d' at character \d+.*cut it out"):
        run(tokenizer)


@pytest.mark.parametrize("way", WAYS)
def test_half_a_surrogate_pair_is_refused_by_name(tokenizer, name, way):
    if name == "qwen":  # reads U+FFFD, as tiktoken does
        WAYS[way](tokenizer)
    else:
        refuses_the_half(WAYS[way], tokenizer)


@pytest.mark.parametrize("way", IN_CHATS)
def test_half_a_surrogate_pair_in_chats(tokenizer, name, way):
    if name == "qwen":
        assert tokenizer.encode_message(HALF) == tokenizer.encode("a\ufffd")
    elif not name.startswith("glm"):
        refuses_the_half(IN_CHATS[way], tokenizer)
