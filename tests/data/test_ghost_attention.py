"""Ghost attention: the instruction before every question to sample, before the first to learn; earlier answers have no loss."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_cnllm.data.formats import ConversationError, to_messages
from hf_cnllm.data.ghost_attention import learn_last_answer, sample_ghost_attention, to_learn, to_sample

words = st.text(st.characters(categories=["Lu", "Nd"]), min_size=1, max_size=8)  # none of the marks below


@st.composite
def dialogues(draw):
    rounds = draw(st.lists(st.tuples(words, words), min_size=1, max_size=4))
    pairs = zip(("user", "assistant") * len(rounds), (text for pair in rounds for text in pair), strict=True)
    return [{"role": role, "content": content} for role, content in pairs]


def instructed(dialogue, instruction="-inst-"):
    return [{"role": "system", "content": instruction}, *dialogue]


def contents(messages, role):
    return [message["content"] for message in messages if message["role"] == role]


@given(dialogues())
def test_sampled_with_the_instruction_before_every_question(dialogue):
    sampled = to_sample(instructed(dialogue))
    assert contents(sampled, "user") == [f"-inst-\n{text}" for text in contents(dialogue, "user")]
    assert contents(sampled, "assistant") == contents(dialogue, "assistant")[:-1]
    assert sampled[-1]["role"] == "user" and not contents(sampled, "system")


@given(dialogues())
def test_learned_with_the_instruction_before_the_first_question_and_the_last_answer_alone(dialogue):
    before = [dict(message) for message in dialogue]
    learned = to_learn(instructed(dialogue))
    first, *others = contents(dialogue, "user")
    assert contents(learned, "user") == [f"-inst-\n{first}", *others]
    assert contents(learned, "assistant") == contents(dialogue, "assistant")
    losses = [message.get("loss", True) for message in learned if message["role"] == "assistant"]
    assert losses == [False] * (len(losses) - 1) + [True]
    assert dialogue == before  # nothing is changed in place
    assert to_messages({"messages": learned})["messages"] == learned


@given(st.lists(dialogues(), max_size=3), st.lists(words, max_size=2))
def test_rows_are_every_dialogue_with_every_instruction_and_its_sample(dialogues, instructions):
    def answer(asked):
        assert all(conversation[-1]["role"] == "user" for conversation in asked)
        return [f"to {conversation[-1]['content']}" for conversation in asked]

    rows = sample_ghost_attention(dialogues, instructions, answer)
    expected = [(dialogue, instruction) for dialogue in dialogues for instruction in instructions]
    assert len(rows) == len(expected)
    for row, (dialogue, instruction) in zip(rows, expected, strict=True):
        question = dialogue[-2]["content"]
        reply = {"role": "assistant", "content": f"to {instruction}\n{question}"}
        assert to_messages(row)["messages"] == [*instructed(dialogue[:-1], instruction), reply]


def test_calls_after_the_last_question_are_learned():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    chat = [
        {"role": "user", "content": "q"},
        call,
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "a"},
    ]
    assert learn_last_answer(chat) == chat


def test_what_is_no_instructed_dialogue_is_refused():
    plain = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for build in (to_sample, to_learn):
        with pytest.raises(ConversationError, match="first message must be of the role system"):
            build(plain)
    with pytest.raises(ConversationError, match="no question"):
        to_sample(instructed([]))
    with pytest.raises(ConversationError, match="has a system message already"):
        sample_ghost_attention([instructed(plain)], ["i"], len)
    with pytest.raises(ValueError, match="0 answers to 1 questions"):
        sample_ghost_attention([plain], ["i"], lambda asked: [])
