"""GLM-130B's tokenizer against the original's, and what it adds: texts with blanks, batches, saving."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from hf_cnllm import GLM130BForConditionalGeneration, GLM130BForMultipleChoice, GLM130BTokenizer, infill
from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint
from tokenizer_goldens import TokenizerGolden, compare, strings

GOLDEN = TokenizerGolden("glm130b")


@pytest.fixture(scope="module")
def original():
    return TokenizerGolden("chatglm1_image20000").load(GLM130BTokenizer)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "glm130b"
    write_tiny_checkpoint("glm130b", folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


def test_golden_texts(original):
    assert compare(strings(GOLDEN, original)) == {}


def test_golden_decoding(original):
    for case in GOLDEN["decode_cases"]:
        single = zip(case["ids"], case["id_to_token"], strict=True)
        for ids, text in [(case["ids"], case["decode"]), *(([index], token) for index, token in single)]:
            if isinstance(text, str) and ids != [0]:  # of an image token, which the original calls [pad]
                assert original.decode(ids) == text


def test_golden_contexts(original):
    for case in GOLDEN["fill_blanks"]:
        ids = original.encode_blanks(case["text"])["input_ids"]
        assert [*ids, original.get_command("sop")] == case["calls"][0]["input_ids"]
    commands = GOLDEN["meta"]["special_tokens"]
    assert {name: original.get_command(name) for name in commands} == commands
    with pytest.raises(ValueError, match="'pad' is none of GLM-130B's commands"):
        original.get_command("pad")


def test_text_is_text_and_prompts_end_in_a_blank(tokenizer):
    ids = tokenizer("[MASK] <sop> </s> [gMASK]")["input_ids"]
    assert ids[-2:] == [tokenizer.convert_tokens_to_ids("[gMASK]"), tokenizer.bos_token_id]
    assert not set(ids[:-2]) & set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert tokenizer.decode(ids[-2:]) == "[[gMASK]][sop]"
    assert (
        tokenizer("a", "b")["input_ids"]
        == tokenizer.encode("a", add_special_tokens=False) + tokenizer("b")["input_ids"]
    )


def test_saving_and_loading(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "ice_text.model").is_file()
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "  你好\n\nworld [MASK] <n> x"
    assert type(again) is GLM130BTokenizer and again(text).data == tokenizer(text).data
    assert again.tokenize(text) == tokenizer.tokenize(text) and again.num_image_tokens == tokenizer.num_image_tokens
    (tmp_path / "tokenizer.json").unlink()
    assert AutoTokenizer.from_pretrained(tmp_path)(text).data == tokenizer(text).data


def test_other_vocabularies_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="is not the vocabulary of GLM-130B"):
        GLM130BTokenizer.from_pretrained(TokenizerGolden("chatglm1_small").vocabulary)
    tokenizer.save_pretrained(tmp_path, legacy_format=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"remove_space": True}))
    with pytest.raises(ValueError, match=r"remove_space in tokenizer_config\.json is ChatGLM-6B's"):
        AutoTokenizer.from_pretrained(tmp_path)


def test_inputs_for_generation_and_training(checkpoint, tokenizer):
    texts = ["今天[MASK]很好", "a b c d [gMASK]"]
    contexts = tokenizer.encode_blanks(texts)
    assert (
        contexts["input_ids"][0][-1] == tokenizer.end_token_id
        and contexts["input_ids"][1][-1] != tokenizer.end_token_id
    )
    inputs = tokenizer.build_inputs_for_generation(contexts)
    assert (inputs["input_ids"][:, -1] == tokenizer.sop_token_id).all() and 0 in inputs["attention_mask"]
    padded = tokenizer.encode_blanks(texts, padding=True, return_tensors="pt")
    assert torch.equal(tokenizer.build_inputs_for_generation(padded)["input_ids"], inputs["input_ids"])
    batch = tokenizer.build_inputs_for_generation(contexts, targets=["天气", "e"])
    for row, target in enumerate(["天气", "e"]):
        learned = batch["labels"][row] != -100
        expected = [*tokenizer.encode(target, add_special_tokens=False), tokenizer.eop_token_id]
        assert batch["labels"][row][learned].tolist() == expected
        assert batch["input_ids"][row][learned].tolist() == [tokenizer.sop_token_id, *expected[:-1]]
    padded = tokenizer.build_inputs_for_generation(contexts, 7, targets=["天气", "e"], padding=True)
    assert padded["labels"].shape[1] == max(map(len, contexts["input_ids"])) + 7
    with pytest.raises(ValueError, match="text 0 has none of"):
        tokenizer.build_inputs_for_generation(tokenizer("a", add_special_tokens=False))
    with pytest.raises(ValueError, match="there are 1 targets for 2 texts"):
        tokenizer.build_inputs_for_generation(contexts, targets="e")


@torch.no_grad()
def test_multiple_choice(checkpoint, tokenizer):
    model = GLM130BForMultipleChoice.from_pretrained(checkpoint).eval()
    texts, choices = ["今天天气很", "a b [MASK] c d e f g"], [["好", "不好"], ["x", "y z"]]
    contexts = tokenizer.encode_blanks(texts, "[MASK]", is_whole=False)
    scores = model(**tokenizer.build_inputs_for_multiple_choice(contexts, choices)).logits
    for row, text in enumerate(texts):
        alone = tokenizer.encode_blanks(text, "[MASK]", is_whole=False)
        for column, choice in enumerate(choices[row]):
            inputs = tokenizer.build_inputs_for_multiple_choice(alone, [[choice]])
            torch.testing.assert_close(model(**inputs).logits[0, 0], scores[row, column])
    labels = torch.tensor([0, 1])
    inputs = tokenizer.build_inputs_for_multiple_choice(contexts, choices)
    assert model(**inputs, labels=labels).loss == torch.nn.functional.cross_entropy(scores, labels)


def test_infill_fills_texts(checkpoint, tokenizer):
    model = GLM130BForConditionalGeneration.from_pretrained(checkpoint).eval()
    filled = infill(model, tokenizer, ["今天[MASK]，a [sMASK] b。", "没有"], max_new_tokens=3)
    assert [text.startswith(start) for text, start in zip(filled, ("今天", "没有"), strict=True)] == [True, True]
    assert "MASK" not in "".join(filled)


@pytest.mark.parametrize("fields", [["mask_token_id"], ["bos_token_id"], ["eos_token_id", "text_end_token_id"]])
def test_infill_needs_a_model_that_knows_the_control_tokens(checkpoint, tokenizer, fields):
    model = GLM130BForConditionalGeneration.from_pretrained(checkpoint, **dict.fromkeys(fields))
    with pytest.raises(ValueError, match=r"does not know the tokenizer's control tokens: set its `bos_token_id`"):
        infill(model, tokenizer, "今天[MASK]。")
