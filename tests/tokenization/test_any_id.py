"""Every id that a model can give decodes: models have more rows than their tokenizers have tokens."""

import itertools

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, TextStreamer, pipeline
from transformers import PreTrainedTokenizerFast as FastTokenizer

from hf_cnllm.demo.tiny_checkpoints import TINY_FAMILIES, write_tiny_checkpoint
from hf_cnllm.families import family_of
from hf_cnllm.models.glm.tokenization_glm_english import GLMBertTokenizer, GLMGPT2Tokenizer, GLMRobertaTokenizer
from tokenizer_goldens import TokenizerGolden

# Vocabulary -> rows of the published model's embedding; the small ones belong to none and get some to spare.
ROWS = {
    **{"baichuan1": 64_000, "baichuan2": 125_696, "qwen": 152_064, "qwen_v0": 151_936},
    **{"chatglm1": 130_528, "chatglm1_image20000": 150_528, "chatglm2": 65_024, "chatglm3": 65_024},
    **{"glm_chinese": 50_048, "glm_bert": 30_592, "glm_gpt2": 50_304, "glm_roberta": 50_304},
}
SMALL = ("baichuan1", "baichuan2", "qwen", "chatglm1", "chatglm2", "chatglm3", "glm_chinese", *list(ROWS)[-3:])
CLASSES = {"glm_bert": GLMBertTokenizer, "glm_gpt2": GLMGPT2Tokenizer, "glm_roberta": GLMRobertaTokenizer}
NAMES = [f"{name}_small" for name in SMALL]


def load(name):
    golden = TokenizerGolden(name)
    tokenizer = golden.load(CLASSES.get(name.removesuffix("_small"), AutoTokenizer))
    return tokenizer, ROWS.get(name, len(tokenizer) + 190)


@pytest.mark.parametrize("name", [*NAMES, *ROWS])
def test_every_row(name):
    tokenizer, rows = load(name)
    assert rows >= len(tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(range(rows))
    assert len(tokens) == rows
    spare = range(len(tokenizer), rows)
    assert all(tokens[index] is None for index in spare)
    ids = [*range(0, rows, max(1, rows // 3000)), *spare]
    for text in (*tokenizer.batch_decode([[index] for index in ids]), tokenizer.decode(ids)):
        assert isinstance(text, str)
    for skip in (False, True):
        assert not any(tokenizer.batch_decode([[index] for index in spare], skip_special_tokens=skip))
    assert tokenizer.convert_tokens_to_string(tokens[:50] + tokens[-190:])


@given(data=st.data(), name=st.sampled_from(NAMES))
def test_ids_without_a_token_change_nothing(data, name):
    tokenizer, rows = load(name)
    ids = data.draw(st.lists(st.one_of(st.integers(0, rows - 1), st.integers(rows, 2**32 - 1)), max_size=12))
    known = [index for index in ids if index < len(tokenizer)]
    skip = data.draw(st.booleans())
    assert tokenizer.decode(ids, skip_special_tokens=skip) == tokenizer.decode(known, skip_special_tokens=skip)
    assert tokenizer.decode(torch.tensor(ids, dtype=torch.long)) == tokenizer.decode(known)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("index", (-1, -100, 2**32, 10**20))
def test_what_is_no_id(name, index):
    tokenizer, _ = load(name)
    with pytest.raises(OverflowError, match=f"^{index} is not a token id"):
        tokenizer.convert_ids_to_tokens([5, index])
    if index < 0 and name.startswith("chatglm"):  # the originals' way with labels
        assert tokenizer.decode([index]) == ""
        return
    with pytest.raises(OverflowError, match=f"^{index} is not a token id"):
        tokenizer.batch_decode([[5], [index]])


def test_as_transformers_own_tokenizers():
    tokenizer, _ = load("qwen_small")
    own = FastTokenizer(tokenizer_object=tokenizer.backend_tokenizer)
    ids = [64, len(own), 10**9]
    assert own.decode(ids) == tokenizer.decode(ids) == "a"
    assert own.convert_ids_to_tokens(ids) == tokenizer.convert_ids_to_tokens(ids) == ["a", None, None]
    with pytest.raises(OverflowError):
        own.decode([-1])


# ---- through everything that decodes ----


@pytest.fixture(scope="module", params=TINY_FAMILIES)
def speaker(request, tmp_path_factory):
    """(family, tokenizer, model): each answer is a token, a spare row, and the token again."""
    folder = tmp_path_factory.mktemp("any_id") / request.param
    write_tiny_checkpoint(request.param, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    config.vocab_size = len(tokenizer) + 100
    model = getattr(transformers, family_of(config).generates_with).from_config(config).eval()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, chat_format="chatml")
    (said,) = tokenizer.encode("好", add_special_tokens=False)[-1:]
    answers = itertools.cycle([said, config.vocab_size - 5, said])

    def prefer(module, args, output):
        output.logits[..., next(answers)] = 1e4

    model.register_forward_hook(prefer)
    return request.param, tokenizer, model


BLANKS = ("glm", "glm130b")  # which have no chats
TALKERS = [family for family in TINY_FAMILIES if family not in BLANKS]
ANSWER = "好好"
LENGTH = {"do_sample": False, "max_new_tokens": 3}


def test_streamer(speaker, capsys):
    _, tokenizer, model = speaker
    inputs = tokenizer("a[MASK]", return_tensors="pt")
    if hasattr(tokenizer, "build_inputs_for_generation"):
        inputs = tokenizer.build_inputs_for_generation(inputs, max_gen_length=4)
    model.generate(**inputs, **LENGTH, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip().replace(" ", "") == ANSWER


@pytest.mark.parametrize("speaker", TALKERS, indirect=True)
def test_pipeline(speaker):
    _, tokenizer, model = speaker
    run = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert run("a", return_full_text=False, **LENGTH)[0]["generated_text"].strip() == ANSWER


@pytest.mark.parametrize("speaker", TALKERS, indirect=True)
def test_chat(speaker):
    family, tokenizer, model = speaker
    if family == "baichuan":
        config = GenerationConfig(**LENGTH)
        messages = [{"role": "user", "content": "a"}]
        answer = model.chat(tokenizer, messages, generation_config=config)
        streamed = list(model.chat(tokenizer, messages, stream=True, generation_config=config))
    elif family == "qwen":
        answer, _ = model.chat(tokenizer, "a", None, **LENGTH)
        streamed = list(model.chat_stream(tokenizer, "a", None, **LENGTH))
    else:
        answer, _ = model.chat(tokenizer, "a", **LENGTH)
        streamed = [text for text, _ in model.stream_chat(tokenizer, "a", **LENGTH)]
    assert answer.strip() == ANSWER and streamed[-1].strip() == ANSWER
