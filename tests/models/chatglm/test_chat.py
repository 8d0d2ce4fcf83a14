import threading

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from hf_cnllm import ChatGLMConfig, ChatGLMForConditionalGeneration, ChatGLMTokenizer
from hf_cnllm.models.chat import as_messages, checked_history
from hf_cnllm.models.chatglm.chat import ConversationCache
from hf_cnllm.models.chatglm.tool_calls import ToolCallError
from tokenizer_goldens import TokenizerGolden

SHAPE = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4}
CHATGLM = {"architecture": "chatglm", "inner_hidden_size": 64, "max_sequence_length": 256, "vocab_size": 2400} | SHAPE
CHATGLM2 = {
    **{"architecture": "chatglm2", "ffn_hidden_size": 64, "kv_channels": 8, "multi_query_attention": True},
    **{"multi_query_group_num": 2, "seq_length": 256, "vocab_size": 2624, "add_qkv_bias": True},
    **SHAPE,
}
NAMES = ("chatglm1_small", "chatglm2_small", "chatglm3_small")
TOOLS = [{"role": "system", "content": "工具：", "tools": [{"name": "get_weather"}]}]
CALL = "get_weather\n ```python\ntool_call(city='北京')\n```"


class Scripted(LogitsProcessor):
    """Makes generation say `ids`, wherever the prompt ends."""

    def __init__(self, ids):
        self.ids, self.start = ids, None

    def __call__(self, input_ids, scores):
        self.start = input_ids.shape[1] if self.start is None else self.start
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids[input_ids.shape[1] - self.start]] = 0.0
        return forced


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    return _pair(request.param)


@pytest.fixture(scope="module")
def chatglm3():
    return _pair("chatglm3_small")


def _pair(name, **fields):
    tokenizer = TokenizerGolden(name).load(ChatGLMTokenizer)
    if tokenizer.generation == "chatglm":
        ids = {
            f"{token}_token_id": getattr(tokenizer, f"{token}_token_id")
            for token in ("bos", "eos", "pad", "mask", "gmask")
        }
        # With random weights, a head that is the embedding says the last token over and over.
        config = ChatGLMConfig(**CHATGLM, **ids, **fields, tie_word_embeddings=False)
    else:
        config = ChatGLMConfig(**CHATGLM2, **fields)
    torch.manual_seed(0)
    return ChatGLMForConditionalGeneration(config).eval(), tokenizer


def say(tokenizer, text, end):
    return LogitsProcessorList([Scripted([*tokenizer.encode_message(text), tokenizer.get_command(end)])])


def history_of(tokenizer):
    turns = [("你好", "hi")]
    return [*as_messages("", turns)[:-1]] if tokenizer.generation == "chatglm3" else turns


def end_of(tokenizer):
    return "<eop>" if tokenizer.generation == "chatglm" else "</s>"


def test_chat_is_generate_on_the_prompt(pair):
    model, tokenizer = pair
    history = history_of(tokenizer)
    before = [*history]
    response, after = model.chat(tokenizer, "天气？", history, do_sample=False, max_new_tokens=12)
    messages = (
        [*history, {"role": "user", "content": "天气？"}]
        if tokenizer.generation == "chatglm3"
        else as_messages("天气？", history)
    )
    inputs = tokenizer.apply_chat_template([messages], add_generation_prompt=True, return_tensors="pt")
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(ids[ids < len(tokenizer)])
    expected = (
        model.process_response(text, messages)[0]
        if tokenizer.generation == "chatglm3"
        else model.process_response(text)
    )
    assert response == expected and response
    assert history == before and after[: len(before)] == before
    last = (
        {"role": "assistant", "metadata": "", "content": response}
        if tokenizer.generation == "chatglm3"
        else ("天气？", response)
    )
    assert after[-1] == last


def test_streaming_ends_where_chat_does(pair):
    model, tokenizer = pair
    arguments = {"history": history_of(tokenizer), "do_sample": False, "max_new_tokens": 12}
    steps = list(model.stream_chat(tokenizer, "天气？", **arguments))
    assert len(steps) > 3 and steps[-1] == model.chat(tokenizer, "天气？", **arguments)
    torch.manual_seed(1)
    sampled = model.chat(tokenizer, "a", max_length=60)
    torch.manual_seed(1)
    assert list(model.stream_chat(tokenizer, "a", max_length=60))[-1] == sampled


def test_answers_end_at_their_token_and_are_tidied(pair):
    model, tokenizer = pair
    said = say(tokenizer, "\n 你好,世界! [[训练时间]]", end_of(tokenizer))
    response, _ = model.chat(tokenizer, "a", logits_processor=said)
    assert response == ("你好，世界！ 2023年" if tokenizer.generation == "chatglm" else "你好,世界! 2023年")


def test_half_characters_are_not_shown(pair):
    model, tokenizer = pair
    said = say(tokenizer, "a龘龘b", end_of(tokenizer))
    shown = [response for response, _ in model.stream_chat(tokenizer, "a", logits_processor=said)]
    assert shown[-1] == "a龘龘b" and set(shown) <= {"a", "a龘", "a龘龘", "a龘龘b"}


def test_ids_that_have_no_token_are_passed_over(pair):
    model, tokenizer = pair
    ids = [model.config.vocab_size - 1, *tokenizer.encode_message("a"), tokenizer.get_command(end_of(tokenizer))]
    response, _ = model.chat(tokenizer, "a", logits_processor=LogitsProcessorList([Scripted(ids)]))
    assert response == "a"


def test_abandoned_streams_stop(pair):
    model, tokenizer = pair
    stream = model.stream_chat(tokenizer, "a", do_sample=False, max_length=200)
    next(stream)
    stream.close()
    assert list(stream) == []


@pytest.mark.parametrize("name", ("chatglm2_small", "chatglm3_small"))
def test_turns_on_one_cache(name):
    model, tokenizer = _pair(name)
    said = say(tokenizer, "hi", "</s>")
    *_, (_, history, cache) = model.stream_chat(tokenizer, "你好", logits_processor=said, return_past_key_values=True)
    prompt = tokenizer.apply_chat_template(as_messages("你好"), add_generation_prompt=True)["input_ids"]
    assert cache.token_ids == prompt + tokenizer.encode_message("hi")
    assert cache.get_seq_length() == len(cache.token_ids)

    arguments = {"do_sample": False, "max_new_tokens": 8}
    *_, (response, after, same) = model.stream_chat(
        tokenizer, "再见", history, past_key_values=cache, return_past_key_values=True, **arguments
    )
    assert same is cache and len(after) == len(history) + (2 if name == "chatglm3_small" else 1)
    second = cache.token_ids[: len(cache.token_ids) - 7]
    expected = model.generate(torch.tensor([second]), **arguments)[0, len(second) :].tolist()
    text = tokenizer.decode([i for i in expected if i < len(tokenizer)])
    assert response == (
        model.process_response(text, [{"role": ""}])[0] if "3" in name else model.process_response(text)
    )
    text = tokenizer.decode(second)
    assert text.count("你好") == 1 and text.count("再见") == 1 and text.count("[gMASK]") == ("3" in name)


def test_turns_with_p_tuning_are_computed_anew():
    model, tokenizer = _pair("chatglm3_small", pre_seq_len=3)
    arguments = {"do_sample": False, "max_new_tokens": 8}
    *_, (_, history, cache) = model.stream_chat(tokenizer, "你好", return_past_key_values=True, **arguments)
    *_, last = model.stream_chat(
        tokenizer, "再见", history, past_key_values=cache, return_past_key_values=True, **arguments
    )
    assert last[:2] == model.chat(tokenizer, "再见", history, **arguments)


def test_a_cache_after_an_abandoned_stream_is_what_was_shown():
    model, tokenizer = _pair("chatglm2_small")
    stream = model.stream_chat(tokenizer, "a", do_sample=False, max_length=200, return_past_key_values=True)
    *_, cache = next(stream)
    stream.close()
    assert cache.get_seq_length() == len(cache.token_ids)


def test_tool_round_trip(chatglm3):
    model, tokenizer = chatglm3
    response, history = model.chat(
        tokenizer, "天气？", TOOLS, logits_processor=say(tokenizer, CALL, "<|observation|>")
    )
    assert response == {"name": "get_weather", "parameters": {"city": "北京"}}
    assert [message["role"] for message in history] == ["system", "user", "assistant"]
    said = say(tokenizer, "\n 晴", "<|user|>")
    response, history = model.chat(tokenizer, '{"天气": "晴"}', history, role="observation", logits_processor=said)
    assert response == "晴" and history[-2] == {"role": "observation", "content": '{"天气": "晴"}'}
    ids = tokenizer.apply_chat_template(history)["input_ids"]
    roles = [tokenizer.get_command(f"<|{m['role']}|>") for m in history]
    assert [i for i in ids if i in set(roles)] == roles


def test_only_tokens_are_roles(chatglm3):
    """A quoted role is text in the answer, the history and the next prompt; a generated one begins a turn."""
    model, tokenizer = chatglm3
    role = tokenizer.get_command("<|assistant|>")
    thought, call = "\n I look.", CALL
    written = tokenizer.encode_message(f"{thought}<|assistant|>{call}")
    generated = [*tokenizer.encode_message(thought), role, *tokenizer.encode_message(call)]
    called = {"name": "get_weather", "parameters": {"city": "北京"}}
    text = tokenizer.decode(written)
    assert role not in written and str(tokenizer.decode(generated)).replace(" get", "get") == text
    for ids, expected in ((written, text.strip()), (generated, called)):
        end = [*ids, tokenizer.get_command("<|observation|>")]
        answers = [model.chat(tokenizer, "a", TOOLS, logits_processor=LogitsProcessorList([Scripted(end)]))]
        answers += list(
            model.stream_chat(tokenizer, "a", TOOLS, logits_processor=LogitsProcessorList([Scripted(end)]))
        )[-1:]
        answers.append(model.process_response(tokenizer.decode(ids), [*TOOLS, {"role": "user", "content": "a"}]))
        answers.append(model.process_response(tokenizer.batch_decode([ids])[0], answers[0][1][:2]))
        for response, history in answers:
            assert response == expected and len(history) == (3 if ids is written else 4)
            prompt = tokenizer.apply_chat_template(history, return_dict=False)
            assert prompt.count(role) == len(history) - 2
    assert model.process_response([str(tokenizer.decode(generated))], TOOLS)[0] != called
    assert model.process_response(tokenizer.decode(generated, clean_up_tokenization_spaces=True), TOOLS)[0] == called


def test_malformed_tool_calls_are_errors(chatglm3):
    model, tokenizer = chatglm3
    for code in ("tool_call(city=open('x'))", "tool_call(city='北京'"):
        bad = CALL.replace("tool_call(city='北京')", code)
        with pytest.raises(ToolCallError, match="tool call"):
            model.chat(tokenizer, "a", TOOLS, logits_processor=say(tokenizer, bad, "<|observation|>"))
        stream = model.stream_chat(tokenizer, "a", TOOLS, logits_processor=say(tokenizer, bad, "<|observation|>"))
        with pytest.raises(ToolCallError, match="tool call"):
            list(stream)


def test_streaming_a_tool_call(chatglm3):
    model, tokenizer = chatglm3
    steps = model.stream_chat(tokenizer, "a", TOOLS, logits_processor=say(tokenizer, CALL, "<|observation|>"))
    assert list(steps)[-1][0] == {"name": "get_weather", "parameters": {"city": "北京"}}


@pytest.mark.parametrize("name", ("chatglm1", "chatglm2"))
def test_golden_process_response(name):
    model, _ = _pair(f"{name}_small")
    for case in TokenizerGolden(name)["process_response"]:
        assert model.process_response(case["text"]) == case["out"]


def test_bad_arguments(pair):
    model, tokenizer = pair
    with pytest.raises(TypeError, match="1 arguments too many behind `logits_processor`: pass arguments by name"):
        model.chat(
            tokenizer, "a", None, *["user"] * (tokenizer.generation == "chatglm3"), 100, 1, False, 1.0, 1.0, None, 0
        )
    with pytest.raises(TypeError, match="`max_length` is given twice"):
        model.chat(tokenizer, "a", None, *["user"] * (tokenizer.generation == "chatglm3"), 100, max_length=100)
    if tokenizer.generation == "chatglm3":
        with pytest.raises(TypeError, match="a chat is a list of messages"):
            model.chat(tokenizer, "a", [("a", "b")])
        with pytest.raises(Exception, match="not robot"):
            model.chat(tokenizer, "a", role="robot")
        with pytest.raises(ValueError, match="role is 100, but must be a string"):
            model.chat(tokenizer, "a", None, 100)
    else:
        with pytest.raises(ValueError, match="has no roles: only ChatGLM3 has"):
            model.chat(tokenizer, "a", role="observation")
        with pytest.raises(ValueError, match=r"history\[0\] is"):
            model.chat(tokenizer, "a", [{"role": "user", "content": "a"}])
    if tokenizer.generation == "chatglm":
        with pytest.raises(ValueError, match="ChatGLM-6B has no past_key_values"):
            model.stream_chat(tokenizer, "a", return_past_key_values=True)
    else:
        with pytest.raises(ValueError, match=r"must be what stream_chat\(…, return_past_key_values=True\) yielded"):
            model.stream_chat(tokenizer, "a", past_key_values=ConversationCache.__mro__[1]())


def test_history_is_checked():
    assert checked_history("a", None) == [] and as_messages("a") == [{"role": "user", "content": "a"}]
    for query, history, problem in (
        (1, None, "query must be a string"),
        ("a", "b", "of type str"),
        ("a", [("b",)], "pair"),
    ):
        with pytest.raises(ValueError, match=problem):
            checked_history(query, history)


# ---- as scripts for the originals call them ----


def test_arguments_by_position(pair):
    model, tokenizer = pair
    role = ["user"] * (tokenizer.generation == "chatglm3")
    past = [None] * (tokenizer.generation != "chatglm")
    expected = model.chat(tokenizer, "你好", [], max_length=40, do_sample=False)
    assert model.chat(tokenizer, "你好", [], *role, 40, 1, False, 0.7, 0.95, None) == expected
    assert list(model.stream_chat(tokenizer, "你好", [], *role, *past, 40, False, 0.7, 0.95, None))[-1] == expected
    if past:
        steps = list(model.stream_chat(tokenizer, "你好", [], *role, None, 40, False, 0.7, 0.95, None, True))
        assert steps[-1][:2] == expected and isinstance(steps[-1][2], ConversationCache)


@pytest.mark.parametrize("name", NAMES[:2])
def test_greeting_that_nobody_asked_for(name):
    model, tokenizer = _pair(name)
    answer, history = model.chat(tokenizer, "a", [[None, "你好"]], max_length=60, do_sample=False)
    assert history == [(None, "你好"), ("a", answer)]
    assert tokenizer.build_prompt("a", [[None, "你好"]]) == tokenizer.build_prompt("a", [("", "你好")])
    assert "None" not in tokenizer.build_prompt("a", [[None, "你好"], ["a", None]])


@pytest.mark.parametrize("texts", (["你好"], ["你好", "a long text"]), ids=("one", "padded batch"))
def test_stream_generate(pair, texts):
    model, tokenizer = pair
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": [tokenizer.eos_token_id]}
    expected = model.generate(**inputs, **options, pad_token_id=tokenizer.pad_token_id)
    steps = list(model.stream_generate(**inputs, **options, pad_token_id=tokenizer.pad_token_id))
    length = inputs["input_ids"].shape[1]
    assert [step.shape[1] for step in steps] == list(range(length + 1, expected.shape[1] + 1))
    assert torch.equal(steps[-1], expected) and torch.equal(steps[0], expected[:, : length + 1])


def test_stream_generate_ends_with_the_token_that_ends(pair):
    """What the server in ChatGLM3's repository relies on when it cuts the last token off."""
    model, tokenizer = pair
    inputs = tokenizer("你好", return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    said = [*tokenizer.encode("好", add_special_tokens=False), tokenizer.eos_token_id]
    steps = model.stream_generate(
        **inputs, logits_processor=[Scripted(said)], eos_token_id=[tokenizer.eos_token_id], max_new_tokens=9
    )
    assert list(steps)[-1][0, length:].tolist() == said


def test_stream_generate_with_a_cache(pair):
    model, tokenizer = pair
    inputs = tokenizer("你好", return_tensors="pt")
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": -1}
    *_, (ids, cache) = model.stream_generate(**inputs, **options, return_past_key_values=True)
    assert cache.get_seq_length() == ids.shape[1] - 1
    with pytest.raises(ValueError, match="pass the ids of all turns, not of the last one alone"):
        model.stream_generate(**inputs, **options, past_key_values=cache)
    if tokenizer.generation != "chatglm":  # a prefix language model reads every prompt anew
        more = torch.cat((ids, ids[:, -1:]), dim=1)
        expected = model.generate(input_ids=more, attention_mask=torch.ones_like(more), **options)
        mask = torch.ones_like(more)
        *_, again = model.stream_generate(more, attention_mask=mask, **options, past_key_values=cache)
        assert torch.equal(again, expected)


def test_stream_generate_stops_when_closed(pair):
    model, tokenizer = pair
    steps = model.stream_generate(**tokenizer("你好", return_tensors="pt"), max_new_tokens=200, do_sample=True)
    next(steps)
    steps.close()
    assert not any(thread.name == "streamed_tokens" for thread in threading.enumerate())
    with pytest.raises(ValueError, match="max_new_tokens"):
        next(model.stream_generate(**tokenizer("你好", return_tensors="pt"), max_new_tokens=-1))
