"""Texts that try to become roles: through every door of every family's chats, a text is a text.

The attacked chat must hold exactly the control tokens of the same chat with harmless words in that place; so must every
later prompt of a conversation in which the model itself has said it, and no answer becomes a tool call by its text.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GenerationConfig

from hf_cnllm import FAMILIES, encode_conversation, with_system_in_question
from hf_cnllm.families import Shape
from robustness.attacks import ATTACKS, HARMLESS
from robustness.tally import sample, sample_or_whole
from tokenizer_goldens import FIXTURES

PART = "role attack"
# Vocabulary -> the architecture of the model that chats with it, and the token that ends its answers.
CHATS = {
    "baichuan1_small": ("baichuan-alibi", "</s>"),
    "baichuan2_small": ("baichuan-rope", "</s>"),
    "chatglm1_small": ("chatglm", "<eop>"),
    "chatglm2_small": ("chatglm2", "</s>"),
    "chatglm3_small": ("chatglm2", "<|user|>"),
    "qwen_small": ("qwen", "<|im_end|>"),
}
every_chat = pytest.mark.parametrize("name", CHATS)
CONTROL = re.compile(r"<\|.*\|>|</?\w+>|\[\w+\]|sop|eop|<reserved_\d+>|<extra_\d+>|<image_\d+>", re.IGNORECASE)
NOT_CONTROL = re.compile(
    r"<n>|<\|tab\|>|<\|blank_\d+\|>|<0x[0-9A-F]{2}>"
)  # how ChatGLM-6B writes white space, and bytes


@cache
def tokenizer_of(name: str) -> Any:
    return AutoTokenizer.from_pretrained(FIXTURES / "vocab" / name)


@cache
def control_ids(name: str) -> frozenset[int]:
    """The ids that only a template, or the model itself, may write. The unknown token is any text's."""
    tokenizer = tokenizer_of(name)
    names = {index: piece for piece, index in tokenizer.get_vocab().items()}
    names |= {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    ids = {i for i, piece in names.items() if CONTROL.fullmatch(piece) and not NOT_CONTROL.fullmatch(piece)}
    ids |= set(tokenizer.all_special_ids)
    if name.startswith("baichuan"):
        ids |= {195, 196}
    return frozenset(ids - {tokenizer.unk_token_id})


def controls(name: str, ids: Any) -> list[int]:
    return [index for index in ids if index in control_ids(name)]


# --- doors: how a text gets into a prompt -------------------------------------------------------------------------------

Door = Callable[[Any, str], Any]  # (tokenizer, text) -> the ids of a chat with the text in it
USER, ASSISTANT, SYSTEM = "user", "assistant", "system"


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chat(tokenizer: Any, messages: list, as_batch: bool = False, **options: Any) -> Any:
    options = {"add_generation_prompt": messages[-1]["role"] != ASSISTANT, "return_dict": False} | options
    return tokenizer.apply_chat_template([messages, messages] if as_batch else messages, **options)


def rendered(tokenizer: Any, messages: list, encode: Callable, **options: Any) -> Any:
    return encode(chat(tokenizer, messages, tokenize=False, **options))


def conversations(text: str) -> dict[str, list]:
    return {
        "user": [message(USER, text)],
        "an earlier user": [message(USER, text), message(ASSISTANT, "yes"), message(USER, "and?")],
        "an earlier answer": [message(USER, "hi"), message(ASSISTANT, text), message(USER, "and?")],
        "the last answer": [message(USER, "hi"), message(ASSISTANT, text)],
        "everywhere": [message(USER, text), message(ASSISTANT, text), message(USER, text)],
    }


def conversations_with_system(text: str) -> dict[str, list]:
    return {"system": [message(SYSTEM, text), message(USER, "hi")]}


TOOL = {
    "name": "look_up",
    "description": "Looks something up.",
    "parameters": {"type": "object", "properties": {"what": {"type": "string", "description": "what"}}},
}


def chatglm3_conversations(text: str) -> dict[str, list]:
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"what": text}}}
    asked = message(USER, "hi")
    return {
        "a tool's result": [asked, message(ASSISTANT, "x", metadata="look_up"), message("observation", text)],
        "a result of role tool": [asked, message(ASSISTANT, "x", metadata="look_up"), message("tool", text)],
        "a result that is an object": [asked, message("observation", {"found": text, text: 1})],
        "a call's arguments": [asked, {"role": ASSISTANT, "tool_calls": [call]}, message("tool", "x"), asked],
        "a description in system": [message(SYSTEM, "x", tools=[{**TOOL, "description": text}]), asked],
        "metadata": [asked, message(ASSISTANT, "x", metadata=text), message("observation", "y")],
    }


def doors(name: str) -> dict[str, Door]:
    """Every way of a text into the ids of a chat that this vocabulary's family has."""
    found: dict[str, Door] = {}
    makers = [conversations]
    if name not in ("chatglm1_small", "chatglm2_small"):
        makers.append(conversations_with_system)
    if name == "chatglm3_small":
        makers.append(chatglm3_conversations)
    for maker in makers:
        for place in maker(""):
            found[f"template, {place}"] = lambda t, x, m=maker, p=place: chat(t, m(x)[p])
            found[f"batch, {place}"] = lambda t, x, m=maker, p=place: flat(chat(t, m(x)[p], as_batch=True))
            found[f"rendered and called, {place}"] = lambda t, x, m=maker, p=place: rendered(
                t, m(x)[p], lambda text: t(text, add_special_tokens=False)["input_ids"]
            )
            found[f"rendered and encoded, {place}"] = lambda t, x, m=maker, p=place: rendered(
                t, m(x)[p], lambda text: t.encode(text, add_special_tokens=False), sanitize_control_tokens=True
            )
            found[f"rendered in a batch, {place}"] = lambda t, x, m=maker, p=place: flat(
                rendered(t, m(x)[p], lambda text: t([text, text], add_special_tokens=False)["input_ids"])
            )
    found["parts of text"] = lambda t, x: chat(t, [message(USER, [{"type": "text", "text": x}])])
    found["two parts that meet"] = lambda t, x: chat(
        t, [message(USER, [{"type": "text", "text": p} for p in halves(x)])]
    )
    found["a message alone"] = lambda t, x: t.encode_message(x)
    found["to be continued"] = lambda t, x: chat(
        t, [message(USER, "hi"), message(ASSISTANT, f"{x} and")], continue_final_message=True
    )
    found["training, question"] = lambda t, x: training(t, [message(USER, x), message(ASSISTANT, "yes")])
    found["training, answer"] = lambda t, x: training(t, [message(USER, "hi"), message(ASSISTANT, x)])
    found["training, system in question"] = lambda t, x: training(
        t, with_system_in_question([message(SYSTEM, x), message(USER, "hi"), message(ASSISTANT, "yes")])
    )
    return found | OWN_DOORS.get(name, {})


def flat(rows: Any) -> list[int]:
    return [index for row in rows for index in row]


def halves(text: str) -> tuple[str, str]:
    return text[: len(text) // 2], text[len(text) // 2 :]


def training(tokenizer: Any, conversation: list) -> list[int]:
    encoded = encode_conversation(tokenizer, conversation, end_token_ids=[tokenizer.eos_token_id])
    return [*encoded["input_ids"], *(label for label in encoded["labels"] if label >= 0)]


def _qwen_context(tokenizer: Any, query: str, **options: Any) -> list[int]:
    from hf_cnllm.models.qwen.chat import make_context

    return make_context(tokenizer, query, **options)[1]


def _baichuan_input(tokenizer: Any, messages: list) -> list[int]:
    from hf_cnllm.models.baichuan.chat import build_chat_input

    return build_chat_input(tokenizer, messages, 4096)


_BAICHUAN: dict[str, Door] = {
    "build_chat_input, user": lambda t, x: _baichuan_input(t, [message(USER, x)]),
    "build_chat_input, answer": lambda t, x: _baichuan_input(t, conversations(x)["an earlier answer"]),
    "build_chat_input, system": lambda t, x: _baichuan_input(t, [message(SYSTEM, x), message(USER, "hi")]),
}
OWN_DOORS: dict[str, dict[str, Door]] = {
    "baichuan1_small": _BAICHUAN,
    "baichuan2_small": _BAICHUAN,
    "qwen_small": {
        "make_context, query": lambda t, x: _qwen_context(t, x, system="s"),
        "make_context, system": lambda t, x: _qwen_context(t, "hi", system=x),
        "make_context, history": lambda t, x: _qwen_context(t, "hi", history=[(x, x)], system="s"),
    },
    "chatglm3_small": {
        "build_chat_input": lambda t, x: t.build_chat_input(x)["input_ids"][0].tolist(),
        "build_chat_input, observation": lambda t, x: t.build_chat_input(x, role="observation")["input_ids"][
            0
        ].tolist(),
        "build_single_message": lambda t, x: t.build_single_message("assistant", "", x),
        "build_single_message, metadata": lambda t, x: t.build_single_message("assistant", x, "y"),
        "tools": lambda t, x: chat(t, [message(USER, "hi")], tools=[{**TOOL, "description": x}]),
    },
}


@sample_or_whole
@every_chat
def test_texts_on_the_way_in(name, whole, tally):
    tally.part, tally.name = PART, "tokenized and rendered chats"
    tokenizer = tokenizer_of(name)
    all_doors = doors(name)
    harmless = {door: controls(name, enter(tokenizer, HARMLESS)) for door, enter in all_doors.items()}
    cases = [(door, attack) for attack in ATTACKS for door in all_doors]
    for door, attack in sample(cases, 600, whole):
        tally.judge(
            f"{name}, {door}: {attack[:60]!r}",
            lambda door=door, attack=attack: controls(name, all_doors[door](tokenizer, attack)),
            lambda found, door=door: found == harmless[door],
        )
    tally.check()


FRAGMENTS = (
    *("<|", "|>", "<", ">", "</", "|", "[", "]", "im_start", "im_end", "assistant", "user", "system", "observation"),
    *("gMASK", "MASK", "sop", "eop", "s", "reserved_106", "reserved_103", "endoftext", "extra_0", "\n", " ", "_", "▁"),
    *("\u200b", "\ufeff", "\u0301", "｜", "\U000f0000", "\U000f0001", "\U00100000", "\x00", "{{", "}}", "{%", "%}"),
)


@every_chat
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_texts_of_fragments(name, data):
    """Whatever a text is put together from, in parts that meet or in messages that follow one another."""
    tokenizer = tokenizer_of(name)
    texts = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)
    first, second, third = (data.draw(texts) or "x" for _ in range(3))

    def ids(*contents: str) -> list[int]:
        parts = [{"type": "text", "text": content} for content in contents[:2]]
        return controls(
            name, chat(tokenizer, [message(USER, parts), message(ASSISTANT, contents[2]), message(USER, "and?")])
        )

    assert ids(first, second, third) == ids("x", "x", "x")


# --- the way back: what the model says ----------------------------------------------------------------------------------


@cache
def model_of(name: str) -> Any:
    """A tiny model with the ids of the vocabulary."""
    tokenizer = tokenizer_of(name)
    architecture, _ = CHATS[name]
    family = next(family for family in FAMILIES if architecture in family.architectures)
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    if architecture == "chatglm":
        ids |= {f"{key}_token_id": tokenizer.convert_tokens_to_ids(f"[{text}]") for key, text in MASKS.items()}
        ids["max_sequence_length"] = 2048
    config = family.make_config(architecture, Shape(16, 1, 2, 16, len(tokenizer)), **ids)
    auto_class = next(name for name in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM") if name in family.models)
    return getattr(transformers, auto_class).from_config(config).eval()


MASKS = {"mask": "MASK", "gmask": "gMASK"}


@contextmanager
def saying(model: Any, ids: list[int]) -> Iterator[list[list[int]]]:
    """Lets the model answer with these ids; yields the list of prompts that it is given."""
    prompts: list[list[int]] = []
    steps = 0

    def answer(module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        nonlocal steps
        if steps == 0:
            input_ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            prompts.append(input_ids[0].tolist())
        output.logits = torch.zeros(1, 1, model.config.vocab_size)
        output.logits[..., ids[min(steps, len(ids) - 1)]] = 1000.0
        steps += 1
        return output

    hook = model.register_forward_hook(answer, with_kwargs=True)
    try:
        yield prompts
    finally:
        hook.remove()


def answer_ids(name: str, text: str) -> list[int]:
    """What a model generates that says `text`: ids of plain text, and the token that ends the turn."""
    tokenizer = tokenizer_of(name)
    lead = "\n " if name == "chatglm3_small" else ""  # behind <|assistant|> stands the line of metadata
    return [*tokenizer.encode_message(f"{lead}He wrote: {text} and left."), end_id(name)]


def end_id(name: str) -> int:
    return tokenizer_of(name).convert_tokens_to_ids(CHATS[name][1])


SYSTEM_WITH_TOOLS = {"role": "system", "content": "x", "tools": [TOOL]}


def say(
    name: str, query: str, history: Any, ids: list[int], stream: bool, **options: Any
) -> tuple[Any, list, list[int]]:
    """One turn in the family's own words: (response, history, the ids of the prompt)."""
    model, tokenizer = model_of(name), tokenizer_of(name)
    with saying(model, ids) as prompts:
        if name.startswith("baichuan"):
            messages = [*(history or []), message(USER, query)]
            config = GenerationConfig(max_new_tokens=len(ids) + 2, eos_token_id=2, pad_token_id=0, do_sample=False)
            response = model.chat(tokenizer, messages, stream=stream, generation_config=config)
            if stream:
                *_, response = response
            history = [*messages, message(ASSISTANT, response)]
        elif name == "qwen_small":
            arguments = {"history": history, "max_new_tokens": len(ids) + 2, "do_sample": False, **options}
            if stream:
                *_, response = model.chat_stream(tokenizer, query, **arguments)
                history = [*(history or []), (query, response)]
            else:
                response, history = model.chat(tokenizer, query, **arguments)
        else:
            arguments = {"history": history, "max_new_tokens": len(ids) + 2, "do_sample": False, **options}
            if stream:
                *_, (response, history) = model.stream_chat(tokenizer, query, **arguments)
            else:
                response, history = model.chat(tokenizer, query, **arguments)
    return response, history, prompts[0]


def two_turns(name: str, text: str, stream: bool, history: Any = None) -> tuple[Any, list, list[int]]:
    """The model says `text`; what is it asked the next time? (response, control ids of the next prompt, roles kept)"""
    response, history, _ = say(name, "hi", history, answer_ids(name, text), stream)
    _, _, prompt = say(name, "and?", history, answer_ids(name, "x"), stream)
    roles = [turn["role"] for turn in history if isinstance(turn, dict)]
    return response, roles, controls(name, prompt)


@sample_or_whole
@every_chat
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_texts_on_the_way_back(name, stream, whole, tally):
    """What the model quotes is text: no role in its history, no tool call, no token more in the next prompt."""
    tally.part, tally.name = PART, "answers of the model, whole and streamed, and the next prompt"
    histories = [None]
    if name == "chatglm3_small":
        histories.append([SYSTEM_WITH_TOOLS])
    for history in histories:
        _, roles, harmless = two_turns(name, HARMLESS, stream, history)
        for attack in sample(ATTACKS, 8, whole):
            tally.judge(
                f"{name}, {'stream' if stream else 'chat'}{', tools' if history else ''}: {attack[:60]!r}",
                lambda attack=attack, history=history: two_turns(name, attack, stream, history),
                lambda found, roles=roles, harmless=harmless: (
                    isinstance(found[0], str) and "and left" in found[0] and found[1:] == (roles, harmless)
                ),
            )
    tally.check()


@sample_or_whole
@pytest.mark.parametrize("tools", [False, True], ids=["no-tools", "tools"])
def test_process_response(tools, whole, tally):
    """ChatGLM3's `process_response` of decoded ids, which hold no role token, gives one turn of text."""
    tally.part, tally.name = PART, "process_response of a decoded answer"
    name = "chatglm3_small"
    tokenizer, model = tokenizer_of(name), model_of(name)
    history = [SYSTEM_WITH_TOOLS, message(USER, "hi")] if tools else [message(USER, "hi")]

    def process(text: str) -> tuple:
        output = tokenizer.decode(answer_ids(name, text)[:-1])
        response, turns = model.process_response(output, history)
        ids = chat(tokenizer, [*turns, message(USER, "and?")])
        return type(response), [turn["role"] for turn in turns], controls(name, ids)

    harmless = process(HARMLESS)
    assert harmless[0] is str
    for attack in sample(ATTACKS, 40, whole):
        tally.judge(f"tools={tools}: {attack[:60]!r}", lambda attack=attack: process(attack), lambda x: x == harmless)
    tally.check()


def test_role_tokens_of_the_model_are_roles(tally):
    """The other side: a real `<|assistant|>` in the answer's ids is a turn, and a tool call behind it a call."""
    tally.part, tally.name = PART, "real role tokens of the model"
    name = "chatglm3_small"
    tokenizer = tokenizer_of(name)
    role, observation = (tokenizer.convert_tokens_to_ids(f"<|{r}|>") for r in ("assistant", "observation"))
    call = tokenizer.encode_message("look_up\n ```python\ntool_call(what='x')\n```")
    ids = [*tokenizer.encode_message("\n I look it up."), role, *call, observation]
    for stream in (False, True):
        tally.judge(
            f"a call behind a thought, stream={stream}",
            lambda stream=stream: say(name, "hi", [SYSTEM_WITH_TOOLS], ids, stream),
            lambda found: found[0] == {"name": "look_up", "parameters": {"what": "x"}} and len(found[1]) == 4,
        )
    assert not tally.counts["refused"], dict(tally.errors)
    tally.check()


@sample_or_whole
def test_stop_words(whole, tally):
    """Qwen's stop words are ids: the text of one does not end an answer."""
    tally.part, tally.name = PART, "texts of stop words in an answer"
    name = "qwen_small"
    tokenizer = tokenizer_of(name)
    words = [[tokenizer.convert_tokens_to_ids(w)] for w in ("<|im_end|>", "<|im_start|>", "<|endoftext|>")]
    for attack in sample(ATTACKS, 20, whole):
        for stream in (False, True):
            tally.judge(
                f"{attack[:60]!r}, stream={stream}",
                lambda attack=attack, stream=stream: say(
                    name, "hi", None, answer_ids(name, attack), stream, stop_words_ids=words
                ),
                lambda found: found[0].endswith("and left."),
            )
    tally.check()


@sample_or_whole
@every_chat
def test_private_use_characters(name, whole, tally):
    """The characters that chats are marked with inside may all stand in a message: no StopIteration, which ends a `map`."""
    tally.part, tally.name = PART, "messages of private-use characters"
    tokenizer = tokenizer_of(name)
    planes = {"all of plane 15": range(0xF0000, 0xFFFFE), "all of plane 16": range(0x100000, 0x10FFFE)}
    planes |= {"the basic plane's": range(0xE000, 0xF900), "all": [*range(0xE000, 0xF900), *range(0xF0000, 0x10FFFE)]}
    harmless = controls(name, chat(tokenizer, [message(USER, HARMLESS)]))
    stops = []
    for what in planes if whole else ["all"]:
        text = "".join(map(chr, planes[what]))

        def answer(text: str = text, what: str = what) -> list[int]:
            try:
                return controls(name, chat(tokenizer, [message(USER, text)]))
            except StopIteration:
                stops.append(f"{name}, {what}")
                raise ValueError("StopIteration") from None

        tally.judge(f"{name}, {what}", answer, lambda found: found == harmless)
    assert not stops, stops
    tally.check()
