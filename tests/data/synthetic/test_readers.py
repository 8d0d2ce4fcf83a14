"""How replies are read, and what is not taken of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_cnllm.data.formats import ConversationError
from hf_cnllm.data.synthetic.heuristics import against_instances, against_instruction
from hf_cnllm.data.synthetic.prompts import (
    TEXTS,
    ask_for_instances,
    ask_for_kind,
    ask_for_list,
    ask_for_whole_tasks,
    read_input_first,
    read_kind,
    read_list,
    read_output_first,
    read_whole_tasks,
)
from hf_cnllm.data.synthetic.seeds import own_seeds, read_seeds


@pytest.fixture(scope="module")
def seeds():
    return read_seeds(own_seeds(), ("zh", "en"))


def test_the_seeds_are_of_both_languages_and_kinds_and_pass_the_heuristics_themselves(seeds):
    counts = {language: [task.is_classification for task in seeds if task.language == language] for language in TEXTS}
    assert all(len(kinds) == 16 and 6 <= sum(kinds) <= 9 for kinds in counts.values())
    assert len({task.instruction for task in seeds}) == len(seeds)
    for task in seeds:
        assert against_instruction(task.instruction) is None, task
        assert against_instances(task.instances, 5) == [None] * len(task.instances), task


@pytest.mark.parametrize("language", TEXTS)
def test_what_the_model_is_shown_is_read_back(seeds, language):
    """The examples in the prompts have the form that replies are asked for."""
    mine = [task for task in seeds if task.language == language]
    classifications = [task for task in mine if task.is_classification][:6]
    others = [task for task in mine if not task.is_classification][:6]
    for prompt in (
        ask_for_list(language, mine[:8]),
        ask_for_list(language, mine[:8]).replace("\n", "\n**").replace(". ", ".** "),
    ):
        assert [draft.instruction for draft in read_list(prompt)] == [task.instruction for task in mine[:8]]
    whole = read_whole_tasks(ask_for_whole_tasks(language, mine[:3]).partition("\n\n")[2])
    assert whole == [(task.instruction, [task.instances[0]]) for task in mine[:3]]
    for task in (*classifications, *others):
        read = read_output_first if task.is_classification else read_input_first
        prompt = ask_for_instances(language, [task], "…", task.is_classification)
        assert read(prompt.partition("\n\n")[2].rpartition("\n\n")[0]) == list(task.instances)
    prompt = ask_for_kind(language, mine, "…")
    assert [read_kind(line.partition(TEXTS[language]["classification"])[2]) for line in prompt.split("\n\n")[1:]] == [
        *[True, False] * 6,
        None,
    ]


@pytest.mark.parametrize(
    ("read", "reply", "expected"),
    [
        (
            read_list,
            "Sure!\n9. **Do\n this**\n10) that 3.5\n 11、译",
            [("Do this**", ()), ("that 3.5", ()), ("译", ())],
        ),
        (read_list, "I am sorry.", []),
        (read_whole_tasks, "1. Instruction: a\n1. Output: b", [("a", [("", "b")])]),
        (read_whole_tasks, "###\n指令：甲\n输入：<noinput>\n###\nhello", [("甲", [("", "")])]),
        (read_input_first, "Input: a\nOutput: b\nTask: next\nInput: c", [("a", "b")]),
        (
            read_input_first,
            "**Example 1**\n**Input:** a\n**Output:** b\n\nExample 2\nOutput: c",
            [("a", "b"), ("", "c")],
        ),
        (read_input_first, "示例1：\n输入：无\n输出：好\n例如这样", [("", "好\n例如这样")]),
        (read_input_first, "Example 1\nno output", [("no output", "")]),
        (read_input_first, "just text", []),
        (read_output_first, "Class label: X\nInput: a\nb\nExample 2\nclass label: Y", [("a\nb", "X"), ("", "Y")]),
        (read_output_first, "类别：甲\n输入：乙", [("乙", "甲")]),
        (read_output_first, "X", []),
    ],
)
def test_replies_are_read(read, reply, expected):
    assert read(reply) == expected


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        *[("Yes", True), (" **yes**, it is", True), ("是。", True), ("No", False), ("不是", False), ("否", False)],
        *[("Nothing", None), ("", None), ("It depends", None)],
    ],
)
def test_kinds_are_read(reply, kind):
    assert read_kind(reply) is kind


@given(st.text(), st.sampled_from([read_list, read_whole_tasks, read_kind, read_input_first, read_output_first]))
def test_any_reply_can_be_read(reply, read):
    read(reply)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Name four rivers of Asia", None),
        ("说出四条亚洲的河流", None),
        ("", "blank"),
        ("Say it now", "too_short"),
        ("写首诗", "too_short"),
        ("very " * 151, "too_long"),
        ("很" * 301, "too_long"),
        ("Tell what the Image on the wall shows", "forbidden_word"),
        ("Explain why imagery matters in a poem", None),
        ("Tell the guest to go to the lobby", "forbidden_word"),
        ("描述这张照片里的人物", "forbidden_word"),
        ("Write a program to add two numbers", "write_a_program"),
        ("请编写一个程序计算两数之和", "write_a_program"),
        ("- Name four rivers of Asia", "begins_with_punctuation"),
        ("“春眠不觉晓”的下一句是什么", "begins_with_punctuation"),
        ("Élire une ville pour les vacances", "begins_with_another_script"),
        ("アジアの川を四つ挙げて", "begins_with_another_script"),
        ("Name four ri\ufffdvers of Asia", "broken_characters"),
        ("Name four ri\ud800vers of Asia", "broken_characters"),
    ],
)
def test_instructions_are_refused_for_a_reason(text, reason):
    assert against_instruction(text) == reason


def test_instances_are_refused_for_a_reason():
    pairs = {
        ("a", "b"): None,
        ("", "c"): None,
        ("", "d"): None,
        ("e", " "): "output_blank",
        ("f", "f "): "output_equals_input",
        ("g", "h:"): "ends_with_colon",
        ("i：", "j"): "ends_with_colon",
        ("k", "\x00"): "broken_characters",
        ("l", "1"): "same_input_other_output",
        ("l", "2"): "same_input_other_output",
        ("m", "n"): None,
        ("o", "p"): None,
        ("q", "r"): "too_many",
    }
    assert against_instances([*pairs, ("a", "b")], 5) == [*pairs.values(), "double"]


def instance(**changes):
    return {
        "instruction": "Name a river",
        "instances": [{"input": "", "output": "Nile"}],
        "is_classification": True,
    } | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "there is no seed task in the language en that is a classification"),
        (instance(), "no seed task in the language en that is no classification"),
        (b"\xff\xfe", "not UTF-8"),
        ("{", "line 1: not valid JSON"),
        ([1], "line 1: expected an object, got int"),
        (instance(instances=[]), "line 1: field 'instances' must be a list"),
        (instance(instances=[{"input": 3, "output": "x"}]), r"line 1: field 'instances\[0\].input' must be"),
        (instance(instances=[{"input": "x"}]), r"line 1: field 'instances\[0\].output' must be a non-empty text"),
        (instance(instruction=" "), "line 1: field 'instruction' must be a non-empty text"),
        (instance(instruction="A \ud83d river"), "line 1: field 'instruction' holds half a surrogate pair"),
        (instance(is_classification=None), "line 1: field 'is_classification' must be true or false"),
    ],
)
def test_seeds_are_refused_by_field(tmp_path, content, message):
    import json

    path = tmp_path / "seeds.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else b"")
    if not isinstance(content, bytes):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConversationError, match=message):
        read_seeds(path, ("en",))
