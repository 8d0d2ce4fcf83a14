"""ShareGPT's conversations: HTML, what is refused and why, splitting without loss."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

pytest.importorskip("markdownify", reason="needs the extra data")

from hf_cnllm.data.conversations import read_conversations
from hf_cnllm.data.formats import ConversationError
from hf_cnllm.data.sharegpt import Settings, html_to_markdown, run, split, token_counter
from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint

PAGE = """<div class="markdown prose"><p>Use a <strong>set</strong>, <code>a_b*c</code>:</p><pre><div class="bg-black"><div
class="flex"><span>python</span><button class="ml-auto">Copy code</button></div><div class="p-4"><code class="!whitespace-pre hljs
language-python"><span class="hljs-keyword">def</span> f(x):
    <span>return</span> x &lt; 3
</code></div></div></pre><ul><li>one</li><li>two<ol><li>deep</li></ol></li></ul><table><thead><tr><th>a</th></tr></thead><tbody><tr>
<td>1</td></tr></tbody></table></div>"""
MARKDOWN = """Use a **set**, `a_b*c`:

```python
def f(x):
    return x < 3
```

- one
- two
  1. deep

| a |
| --- |
| 1 |"""


def talk(*texts, name=None, first="human"):
    senders = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    turns = [{"from": senders[place % 2], "value": text} for place, text in enumerate(texts)]
    return {"id": name, "conversations": turns} if name else {"conversations": turns}


def cleaned(tmp_path, rows, count_tokens=None, **changes):
    path = tmp_path / "in.jsonl"
    if isinstance(rows, list):
        rows = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    path.write_bytes(rows)
    statistics = run(Settings([path], tmp_path / "out", **changes), count_tokens)
    made = [json.loads(line) for line in (tmp_path / "out" / "conversations.jsonl").read_bytes().splitlines()]
    return made, statistics


def test_rows_without_ids_in_files_of_one_name(tmp_path):
    """train.jsonl of two folders."""
    files = [tmp_path / folder / "train.jsonl" for folder in "ab"]
    for path in files:
        path.parent.mkdir()
        path.write_text(json.dumps(talk(f"Who is {path.parent.name}?", "It is nobody.")))
    statistics = run(Settings(files, tmp_path / "out"))
    assert statistics["output"]["rows"] == 2 and not statistics["discarded"]
    rows = map(json.loads, (tmp_path / "out" / "conversations.jsonl").read_text().splitlines())
    assert [row["id"] for row in rows] == [f"{path}:1" for path in files]


@pytest.mark.parametrize("before", ["", "1 / 2", "2 / 2 \n"])
def test_a_page_becomes_markdown(before):
    assert html_to_markdown(before + PAGE) == MARKDOWN


@pytest.mark.parametrize(
    "text",
    [
        "Plain *text* with a_b and 1 < 2",
        "An example:\n```html\n<div><p>x</p></div>\n```",
        "Use vector<int> and <T>.",
        "<T> is a type",
        "1 / 2 is a half",
        "",
    ],
)
def test_what_is_no_page_stays_as_it_is(text):
    assert html_to_markdown(text) is text


def test_code_with_fences_of_its_own_keeps_them():
    assert html_to_markdown("<pre><code>```\nx\n```</code></pre>") == "````\n```\nx\n```\n````"


def test_discards_are_counted_with_their_reasons(tmp_path):
    good = talk("为什么？", PAGE, "谢谢", name="kept")
    rows = [
        *(good, talk("q", "a", name="also"), talk("again", "a", name="also"), talk("你好", "您好")),
        *(
            {"id": 1},
            {"conversations": []},
            {"conversations": [3]},
            {"conversations": [{"from": "nobody", "value": "x"}]},
        ),
        *(
            talk("alone"),
            talk("a", "q", first="gpt"),
            talk("q", "a", "", "a"),
            {"conversations": [{"from": "gpt", "value": 1}]},
        ),
        *(talk("вопрос", "ответ"), talk("q", "<div></div>"), talk("質問です", "こたえ"), talk("q", "<p>" * 9000)),
        {"conversations": [{"from": "system", "value": "s"}, *talk("q", "a")["conversations"]]},
    ]
    lines = [json.dumps(row).encode() for row in rows]
    lines += [b'{"id": "\xff"}', b"{", b"[]", b"", talk_of_half_a_pair()]
    made, statistics = cleaned(tmp_path, b"\n".join(lines))
    assert statistics["discarded"] == {
        **{
            "double_id": 1,
            "no_conversation": 2,
            "unknown_sender": 2,
            "no_answer": 1,
            "wrong_order": 1,
            "empty_message": 2,
        },
        **{"no_text": 1, "language_und": 1, "language_ja": 1, "broken_html": 1},
        **{"undecodable": 2, "not_json": 1, "not_an_object": 1},
    }
    assert statistics["changed"] == {"html_answers": 1, "unanswered_questions": 1}
    assert statistics["input"]["rows"] == len(made) + sum(statistics["discarded"].values())
    assert [row["id"] for row in made] == ["kept", "also", "in.jsonl:4", "in.jsonl:17"]
    assert made[0]["conversations"] == [{"from": "human", "value": "为什么？"}, {"from": "gpt", "value": MARKDOWN}]
    listed = [json.loads(line) for line in (tmp_path / "out" / "discarded.jsonl").read_bytes().splitlines()]
    assert Counter(row["reason"] for row in listed) == statistics["discarded"]
    assert json.loads((tmp_path / "out" / "statistics.json").read_text()) == statistics
    assert len(read_conversations(tmp_path / "out" / "conversations.jsonl")) == 4


def talk_of_half_a_pair():
    return json.dumps(talk("q", "\ud83d")).encode()


def test_one_list_is_read_as_lines_are(tmp_path):
    rows = [talk("q", "a", name="x"), "no row", talk("q")]
    made, statistics = cleaned(tmp_path, json.dumps(rows, indent=1).encode())
    assert [row["id"] for row in made] == ["x"] and statistics["discarded"] == {"not_an_object": 1, "no_answer": 1}


TURNS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12)


@settings(deadline=None)
@given(TURNS, st.booleans(), st.integers(1, 30))
def test_splitting_loses_no_turn(rounds, has_system, max_length):
    system = [{"role": "system", "content": "ss"}] * has_system
    turns = [
        {"role": role, "content": f"{place}".ljust(length, ".")}
        for place, pair in enumerate(rounds)
        for role, length in zip(("user", "assistant"), pair, strict=True)
    ]

    def count(messages):
        return sum(len(message["content"]) for message in messages)

    pieces = split([*system, *turns], count, max_length)
    assert all(piece[: len(system)] == system for piece in pieces)
    bodies = [piece[len(system) :] for piece in pieces]
    assert [turn for body in bodies for turn in body] == turns
    for body, following in zip(bodies, [*bodies[1:], None], strict=True):
        assert body[0]["role"] == "user" and len(body) % 2 == 0
        assert count([*system, *body]) <= max_length or len(body) == 2
        assert following is None or count([*system, *body, *following[:2]]) > max_length, "as long as can be"


def test_pieces_fit_the_length_in_the_tokenizer_s_template(tmp_path):
    write_tiny_checkpoint("baichuan", tmp_path / "model")
    count = token_counter(AutoTokenizer.from_pretrained(tmp_path / "model"))
    row = talk(*(f"第{place}句话，说点什么吧。" for place in range(12)), name="x")
    row["conversations"] += talk("short", "很长" * 60)["conversations"]
    made, statistics = cleaned(tmp_path, [row], count, max_length=64)
    pieces = [one["messages"] for one in read_conversations(tmp_path / "out" / "conversations.jsonl")]
    assert [turn["content"] for piece in pieces for turn in piece] == [turn["value"] for turn in row["conversations"]]
    assert [count(piece) <= 64 for piece in pieces] == [True] * (len(pieces) - 1) + [False] and len(pieces) > 2
    assert statistics["changed"] == {"html_answers": 0, "longer_than_max_length": 1, "split": 1}
    firsts = [row["conversations"].index(one["conversations"][0]) for one in made]
    assert [one["id"] for one in made] == [f"x_{first}" for first in firsts]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}\n", b"\xff\n"])
def test_nothing_left_is_one_error(tmp_path, content):
    with pytest.raises(ConversationError, match="no conversation is left"):
        cleaned(tmp_path, content)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (b"[{]", {}, "not valid JSON"),
        (b'["\xff"]', {}, "not UTF-8"),
        (b"{}", {"languages": ("fr",)}, "--language-model"),
        (b"{}", {"max_length": 0}, "--max-length must be at least 1"),
        (b"{}", {"language_threshold": float("nan")}, "--language-threshold must be from 0 to 1"),
    ],
)
def test_what_cannot_be_is_one_error(tmp_path, content, changes, message):
    with pytest.raises(ValueError, match=message):
        cleaned(tmp_path, content, **changes)
    assert not (tmp_path / "out").exists()


def test_rows_of_a_list_that_lines_could_not_hold(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_cnllm.data.sharegpt.MAX_LINE_BYTES", 100)
    rounds = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "It is good."}]
    long = [{"from": "human", "value": "long " * 30}, rounds[1]]
    ids = [0, 0, "\ud83d", "kept", None, ""]
    rows = [{"id": name, "conversations": rounds} for name in ids] + [{"conversations": long}]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    statistics = run(Settings([tmp_path / "in.json"], tmp_path / "out"))
    assert statistics["discarded"] == {"double_id": 1, "undecodable": 1, "too_long": 1}
    made = [json.loads(line)["id"] for line in (tmp_path / "out" / "conversations.jsonl").read_bytes().splitlines()]
    assert made == ["0", "kept", "in.json:5", "in.json:6"]
