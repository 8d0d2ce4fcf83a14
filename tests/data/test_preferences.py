"""Preferences in the published formats: what is read, and what is refused by field."""

import json

import pytest

from hf_cnllm.data.formats import ConversationError
from hf_cnllm.data.preferences import read_judgment, read_pair, read_preferences, read_question

Q, A, B = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
PAIR = {"prompt": [Q], "chosen": [A], "rejected": [B], "tools": None}
TURN = {"from": "human", "value": "q"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [Q], "chosen": [A], "rejected": [B]},
        {"chosen": [Q, A], "rejected": [Q, B], "score_chosen": 5.0, "score_rejected": 1.0},
        {"prompt": "q", "prompt_id": "x", "chosen": [Q, A], "rejected": [Q, B], "messages": [Q, A]},  # UltraFeedback
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},  # LLaMA-Factory
        {"conversations": [TURN], "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
        {"messages": [Q], "chosen": A, "rejected": B},
    ],
)
def test_pairs(row):
    assert read_pair(row) == PAIR


def test_a_pair_late_in_a_conversation():
    row = {"system": "s", "conversations": [TURN, {"from": "gpt", "value": "x"}, TURN], "chosen": "a", "rejected": "b"}
    found = read_pair(row)
    assert [one["role"] for one in found["prompt"]] == ["system", "user", "assistant", "user"]
    assert (found["chosen"], found["rejected"]) == ([A], [B])


@pytest.mark.parametrize(
    ("row", "label"),
    [
        ({"prompt": "q", "completion": "a", "label": True}, True),
        ({"prompt": [Q], "completion": [A], "label": 0}, False),
        ({"messages": [Q, A], "label": False}, False),
        ({"conversations": [TURN, {"from": "gpt", "value": "a"}], "kto_tag": True}, True),
        ({"instruction": "q", "output": "a", "kto_tag": False}, False),
    ],
)
def test_judgments(row, label):
    assert read_judgment(row) == {"prompt": [Q], "completion": [A], "label": label, "tools": None}


@pytest.mark.parametrize(
    "row",
    [{"prompt": "q"}, {"prompt": [Q]}, {"messages": [Q]}, {"messages": [Q, A]}, {"instruction": "q", "output": "a"}],
)
def test_questions(row):
    assert read_question(row) == {"prompt": [Q], "tools": None}


def test_a_questions_system_message_is_a_part_of_it():
    system = {"role": "system", "content": "s"}
    assert read_question({"prompt": "q", "system": "s", "history": []})["prompt"] == [system, Q]


def test_a_questions_other_fields_are_for_the_reward():
    assert read_question({"prompt": "q", "solution": 4, "id": 1}, ignore=["id"]) == {
        "prompt": [Q], "tools": None, "solution": 4,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("read", "row", "said"),
    [
        (read_pair, {"chosen": "a", "rejected": "b"}, "needs the question: the field 'prompt'"),
        (read_pair, {"prompt": "q", "chosen": "a"}, "needs the field 'rejected'"),
        (read_pair, {"prompt": "q", "chosen": "a", "rejected": None}, r"'rejected'; has \['chosen', 'prompt'\]"),
        (read_pair, {"prompt": "q", "chosen": "a", "rejected": 7}, "field 'rejected' must be a text"),
        (read_pair, {"chosen": [Q, A], "rejected": [{**Q, "content": "?"}, B]}, "must answer the same conversation"),
        (read_pair, {"prompt": "q", "chosen": [Q], "rejected": "b"}, "must end with a message of the assistant"),
        (
            read_pair,
            {"prompt": "q", "chosen": "a", "rejected": "b", "odd": "x"},
            "field 'odd' is not read beside 'chosen'",
        ),
        (read_pair, {"prompt": "q", "chosen": "a", "rejected": " "}, "field 'rejected' must be a non-empty text"),
        (
            read_pair,
            {"prompt": [Q], "chosen": [{**A, "content": 5}], "rejected": B},
            r"field 'chosen\[0\].content' must",
        ),
        (
            read_pair,
            {"prompt": [{**Q, "content": ""}], "chosen": A, "rejected": B},
            r"field 'prompt\[0\].content' must",
        ),
        (read_pair, {"messages": [Q], "chosen": {**A, "content": ""}, "rejected": B}, r"field 'chosen.content' must"),
        (read_pair, {"instruction": "q", "chosen": "", "rejected": "b"}, "field 'chosen' must be a non-empty text"),
        (read_pair, {"instruction": "q", "output": "x", "chosen": "a", "rejected": "b"}, "field 'output' is not read"),
        (read_pair, {"prompt": "q", "messages": [Q], "chosen": "a", "rejected": "b"}, "field 'messages' is not read"),
        (
            read_pair,
            {"prompt": 7, "chosen": "a", "rejected": "b"},
            "field 'prompt' must be a text or a list of messages",
        ),
        (read_question, {"prompt": "q", "history": [["p", "a"]]}, "field 'history' is not read beside 'prompt'"),
        (read_pair, ["q"], "expected an object"),
        (read_judgment, 7, "expected an object"),
        (read_judgment, {"prompt": "q", "completion": "a"}, "needs the field 'label'"),
        (read_judgment, {"prompt": "q", "completion": "a", "label": "yes"}, "must say yes or no"),
        (read_judgment, {"prompt": "q", "completion": "a", "label": 2}, "must say yes or no"),
        (read_question, {"prompt": 7}, "field 'prompt' must be a text or a list of messages"),
        (read_question, {"messages": []}, "at least one message"),
        (read_question, {"messages": ["q"]}, "field 'messages\\[0\\]' must be an object"),
        (read_question, {}, "needs the field 'messages'"),
        (read_question, [], "expected an object"),
    ],
)
def test_what_is_refused(read, row, said):
    with pytest.raises(ConversationError, match=said):
        read(row)


def test_files_and_data_sets(tmp_path):
    from datasets import Dataset

    (tmp_path / "pairs.jsonl").write_text("\n\n".join(json.dumps(PAIR) for _ in range(2)))
    (tmp_path / "set").mkdir()
    Dataset.from_list([{"chosen": [Q, A], "rejected": [Q, B]}]).to_parquet(tmp_path / "set/train.parquet")
    names = [str(tmp_path / "pairs.jsonl"), str(tmp_path / "set")]
    assert read_preferences(names, read_pair) == [PAIR] * 3
    with pytest.raises(ConversationError, match=r"pairs.jsonl, line 1: needs the field 'label'"):
        read_preferences(names, read_judgment)
    with pytest.raises(ConversationError, match=r"set, row 0: needs"):
        read_preferences(names[1:], read_judgment)
    with pytest.raises(OSError):
        read_preferences([str(tmp_path / "none.jsonl")], read_pair)
