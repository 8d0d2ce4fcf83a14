"""The English GLM tokenizers, on the vocabularies of GPT-2, BERT and RoBERTa."""

import pytest
from transformers import AutoTokenizer

from hf_cnllm.models.glm.tokenization_glm_english import GLMBertTokenizer, GLMGPT2Tokenizer, GLMRobertaTokenizer
from tokenizer_goldens import FIXTURES, TokenizerGolden, differences, settings

CLASSES = {
    "glm_gpt2_small": GLMGPT2Tokenizer,
    "glm_bert_small": GLMBertTokenizer,
    "glm_roberta_small": GLMRobertaTokenizer,
}
VOCAB = FIXTURES / "vocab"
REAL = {name.removesuffix("_small"): tokenizer_class for name, tokenizer_class in CLASSES.items()}


@pytest.fixture(params=[*CLASSES, *REAL])
def name(request):
    return request.param


@pytest.fixture
def tokenizer(name):
    return TokenizerGolden(name).load((CLASSES | REAL)[name])


@pytest.mark.parametrize("section", ("strings", "huge", "pairs", "batch", "trunc_left"))
def test_golden(name, tokenizer, section):
    """Ids and tokens; decoding is that of transformers, which puts no space beside GLM's tokens."""
    found = differences(TokenizerGolden(name), tokenizer, section)
    assert [case for case in found if not case.startswith("decode")] == []


@pytest.mark.parametrize("method", ("build_inputs_for_generation", "build_inputs_for_multiple_choice"))
def test_golden_inputs(name, tokenizer, method):
    for case in TokenizerGolden(name)[method]:
        with settings(tokenizer, padding_side=case["padding_side"]):
            if "error" in case["encoded"]:
                with pytest.raises(ValueError):
                    tokenizer(case["texts"], **case["kw"])
                continue
            encoded = tokenizer(case["texts"], **case["kw"])
        assert encoded["input_ids"].tolist() == case["encoded"]["input_ids"]
        arguments = case["build"] if "build" in case else {"choices": case["choices"]}
        if "error" in case["out"]:
            with pytest.raises(ValueError, match="Cannot find mask token in the input"):
                getattr(tokenizer, method)(encoded, **arguments)
        else:
            inputs = dict(getattr(tokenizer, method)(encoded, **arguments))
            assert {field: _nested(value) for field, value in inputs.items()} == case["out"]


def _nested(value):
    return [_nested(item) for item in value] if isinstance(value, list) else value.tolist()


@pytest.mark.parametrize(
    ("vocabulary", "ids"), [("glm_roberta_small", [0, 68, 1204, 306, 2]), ("glm_roberta", [0, 102, 50264, 741, 2])]
)
def test_mask_of_roberta_takes_the_space_before_it(vocabulary, ids, tmp_path):
    """The configuration gives the token as a string, which says nothing about spaces."""
    tokenizer = AutoTokenizer.from_pretrained(TokenizerGolden(vocabulary).vocabulary)
    assert type(tokenizer) is GLMRobertaTokenizer
    assert tokenizer("a <mask> b")["input_ids"] == ids
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("a <mask> b")["input_ids"] == ids


def test_gpt2_form(tmp_path):
    tokenizer = GLMGPT2Tokenizer.from_pretrained(VOCAB / "glm_gpt2_small")
    cls, mask, eos = tokenizer.cls_token_id, tokenizer.mask_token_id, tokenizer.eos_token_id
    assert (cls, mask, eos, len(tokenizer)) == (1203, 1204, 1200, 1209)
    assert tokenizer.mask_token_ids == [mask, tokenizer.smask_token_id, tokenizer.gmask_token_id]
    ids = tokenizer("b a [MASK] b")["input_ids"]
    assert (ids[0], ids[-1]) == (cls, eos)
    assert tokenizer("b a b", truncation=True, max_length=4)["input_ids"] == [
        cls,
        *tokenizer("b a b")["input_ids"][-3:],
    ]
    with pytest.raises(ValueError, match="no form for two texts"):
        tokenizer("a", "b")
    tokenizer.save_pretrained(tmp_path)
    assert GLMGPT2Tokenizer.from_pretrained(tmp_path)("b a [MASK] b").data == tokenizer("b a [MASK] b").data


@pytest.mark.parametrize("trust_remote_code", (None, True))
def test_auto_tokenizer(name, trust_remote_code, tmp_path):
    folder = TokenizerGolden(name).vocabulary
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for texts in (("a\ufdd0 [UNK] b", None), ("a", ""), (["a", "b"], None)):
        pair = texts[1] if name.partition("_")[2] not in ("gpt2", "gpt2_small") else None
        assert again(texts[0], pair).data == tokenizer(texts[0], pair).data
    assert again.tokenize("a\uffff b") == tokenizer.tokenize("a\uffff b")
    assert type(tokenizer) is (CLASSES | REAL)[name] and tokenizer.truncation_side == "left"


@pytest.mark.parametrize("tokenizer_class", (GLMBertTokenizer, GLMRobertaTokenizer))
def test_forms_with_one_kind_of_blank(tokenizer_class):
    special = {"<|startofpiece|>": 6, "<|endofpiece|>": 7}
    if tokenizer_class is GLMBertTokenizer:
        vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "b": 5} | special
        tokenizer = tokenizer_class(vocab=vocab, extra_special_tokens=list(special))
        text = "b[MASK]"
    else:
        vocab = {"<pad>": 0, "<unk>": 1, "<s>": 2, "</s>": 3, "<mask>": 4, "b": 5} | special
        tokenizer = tokenizer_class(vocab=vocab, merges=[], extra_special_tokens=list(special))
        text = "b<mask>"
    encoded = tokenizer([text], return_tensors="pt")
    assert encoded["input_ids"].tolist() == [[2, 5, 4, 3]]
    assert tokenizer.truncation_side == "left" and tokenizer.mask_token_ids == [4]
    inputs = tokenizer.build_inputs_for_generation(encoded, targets=["b"])
    assert inputs["input_ids"].tolist() == [[2, 5, 4, 3, 6, 5]] and inputs["labels"][0, -2:].tolist() == [5, 7]
    for kind in ("gmask", "smask"):
        with pytest.raises(NotImplementedError, match="the model doesn't support"):
            getattr(tokenizer, f"{kind}_token_id")
