"""Pairwise verdicts: both orders, ties, what is not judged, and a run that goes on."""

import json
from collections import Counter
from contextlib import closing

import pytest

pytest.importorskip("openai", reason="needs the extra data")

from chat_endpoint import chat_endpoint
from hf_cnllm.data.synthetic.chat_models import Endpoint, Failure, Local, Reply
from hf_cnllm.data.synthetic.judge import PROMPTS, Settings, own_questions, read_verdict, run, table
from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint


class Judge:
    """Says what a function of question, first and second answer says."""

    name = "m"

    def __init__(self, verdict):
        self.verdict, self.asked = verdict, []

    def answer(self, requests):
        for request in requests:
            self.asked.append(request)
            found = self.verdict(*shown(request.prompt))
            yield request, found if isinstance(found, Failure) else Reply(found)

    def close(self):
        pass


def shown(prompt):
    if prompt.startswith("Two"):
        marks = ("[Question]\n", "\n\n[Answer A]\n", "\n[End of answer A]\n\n[Answer B]\n", "\n[End of answer B]")
    else:
        marks = ("【问题】\n", "\n\n【回答 A】\n", "\n【回答 A 结束】\n\n【回答 B】\n", "\n【回答 B 结束】")
    parts = []
    for mark in marks:
        part, _, prompt = prompt.partition(mark)
        parts.append(part)
    return parts[1:]


def longer(question, first, second):
    """A judge without a bias but for length."""
    return f"… [[{'C' if len(first) == len(second) else 'A' if len(first) > len(second) else 'B'}]]"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(tmp_path, a="xxx", b="x", questions=None, output="out", **changes):
    """Two files of answers: one text to every question, or a text for each of them."""
    questions = questions or [json.loads(line) for line in own_questions().read_bytes().splitlines()]
    answers = []
    for name, given in (("a", a), ("b", b)):
        texts = given if isinstance(given, dict) else {row["question_id"]: given for row in questions}
        answers.append(
            write(tmp_path / f"{name}.jsonl", [{"question_id": i, "text": text} for i, text in texts.items()])
        )
    path = write(tmp_path / "questions.jsonl", questions)
    return Settings(answers, tmp_path / output, path, **changes)


def test_our_questions_are_four_in_each_of_vicuna_s_eight_categories():
    rows = [json.loads(line) for line in own_questions().read_bytes().splitlines()]
    assert Counter(row["category"] for row in rows) == dict.fromkeys(
        ("generic", "knowledge", "roleplay", "common-sense", "fermi", "counterfactual", "coding-math", "writing"), 4
    )
    assert Counter(row["language"] for row in rows) == {"zh": 16, "en": 16}


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (longer, {"a": 32}),
        (lambda *shown: "[[A]]", {"tie": 32, "orders_disagree": 32, "first_twice": 32}),
        (lambda *shown: "[[B]]", {"tie": 32, "orders_disagree": 32, "second_twice": 32}),
        (lambda *shown: "so [[C]], that is [[ C ]]", {"tie": 32}),
        (lambda question, first, second: "[[A]]" if len(first) > 1 else "[[C]]", {"tie": 32, "orders_disagree": 32}),
        (lambda *shown: "[[A]] or [[B]]", {"not_judged": 32}),
        (lambda *shown: "A", {"not_judged": 32}),
        (lambda *shown: Failure("timeout"), {"not_judged": 32}),
    ],
)
def test_a_win_is_one_in_both_orders(tmp_path, verdict, expected):
    statistics = run(settings(tmp_path), Judge(verdict), most_failures=1000)
    counts = {name: number for name, number in statistics["categories"]["all"].items() if number}
    assert counts == {"questions": 32, **expected}
    if "not_judged" in expected:
        assert sum(statistics["not_judged"].values()) == 64
    each = list(statistics["categories"].values())[:-1]
    assert len(each) == 8 and sum(row["questions"] for row in each) == 32


def test_both_orders_are_asked_in_the_language_of_the_question(tmp_path):
    judge = Judge(longer)
    run(settings(tmp_path, a="{question} [[B]]", b="{first}"), judge)
    assert len(judge.asked) == 64 and {request.temperature for request in judge.asked} == {0}
    pairs = [tuple(shown(request.prompt)[1:]) for request in judge.asked[:2]]
    assert pairs == [("{question} [[B]]", "{first}"), ("{first}", "{question} [[B]]")]
    assert sum(request.prompt.startswith(PROMPTS["zh"][:9]) for request in judge.asked) == 32


def test_the_table_tells_the_categories(tmp_path):
    questions = [{"question_id": f"q{n}", "category": "xy"[n > 2], "text": "?"} for n in range(5)]
    a = {"q0": "long", "q1": "s", "q2": "same", "q3": "long", "other": ""}
    b = {"q0": "s", "q1": "long", "q2": "same", "q3": "s", "q4": "s"}
    statistics = run(settings(tmp_path, a, b, questions), Judge(longer))
    assert statistics["answers_without_question"] == [1, 0]
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()[5:]
    assert lines == [
        "| x | 3 | 1 | 1 | 1 | 0 | 0 | 0 | 50% |",
        "| y | 2 | 1 | 0 | 0 | 0 | 0 | 1 | 100% |",
        "| all | 5 | 2 | 1 | 1 | 0 | 0 | 1 | 62% |",
    ]
    assert table(statistics) == (tmp_path / "out" / "table.md").read_text()
    verdicts = [json.loads(line) for line in (tmp_path / "out" / "verdicts.jsonl").read_bytes().splitlines()]
    assert [row["winner"] for row in verdicts] == ["a", "b", "tie", "a", "without_answer"]
    assert verdicts[0]["verdicts"] == ["A", "B"]


def test_a_judge_that_fails_and_an_interrupted_run(tmp_path):
    def reply(prompt):
        return longer(*shown(prompt)), "stop"

    def interrupting(*shown):
        if len(judge.asked) == 20:
            raise KeyboardInterrupt
        return longer(*shown)

    expected = run(settings(tmp_path, output="whole"), Judge(longer))
    judge = Judge(interrupting)
    with pytest.raises(KeyboardInterrupt):
        run(settings(tmp_path), judge)
    with (
        chat_endpoint(reply, ["500", "reset", "no json"], share=0.4) as chat,
        closing(Endpoint("m", chat.url, retries=0)) as model,
    ):
        statistics = run(settings(tmp_path), model, most_failures=100)
    asked = statistics["requests"]["verdicts"]
    failed, given_up = (
        sum(number for name, number in asked.items() if name.startswith(start)) for start in ("failed_", "given_up_")
    )
    assert failed and asked["asked"] == asked["answered"] + given_up == 64
    assert len(chat.requests) == 64 - 19 + failed - given_up, "what was answered before is not asked again"
    assert sum(statistics["not_judged"].values()) == given_up
    counts, wanted = statistics["categories"]["all"], expected["categories"]["all"]
    assert counts["a"] + counts["not_judged"] == wanted["a"] == 32


def test_a_model_of_the_demo_is_a_judge(tmp_path):
    write_tiny_checkpoint("baichuan", tmp_path / "model")
    questions = [{"question_id": 1, "category": "x", "text": "天空为什么是蓝色的？"}]
    statistics = run(settings(tmp_path, questions=questions, max_tokens=8), Local(str(tmp_path / "model")))
    assert statistics["not_judged"] == {"no_verdict_cut_short": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": {}}, "there is no row in the file"),
        ({"a": {"x": "y"}}, "no question that is answered in both"),
        ({"a": {"1": "y", 1: "z"}}, "line 2: field 'question_id' '1' is there twice"),
        ({"a": {1: None}}, "line 1: field 'text' must be a non-empty text, got null"),
        ({"a": {1: "half \ud83d"}}, "line 1: field 'text' holds half a surrogate pair"),
        ({"a": {"\ud83d": "x"}}, "line 1: field 'question_id' holds half a surrogate pair"),
        ({"questions": [{"question_id": 1, "text": "?"}]}, "line 1: field 'category' must be a non-empty text"),
        (
            {"questions": [{"question_id": 1, "text": "?", "category": "all"}]},
            "line 1: field 'category' must not be 'all'",
        ),
        ({"max_tokens": 0}, "--max-tokens"),
    ],
)
def test_what_cannot_be_is_said_before_the_judge_is_asked(tmp_path, changes, message):
    judge = Judge(longer)
    with pytest.raises(ValueError, match=message):
        run(settings(tmp_path, **changes), judge)
    assert not judge.asked and not (tmp_path / "out").exists()


def test_another_judge_s_folder_is_refused(tmp_path):
    run(settings(tmp_path), Judge(longer))
    other = Judge(longer)
    other.name = "another"
    with pytest.raises(ValueError, match="run with other model"):
        run(settings(tmp_path), other)
    assert not other.asked


def test_a_category_is_one_cell_of_the_table(tmp_path):
    questions = [{"question_id": 1, "category": "a|b\nc", "text": "?"}]
    run(settings(tmp_path, questions=questions), Judge(longer))
    assert "| a\\|b c | 1 | 1 |" in (tmp_path / "out" / "table.md").read_text()


def test_verdicts_are_read_where_there_is_one():
    assert [read_verdict(text) for text in ("[[A]]", "x\n[[B]].", "[[ C ]]", "[[D]]", "[A]", "[[A]][[B]]")] == [
        *("A", "B", "C"),
        *(None, None, None),
    ]
