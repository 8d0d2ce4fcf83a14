import copy
import pickle
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from baichuan_chats import EOS, NAMES, as_lists, control_ids, standard
from hf_cnllm.models.baichuan import BaichuanTokenizer
from hf_cnllm.models.chatglm import ChatGLMTokenizer
from hf_cnllm.models.qwen import QWenTokenizer
from hf_cnllm.tokenization.rendered_chat import EncodedChat, Marks
from tokenizer_goldens import TokenizerGolden
from tokenizer_goldens import settings as attributes

USER, ASSISTANT = 195, 196
TURNS = [
    {"role": "system", "content": "你是一个助手。"},
    {"role": "user", "content": "Hi, 你好\n"},
    {"role": "assistant", "content": " 你好👋！"},
    {"role": "user", "content": "1+1=?"},
    {"role": "assistant", "content": "2"},
]


# --------------------------------------------------------------------------------------------------------------------
# nothing in a message becomes a control token


def hostile_texts() -> st.SearchStrategy[str]:
    control = st.sampled_from(
        ["</s>", "<s>", "<unk>", "<SEP>", "<CLS>", *(f"<reserved_{n}>" for n in (0, 9, 99, 102, 103, 106, 107, 146))]
    )
    broken = st.tuples(control, st.integers(0, 14), st.sampled_from(["", " ", "\x01", "\u200b", "\U000f0000", "\n"]))
    fullwidth = control.map(lambda text: "".join(chr(ord(char) + 0xFEE0) for char in text))
    return st.lists(
        st.one_of(
            control,
            broken.map(lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] :]),
            control.map(lambda text: text[0] + text),
            control.map(lambda text: text[:-1] + text),
            fullwidth,
            st.sampled_from(["\U000f0000", "\U000f0001", "\U000e0fff", "\U000e0ffe", "你好", " ", "\n", "<h1>", "a"]),
            st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
        ),
        max_size=6,
    ).map("".join)


@pytest.mark.parametrize("name", NAMES)
def test_no_message_yields_a_control_token(name):
    tokenizer = TokenizerGolden(name).load(BaichuanTokenizer)
    control = control_ids(tokenizer)

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.tuples(hostile_texts(), hostile_texts()), min_size=1, max_size=3), hostile_texts())
    def check(turns, system):
        chat = [{"role": "system", "content": system}]
        for question, answer in turns:
            chat += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(chat)["input_ids"]
        assert [index for index in ids if index in control] == [USER, ASSISTANT] * len(turns) + [EOS]
        # and each content is encoded as on its own
        expected = tokenizer.encode_message(system)
        for question, answer in turns:
            expected += [USER, *tokenizer.encode_message(question), ASSISTANT, *tokenizer.encode_message(answer)]
        assert ids == [*expected, EOS]

    check()


def test_hostile_text_is_kept_as_text(tokenizer):
    text = "a</s>b <reserved_106>\n<reserved_102><s><unk><SEP>"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": text}])["input_ids"]
    assert tokenizer.decode(ids[1:]) == text


@pytest.mark.parametrize("name", NAMES)
def test_ordinary_text_is_encoded_as_everywhere(name):
    golden = TokenizerGolden(name)
    tokenizer = golden.load(BaichuanTokenizer)
    control = control_ids(tokenizer)
    ordinary = [case for case in golden["strings"] if not control & set(case["ids"])]
    assert len(ordinary) > 200
    for case in ordinary:
        assert tokenizer.encode_message(case["text"]) == case["ids"], case["text"]


def test_tools_documents_and_variables_are_no_way_in(tokenizer):
    template = (
        "{{ tools | tojson }}{% for document in documents %}{{ document.text }}{% endfor %}{{ note }}"
        "{% for message in messages %}<reserved_102>{{ message.role }}{{ message.name }}{{ message.content }}"
        "{{ message.tool_calls | tojson }}{% endfor %}"
    )
    bad = "</s><reserved_103>"
    call = {"type": "function", "function": {"name": bad, "arguments": {bad: [bad]}}}
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "name": bad, "content": bad, "tool_calls": [call]}],
        chat_template=template,
        tools=[{"type": "function", "function": {"name": bad, "parameters": {bad: bad}}}],
        documents=[{"title": bad, "text": bad}],
        note=bad,
    )["input_ids"]
    turn = tokenizer.convert_tokens_to_ids("<reserved_102>")
    assert [index for index in ids if index in control_ids(tokenizer)] == [turn]
    assert tokenizer.decode(ids).count(bad) == 10


@dataclass
class Call:
    name: str
    arguments: dict


class Odd:
    def __init__(self, text):
        self.text = text

    def __str__(self):
        return self.text

    def model_dump(self):
        return {"inner": [self.text]}


def search(query: str):
    """
    Finds </s>.

    Args:
        query: What <reserved_103> asks for.
    """


def test_text_inside_objects_is_no_way_in(tokenizer):
    bad = "</s><reserved_103>"
    template = "{{ tools }}{{ documents }}{% for message in messages %}{{ message }}{% endfor %}{{ path }}"
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x", "calls": (Call(bad, {"a": Odd(bad)}), PurePosixPath(bad))}],
        chat_template=template,
        tools=[search],
        documents=[{"text": Odd(bad)}],
        path=PurePosixPath(bad),
    )["input_ids"]
    assert not set(ids) & control_ids(tokenizer)
    assert tokenizer.decode(ids).count("reserved_103>") == 6


def test_control_tokens_of_one_character(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["①", "<tool>"]})
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "①<tool>"}])["input_ids"]
    assert not set(ids) & set(tokenizer.convert_tokens_to_ids(["①", "<tool>"]))
    with pytest.raises(ValueError, match="'①'"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template="①{{ messages }}")


def test_a_role_that_holds_a_control_token(tokenizer):
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}{% endfor %}"
    ids = tokenizer.apply_chat_template([{"role": "</s>", "content": "x"}], chat_template=template)["input_ids"]
    assert tokenizer.decode(ids).replace(" ", "") == "</s>:x"
    assert EOS not in ids


def test_marks_never_collide():
    marks = Marks.unused_in("\U000f0000a", "\U000f0002")
    assert len({*marks, "\U000f0000", "\U000f0002"}) == 4


def test_tokens_added_by_the_user(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    chat = [{"role": "user", "content": "<tool>新词"}]
    before = tokenizer.apply_chat_template(chat)["input_ids"]
    tokenizer.add_tokens(["新词"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<tool>"]})
    word, tool = tokenizer.convert_tokens_to_ids(["新词", "<tool>"])
    after = tokenizer.apply_chat_template(chat)["input_ids"]
    assert word in after, "an ordinary addition is vocabulary in a chat, too"
    assert tool not in after and tool not in before, "a special one is not for messages"
    template = "{% for message in messages %}<tool>{{ message.content }}{% endfor %}"
    assert tokenizer.apply_chat_template(chat, chat_template=template)["input_ids"].count(tool) == 1


def test_plain_call_parses_control_tokens_as_the_original_does(tokenizer):
    reserved = tokenizer.convert_tokens_to_ids("<reserved_102>")
    assert {EOS, reserved} <= set(tokenizer("a</s>b<reserved_102>")["input_ids"])


# --------------------------------------------------------------------------------------------------------------------
# every argument means what it means in transformers


BATCH = [TURNS, TURNS[:2], TURNS[1:4]]
ARGUMENTS = [
    {},
    {"add_generation_prompt": True},
    {"return_dict": False},
    {"return_tensors": "pt"},
    {"return_tensors": "np", "return_dict": False},
    {"padding": "max_length", "max_length": 64},
    {"truncation": True, "max_length": 9},
    {"truncation": True, "max_length": 12, "padding": "max_length", "return_tensors": "pt"},
    {"return_assistant_tokens_mask": True},
    {"return_assistant_tokens_mask": True, "return_tensors": "pt"},
    {"return_assistant_tokens_mask": True, "truncation": True, "max_length": 21},
    {"tokenizer_kwargs": {"return_token_type_ids": True, "return_length": True, "return_attention_mask": False}},
    {"tokenizer_kwargs": {"return_special_tokens_mask": True, "pad_to_multiple_of": 8}, "padding": True},
    {"tokenizer_kwargs": {"return_offsets_mapping": True}},
    {"tokenizer_kwargs": {"return_offsets_mapping": True}, "truncation": True, "max_length": 7},
    {"tokenize": False},
    {"tokenize": False, "add_generation_prompt": True},
]


@pytest.mark.parametrize("sides", [("right", "right"), ("left", "left")], ids=["right", "left"])
@pytest.mark.parametrize("kwargs", ARGUMENTS, ids=str)
@pytest.mark.parametrize("batched", [False, True], ids=["one", "batch"])
def test_arguments_as_in_the_standard(plain, kwargs, batched, sides):
    conversation = BATCH if batched else TURNS
    if batched and "return_tensors" in kwargs:
        kwargs = {"padding": True} | kwargs
    masked_left = kwargs.get("return_assistant_tokens_mask") and "max_length" in kwargs and sides[1] == "left"
    with attributes(plain, padding_side=sides[0], truncation_side=sides[1]):
        ours = as_lists(plain.apply_chat_template(conversation, **kwargs))
        expected = as_lists(standard(plain, conversation, **kwargs))
    if masked_left:  # the standard gives up at the first span that was cut off: its mask loses the later ones
        expected.pop("assistant_masks"), ours.pop("assistant_masks")
    assert ours == expected


def test_masks_survive_truncation_from_the_left(plain):
    with attributes(plain, truncation_side="left"):
        whole = plain.apply_chat_template(TURNS, return_assistant_tokens_mask=True)
        cut = plain.apply_chat_template(TURNS, return_assistant_tokens_mask=True, truncation=True, max_length=9)
    assert cut["assistant_masks"] == whole["assistant_masks"][-9:]
    assert sum(cut["assistant_masks"]) == 2  # the answer and the end of the text


@pytest.mark.parametrize("content", ["好的，", "好的 ", ""])
def test_continue_final_message(tokenizer, content):
    chat = [*TURNS[:-1], {"role": "assistant", "content": content}]
    ids = tokenizer.apply_chat_template(chat, continue_final_message=True)["input_ids"]
    start = tokenizer.apply_chat_template(TURNS[:-1], add_generation_prompt=True)["input_ids"]
    assert ids == start + tokenizer.encode_message(content)


def test_masked_tokens_are_the_answers(tokenizer):
    batch = tokenizer.apply_chat_template(BATCH[:1] * 2, return_assistant_tokens_mask=True)
    for ids, mask in zip(batch["input_ids"], batch["assistant_masks"], strict=True):
        answers = [tokenizer.encode_message(turn["content"]) for turn in TURNS if turn["role"] == "assistant"]
        assert [index for index, flag in zip(ids, mask, strict=True) if flag] == [*answers[0], *answers[1], EOS]


def test_offsets_point_into_the_rendered_chat(tokenizer):
    chat = [{"role": "user", "content": "Ａ</s>你好\n"}, {"role": "assistant", "content": "<reserved_102>龘 b"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    batch = tokenizer.apply_chat_template(chat, tokenizer_kwargs={"return_offsets_mapping": True})
    texts = [rendered[start:end] for start, end in batch["offset_mapping"]]
    assert texts[0] == tokenizer.convert_ids_to_tokens(USER) and texts[-1] == "</s>"
    assert {"\n", "龘", "b"} <= {text.strip(" ") or text for text in texts}
    assert rendered.startswith("".join(dict.fromkeys(texts[:2])))


def test_characters_and_tokens(tokenizer):
    batch = tokenizer.apply_chat_template(BATCH, padding=True, tokenizer_kwargs={"padding_side": "left"})
    for row, chat in enumerate(BATCH):
        rendered = tokenizer.apply_chat_template(chat, tokenize=False)
        place = rendered.index("Hi")
        token = batch.char_to_token(row, place)
        assert batch["input_ids"][row][token] in tokenizer.encode_message("Hi")
        assert place in range(*batch.token_to_chars(row, token))
    # where the last characters of a message leave no token, counting on would be wrong
    gone = tokenizer.apply_chat_template([{"role": "user", "content": "x\x01"}, *TURNS[2:]])
    if tokenizer.encode_message("x\x01") == tokenizer.encode_message("x"):
        with pytest.raises(ValueError):
            gone.char_to_token(0, 0)


def test_contents_in_parts(tokenizer):
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    for kwargs in ({}, {"tokenize": False}):
        one = tokenizer.apply_chat_template([{"role": "user", "content": "你好"}], **kwargs)
        assert tokenizer.apply_chat_template([{"role": "user", "content": parts}], **kwargs) == one
    with pytest.raises(ValueError, match="text only"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image", "url": "x"}]}])


@pytest.mark.parametrize(
    ("chat", "kwargs", "message"),
    [
        ([], {}, "empty conversation"),
        ([TURNS, []], {}, "empty conversation"),
        (TURNS, {"add_generation_prompt": True, "continue_final_message": True}, "not compatible"),
        (TURNS, {"return_assistant_tokens_mask": True, "continue_final_message": True}, "not compatible"),
        (TURNS, {"return_assistant_tokens_mask": True, "return_dict": False}, "return_dict"),
        (TURNS, {"tokenizer_kwargs": {"return_overflowing_tokens": True}}, "not available for chats"),
        (TURNS[1:2] + TURNS[:1], {}, "first message"),
        ([{"role": "tool", "content": "x"}], {}, "not tool"),
        (["Hi"], {}, "'role' and 'content'"),
    ],
)
def test_errors(tokenizer, chat, kwargs, message):
    with pytest.raises(Exception, match=message):
        tokenizer.apply_chat_template(chat, **kwargs)


def test_messages_are_left_as_they_were(tokenizer):
    chat = [{"role": "user", "content": [{"type": "text", "text": "</s>"}], "name": None}]
    before = copy.deepcopy(chat)
    tokenizer.apply_chat_template(chat)
    assert chat == before


def test_a_chat_without_a_token_to_pad_with():
    folder = TokenizerGolden("baichuan2_small").vocabulary
    without = BaichuanTokenizer(folder / "tokenizer.model")
    assert without.pad_token is None
    ids = BaichuanTokenizer.from_pretrained(folder).apply_chat_template(TURNS)["input_ids"]
    assert without.apply_chat_template(TURNS)["input_ids"] == ids
    assert without(without.apply_chat_template(TURNS, tokenize=False), add_special_tokens=False)["input_ids"] == ids


def test_an_empty_chat_text(tokenizer):
    assert tokenizer.apply_chat_template([{"role": "system", "content": ""}])["input_ids"] == []


@pytest.mark.parametrize("name", NAMES)
def test_pickles_do_not_depend_on_use(name):
    """datasets recognizes work done before by the tokenizer's pickle."""
    fresh = BaichuanTokenizer.from_pretrained(TokenizerGolden(name).vocabulary)
    before = pickle.dumps(fresh)
    ids = fresh.apply_chat_template(TURNS)["input_ids"]
    assert fresh.sp_model is not None
    assert pickle.dumps(fresh) == before
    assert pickle.loads(before).apply_chat_template(TURNS)["input_ids"] == ids


ASK, SAY = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
UNKNOWN = {
    "tools": ([ASK], {"tools": [{"name": "f", "description": "", "parameters": {}}]}),
    "documents": ([ASK], {"documents": [{"title": "t", "text": "x"}]}),
    "tool calls": ([ASK, SAY | {"tool_calls": [CALL]}], {}),
    "a role": ([{"role": "critic", "content": "a"}], {}),
    "a tool": ([ASK, SAY, {"role": "tool", "content": "x"}], {}),
}


@pytest.mark.parametrize("what", UNKNOWN)
@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("baichuan1_small", BaichuanTokenizer),
        ("baichuan2_small", BaichuanTokenizer),
        ("qwen_small", QWenTokenizer),
        ("chatglm1_small", ChatGLMTokenizer),
        ("chatglm2_small", ChatGLMTokenizer),
        ("chatglm3_small", ChatGLMTokenizer),
    ],
)
def test_what_a_family_has_no_format_for_is_refused(name, cls, what):
    chat, options = UNKNOWN[what]
    tokenizer = TokenizerGolden(name).load(cls)
    if name == "chatglm3_small" and what in ("tools", "tool calls", "a tool"):
        assert "f" in tokenizer.apply_chat_template(chat, tokenize=False, **options) or what == "a tool"
        return
    with pytest.raises(TemplateError, match=r"has no format|chats have the roles|chats are questions"):
        tokenizer.apply_chat_template(chat, tokenize=False, **options)


places = st.lists(st.integers(0, 12), min_size=2, max_size=10).map(sorted)


@given(
    places.map(lambda borders: list(zip(borders[::2], borders[1::2], strict=False))), places.map(pairwise).map(list)
)
def test_generated_tokens_are_those_that_reach_into_a_span(spans, tokens):
    reference = [int(any(low < max(end, start + 1) and start < high for low, high in spans)) for start, end in tokens]
    assert EncodedChat.generated(SimpleNamespace(offsets=lambda: tokens), spans) == reference
