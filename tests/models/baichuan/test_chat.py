from itertools import zip_longest

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextStreamer

from goldens import GOLDENS
from hf_cnllm.models.baichuan.chat import build_chat_input
from tokenizer_goldens import TokenizerGolden

MODELS = {"baichuan2_13b": "baichuan2_small", "baichuan_7b": "baichuan1_small"}
CHAT = [
    {"role": "system", "content": "你是一个助手。"},
    {"role": "user", "content": "你好</s>"},
    {"role": "assistant", "content": "你好！"},
    {"role": "user", "content": "1+1=?"},
]


@pytest.fixture(scope="module", params=MODELS)
def chatting(request):
    """A model with random weights, as large a vocabulary as the tokenizer, and the original's generation settings."""
    folder = TokenizerGolden(MODELS[request.param]).vocabulary
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / request.param).eval()
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.generation_config = GenerationConfig.from_pretrained(folder, max_new_tokens=10, do_sample=False)
    model.config.model_max_length = 256
    return model, tokenizer


def test_answer_is_what_generate_gives(chatting):
    model, tokenizer = chatting
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(**ids)
    expected = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert model.chat(tokenizer, CHAT) == expected
    assert len(expected) > 0


def test_stream_grows_to_the_answer(chatting):
    model, tokenizer = chatting
    stream = list(model.chat(tokenizer, CHAT, stream=True))
    assert 1 < len(stream) <= 10
    assert stream[-1] == model.chat(tokenizer, CHAT)
    tokens = [len(tokenizer(text)["input_ids"]) for text in stream]
    assert tokens == sorted(tokens)


def test_two_streams_do_not_disturb_each_other(chatting):
    model, tokenizer = chatting
    other = [{"role": "user", "content": "天气"}]
    streams = [model.chat(tokenizer, chat, stream=True) for chat in (CHAT, other)]
    first, second = zip(*zip_longest(*streams), strict=True)
    assert [text for text in first if text is not None][-1] == model.chat(tokenizer, CHAT)
    assert [text for text in second if text is not None][-1] == model.chat(tokenizer, other)


def test_a_stream_can_be_left(chatting):
    model, tokenizer = chatting
    stream = model.chat(tokenizer, CHAT, stream=True)
    assert next(stream)
    stream.close()


def test_generation_config_of_the_call(chatting):
    model, tokenizer = chatting
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=2)
    answer = model.chat(tokenizer, CHAT, generation_config=config)
    assert model.chat(tokenizer, CHAT).startswith(answer)
    assert config.max_new_tokens == 3 and model.generation_config.max_new_tokens == 10


def test_without_max_new_tokens_half_the_length_is_kept(chatting):
    model, tokenizer = chatting
    length, model.config.model_max_length = model.config.model_max_length, 24
    try:
        config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=[2, *range(5, 60)])
        model.chat(tokenizer, CHAT, generation_config=config)
        assert config.max_new_tokens is None
    finally:
        model.config.model_max_length = length


def test_transformers_own_streamer(chatting, capsys):
    model, tokenizer = chatting
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt")
    model.generate(**ids, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    assert capsys.readouterr().out.strip() == model.chat(tokenizer, CHAT).strip()


def test_errors_of_generation_are_raised(chatting):
    model, tokenizer = chatting
    config = GenerationConfig(max_new_tokens=3, num_beams=2, pad_token_id=0, eos_token_id=2)
    with pytest.raises(ValueError, match="beam"):
        list(model.chat(tokenizer, CHAT, stream=True, generation_config=config))


# --------------------------------------------------------------------------------------------------------------------
# which rounds stay


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(TokenizerGolden("baichuan2_small").vocabulary)


def rounds(n: int) -> list[dict[str, str]]:
    return [{"role": role, "content": f"{role} {i}"} for i in range(n) for role in ("user", "assistant")]


def test_the_latest_rounds_that_fit_beside_the_system_message(tokenizer):
    system = [{"role": "system", "content": "规则"}]
    chat = [*rounds(9), {"role": "user", "content": "最后"}]
    for kept in range(1, 9):
        expected = build_chat_input(tokenizer, system + chat[-2 * kept - 1 :], 10_000)
        room = len(expected) - 1  # the assistant's token in the end is not counted
        assert build_chat_input(tokenizer, system + chat, room + 1) == expected
        assert build_chat_input(tokenizer, system + chat, room)[1:] == expected[-room + 1 :]
        fewer = build_chat_input(tokenizer, system + chat[-2 * kept + 1 :], 10_000)
        assert build_chat_input(tokenizer, system + chat, room - 1) == fewer


def test_a_last_round_that_is_too_long_loses_its_beginning(tokenizer):
    chat = [{"role": "system", "content": "规则"}, {"role": "user", "content": "很长" * 30}]
    ids = build_chat_input(tokenizer, chat, 10_000)
    assert build_chat_input(tokenizer, chat, 7) == ids[-7:]


def test_an_answer_that_was_begun_is_continued(tokenizer):
    chat = [*CHAT, {"role": "assistant", "content": "等于"}]
    ids = build_chat_input(tokenizer, chat, 10_000)
    assert ids == tokenizer.apply_chat_template(chat, continue_final_message=True)["input_ids"]
    assert build_chat_input(tokenizer, CHAT, 10_000, user_token_id=7, assistant_token_id=8)[-1] == 8


@pytest.mark.parametrize(
    ("messages", "room", "message"),
    [
        ([], 9, "at least one message"),
        (CHAT, 0, "max_new_tokens"),
        (CHAT, -5, "max_new_tokens"),
        (CHAT[1:] + CHAT[:1], 99, r"messages\[3\] has the role 'system'"),
        ([{"role": "tool", "content": "x"}], 99, "unknown role"),
    ],
)
def test_bad_input(tokenizer, messages, room, message):
    with pytest.raises(ValueError, match=message):
        build_chat_input(tokenizer, messages, room)


@pytest.mark.parametrize("messages", ["你好", ["你好"], {"role": "user"}])
def test_messages_of_another_form(messages):
    tokenizer = TokenizerGolden("baichuan2_small").load(AutoTokenizer)
    with pytest.raises(ValueError, match="messages must be a list such as"):
        build_chat_input(tokenizer, messages, 100)


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "user"}, "A message of the user has no content"),
        ({"role": "user", "content": None}, "A message of the user has no content"),
        ({"role": "assistant", "content": None}, "A message of the assistant has no content"),
        ({"content": "a"}, "have the roles system, user and assistant, not"),
        ({"role": "boss", "content": "a"}, "have the roles system, user and assistant, not boss"),
    ],
)
def test_messages_of_wrong_shape(message, complaint, chatting):
    with pytest.raises(Exception, match=complaint):
        chatting[1].apply_chat_template([{"role": "user", "content": "a"}, message], add_generation_prompt=True)
