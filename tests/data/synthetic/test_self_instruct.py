"""Self-Instruct and Alpaca, end to end: on an endpoint that fails, stalls and says junk, on a model of the demo, killed at any
point. Whatever is read of replies is taken, or discarded and counted."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

pytest.importorskip("rapidfuzz", reason="needs the extra data")
pytest.importorskip("openai", reason="needs the extra data")

from chat_endpoint import JUNK, chat_endpoint
from hf_cnllm.data.conversations import encode_conversations, read_conversations, reply_end_ids
from hf_cnllm.data.synthetic.chat_models import Endpoint, Failure, Local, Reply
from hf_cnllm.data.synthetic.journal import Journal, ModelGone
from hf_cnllm.data.synthetic.self_instruct import STYLES, Settings, run
from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint

from .replies import reply

FAULTS = ["500", "429", "stall", "dribble", "reset", *JUNK]
CUT = {"no gzip", "too short"}  # which the client takes for a broken connection
RESULTS = ("instructions.jsonl", "tasks.jsonl", "discarded.jsonl")


class Page:
    """A model whose replies are those of `replies`; its answers come last first."""

    name = "m"

    def __init__(self, most=None):
        self.asked, self.most = Counter(), most

    def answer(self, requests):
        for request in reversed(requests):
            if self.most is not None and sum(self.asked.values()) == self.most:
                raise KeyboardInterrupt
            self.asked[request.key] += 1
            text, finish = reply(request.prompt)
            yield request, Reply(text, finish != "length")

    def close(self):
        pass


def make(folder, model=None, tasks=20, **changes):
    most_failures = changes.pop("most_failures", 16)
    return run(Settings(output=folder, tasks=tasks, **changes), model or Page(), most_failures)


def results(folder):
    return {name: (folder / name).read_bytes() for name in RESULTS}


def rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_bytes().splitlines()]


def balances(folder, statistics, style="self-instruct"):
    """All that was found is taken or discarded; what one stage takes is what the next one finds."""
    discarded = rows(folder, "discarded.jsonl")
    for stage in ("replies", "instructions", "instances", "tasks"):
        counts = statistics[stage]
        assert counts["found"] == counts["kept"] + sum(counts["discarded"].values())
        assert Counter(row["reason"] for row in discarded if row["stage"] == stage) == counts["discarded"]
    asked = statistics["requests"]
    read = [counts for stage, counts in asked.items() if stage != "classification"]
    assert sum(counts["asked"] for counts in read) == statistics["replies"]["found"]
    for counts in asked.values():
        given_up = sum(number for name, number in counts.items() if name.startswith("given_up_"))
        assert counts["asked"] == counts["answered"] + given_up
    assert statistics["instructions"]["kept"] == statistics["tasks"]["found"]
    tasks = rows(folder, "tasks.jsonl")
    taken = [one for task in tasks for one in task["instances"]]
    assert len(tasks) == statistics["tasks"]["kept"]
    assert len(taken) == statistics["instances"]["kept"] == len(rows(folder, "instructions.jsonl"))
    assert json.loads((folder / "statistics.json").read_text()) == statistics


def test_every_reply_is_on_the_disk_before_the_next_one_is_asked_for(tmp_path, fsync):
    class Watching(Page):
        def answer(self, requests):
            for number, answer in enumerate(super().answer(requests), start=len(fsync)):
                yield answer
                lines = (tmp_path / "out" / "journal.jsonl").read_bytes().splitlines(keepends=True)
                assert len(fsync) == number + 1 and lines[-1].endswith(b"\n")

    make(tmp_path / "out", Watching(), tasks=1)
    assert fsync


@pytest.mark.parametrize("style", STYLES)
def test_fine_tuning_reads_the_result(tmp_path, style):
    statistics = make(tmp_path / "out", style=style)
    balances(tmp_path / "out", statistics)
    assert statistics["enough"] and statistics["tasks"]["kept"] > 10
    assert {"similar", "forbidden_word", "too_short"} <= statistics["instructions"]["discarded"].keys()
    made = read_conversations(tmp_path / "out" / "instructions.jsonl")
    first = rows(tmp_path / "out", "instructions.jsonl")[0]
    question = "\n".join(filter(None, (first["instruction"], first["input"])))
    assert made[0]["messages"] == [
        {"role": "user", "content": question},
        {"role": "assistant", "content": first["output"]},
    ]


@pytest.mark.parametrize("style", STYLES)
def test_nothing_is_lost_on_an_endpoint_that_fails_stalls_and_says_junk(tmp_path, style):
    """Half of all requests go wrong; the result is that of an endpoint that never fails."""
    make(tmp_path / "good", style=style)
    with (
        chat_endpoint(reply, FAULTS, share=0.5) as chat,
        closing(Endpoint("m", chat.url, timeout=0.5, retries=0)) as model,
    ):
        model.deadline = 1
        statistics = make(tmp_path / "bad", model, style=style, attempts=50, most_failures=100)
    assert results(tmp_path / "bad") == results(tmp_path / "good")
    balances(tmp_path / "bad", statistics)
    failed = Counter()
    for counts in statistics["requests"].values():
        failed.update({name: number for name, number in counts.items() if name.startswith("failed_")})
    late = failed.pop("failed_timeout", 0)  # on a busy machine, a good reply may be so too
    assert late >= chat.seen["stall"] + chat.seen["dribble"]
    junk = sum(chat.seen[fault] for fault in JUNK.keys() - CUT)
    cut = sum(chat.seen[fault] for fault in ("reset", *CUT))
    expected = {"http_500": chat.seen["500"], "http_429": chat.seen["429"], "connection": cut, "junk": junk}
    assert failed == Counter({f"failed_{reason}": number for reason, number in expected.items()})
    answered = [row["key"] for row in rows(tmp_path / "bad", "journal.jsonl") if "reply" in row]
    assert len(answered) == len(set(answered)), "no reply is there twice"


def test_requests_that_are_given_up_are_counted(tmp_path):
    with (
        chat_endpoint(reply, ["500", "no json"], share=0.4) as chat,
        closing(Endpoint("m", chat.url, retries=0)) as model,
    ):
        statistics = make(tmp_path / "out", model, attempts=1, most_failures=100)
    balances(tmp_path / "out", statistics)
    assert {"no_answer_http_500", "no_answer_junk"} <= statistics["replies"]["discarded"].keys()


def test_what_the_endpoint_is_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with chat_endpoint(reply) as chat, closing(Endpoint("qwen", chat.url)) as model:
        make(tmp_path / "out", model, tasks=1, temperature=0.7, top_p=0.5, batch=2, max_tokens=99)
    first, last = chat.requests[0], chat.requests[-1]
    assert first["authorization"] == "Bearer secret" and first["model"] == "qwen"
    assert (first["temperature"], first["top_p"], first["max_tokens"]) == (0.7, 0.5, 99)
    assert last["temperature"] == 0
    assert b"secret" not in b"".join(path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_the_prompts_hold_six_seeds_and_two_of_the_model_s_own(tmp_path):
    asked = {}

    class Listening(Page):
        def answer(self, requests):
            asked.update({request.key: request.prompt for request in requests})
            return super().answer(requests)

    make(tmp_path / "out", Listening(), languages=("en",), tasks=40)
    seeds = {json.loads(line)["instruction"] for line in Settings(tmp_path).seeds.read_bytes().splitlines()}
    listed = [
        [line.partition(". ")[2] for line in prompt.splitlines() if line[:1].isdigit()]
        for key, prompt in asked.items()
        if key.startswith("instructions/")
    ]
    assert [sum(task in seeds for task in tasks) for tasks in listed] == [8] * 4 + [6] * (len(listed) - 4)
    assert all(len(tasks) == 8 for tasks in listed) and len(listed) > 4


# ---- interrupted ----


def test_a_journal_cut_anywhere_leads_to_the_same_result(tmp_path):
    make(tmp_path / "whole", tasks=8)
    written = (tmp_path / "whole" / "journal.jsonl").read_bytes()
    lines = written.splitlines(keepends=True)
    cuts = [
        sum(map(len, lines[:number])) + extra
        for number in range(0, len(lines), 4)
        for extra in (0, 1, len(lines[number]) - 1)
    ]
    for cut in cuts:
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "run.json").write_bytes((tmp_path / "whole" / "run.json").read_bytes())
        (folder / "journal.jsonl").write_bytes(written[:cut])
        model = Page()
        make(folder, model, tasks=8)
        assert results(folder) == results(tmp_path / "whole")
        assert sum(model.asked.values()) == len(lines) - written[:cut].count(b"\n"), (
            "what is answered is not asked again"
        )
        assert Counter((folder / "journal.jsonl").read_bytes().splitlines()) == Counter(written.splitlines())


def test_an_interrupted_run_goes_on(tmp_path):
    make(tmp_path / "whole")
    for _ in range(50):
        try:
            make(tmp_path / "out", Page(most=5))
        except KeyboardInterrupt:
            assert not (tmp_path / "out" / "statistics.json").exists()
        else:
            break
    assert results(tmp_path / "out") == results(tmp_path / "whole")
    assert (tmp_path / "out" / "statistics.json").read_bytes() == (tmp_path / "whole" / "statistics.json").read_bytes()


def test_more_tasks_go_on_behind_the_end(tmp_path):
    make(tmp_path / "whole", tasks=60)
    make(tmp_path / "out", tasks=10)
    model = Page()
    make(tmp_path / "out", model, tasks=60)
    assert results(tmp_path / "out") == results(tmp_path / "whole")
    assert "instructions/0" not in model.asked
    make(tmp_path / "out", Page(most=0), tasks=60)


@pytest.mark.slow
@pytest.mark.parametrize("after", [1, 30])
def test_a_killed_run_goes_on(tmp_path, after):
    make(tmp_path / "whole")
    with chat_endpoint(reply, ["500", "no json", "reset"], share=0.3) as chat:
        command = [sys.executable, "-m", "hf_cnllm.recipes.self_instruct", "--model", "m", "--base-url", chat.url]
        command += ["--output", str(tmp_path / "out"), "--tasks", "20", "--attempts", "50", "--retries", "0"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        with subprocess.Popen(
            command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=environment
        ) as process:
            chat.wait_for_requests(after)
            process.send_signal(signal.SIGKILL)
        before = Counter((tmp_path / "out" / "journal.jsonl").read_bytes().splitlines())
        with closing(Endpoint("m", chat.url, retries=0)) as model:
            make(tmp_path / "out", model, attempts=50)
    assert process.returncode == -signal.SIGKILL
    assert results(tmp_path / "out") == results(tmp_path / "whole")
    lines = Counter((tmp_path / "out" / "journal.jsonl").read_bytes().splitlines())
    replies = [json.loads(line)["key"] for line in lines if b'"reply"' in line]
    assert len(replies) == len(set(replies)) and len(before - lines) <= 1, "half a line at most"


# ---- what cannot be ----


@pytest.mark.parametrize(
    ("faults", "message"),
    [(["stall"], "timeout"), (["500"], "http_500"), (["reset"], "connection"), (["page"], "junk")],
)
def test_an_endpoint_that_is_down_ends_the_run_and_the_next_one_goes_on(tmp_path, faults, message):
    timeout = 0.3 if faults == ["stall"] else 60
    with chat_endpoint(reply, faults, share=1.0) as chat:
        with (
            closing(Endpoint("m", chat.url, timeout=timeout, retries=0)) as model,
            pytest.raises(ModelGone, match=rf"no answer 5 times in a row, at last: {message} .* go on"),
        ):
            make(tmp_path / "out", model, most_failures=5)
        chat.share = 0.0
        with closing(Endpoint("m", chat.url)) as model:
            make(tmp_path / "out", model, most_failures=5)
    make(tmp_path / "whole")
    assert results(tmp_path / "out") == results(tmp_path / "whole")


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_a_wrong_key_or_name_is_one_error(tmp_path, status):
    with (
        chat_endpoint(reply, [status], share=1.0) as chat,
        closing(Endpoint("m", chat.url)) as model,
        pytest.raises(ValueError, match=r"refuses the model 'm'.*OPENAI_API_KEY"),
    ):
        make(tmp_path / "out", model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"style": "vicuna"}, "choose from self-instruct, alpaca"),
        ({"languages": ("fr",)}, "choose from zh, en"),
        ({"languages": ()}, "--languages must be at least 1"),
        ({"tasks": 0}, "--tasks must be at least 1"),
        ({"max_requests": 0}, "--max-requests must be at least 1"),
        ({"temperature": -1}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"top_p": float("nan")}, "--top-p"),
        ({"rouge": 0}, "--rouge"),
        ({"seeds": Path("nowhere.jsonl")}, "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_is_said_before_work_starts(tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        make(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_another_run_s_folder_is_refused(tmp_path):
    make(tmp_path / "out", tasks=1)
    with pytest.raises(ValueError, match="run with other rouge"):
        make(tmp_path / "out", tasks=1, rouge=0.5)
    other = Page(most=0)
    other.name = "another"
    with pytest.raises(ValueError, match="run with other model"):
        make(tmp_path / "out", other, tasks=1)


@pytest.mark.parametrize("content", ["", "{half", "[]", "\ufffd"])
def test_a_damaged_record_of_the_run_is_named(tmp_path, content):
    make(tmp_path / "out", tasks=1)
    (tmp_path / "out" / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run.json is damaged.*new folder"):
        make(tmp_path / "out", Page(most=0), tasks=1)


def test_a_journal_of_other_prompts_or_of_junk_is_refused(tmp_path):
    make(tmp_path / "out", tasks=1)
    path = tmp_path / "out" / "journal.jsonl"
    lines = path.read_text().splitlines()
    path.write_text(lines[0].replace('"prompt": "', '"prompt": "0') + "\n")
    with pytest.raises(ValueError, match="answers another prompt"):
        make(tmp_path / "out", tasks=1)
    path.write_text(f"{lines[0]}\n[]\n")
    with pytest.raises(ValueError, match="line 2: no entry of a journal"):
        make(tmp_path / "out", tasks=1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_error_and_the_next_run_goes_on(tmp_path, monkeypatch):
    opened = Journal.__init__

    def open_on_full_disk(self, path):
        opened(self, path)
        self._file = open("/dev/full", "ab")  # noqa: SIM115  as the journal's own

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "__init__", open_on_full_disk)
        with pytest.raises(OSError, match=r"writing into .*out failed, is the disk full\?"):
            make(tmp_path / "out")
    make(tmp_path / "out")
    make(tmp_path / "whole")
    assert results(tmp_path / "out") == results(tmp_path / "whole")


def test_a_model_that_says_nothing_of_use_comes_to_an_end(tmp_path):
    class Mute(Page):
        def answer(self, requests):
            yield from ((request, Failure("timeout") if "3" in request.key else Reply("…")) for request in requests)

    statistics = make(tmp_path / "out", Mute(), max_requests=6)
    balances(tmp_path / "out", statistics)
    assert not statistics["enough"] and statistics["replies"]["discarded"] == {
        "no_answer_timeout": 1,
        "nothing_in_it": 5,
    }


# ---- on a model of the demo ----


@pytest.mark.parametrize("style", STYLES)
def test_a_model_of_the_demo_is_asked_through_a_pipeline(tmp_path, style):
    write_tiny_checkpoint("qwen", tmp_path / "model")
    model = Local(str(tmp_path / "model"))
    statistics = make(tmp_path / "out", model, style=style, max_requests=3, max_tokens=24)
    balances(tmp_path / "out", statistics)
    assert statistics["requests"]["instructions"] == {"asked": 3, "answered": 3}
    written = (tmp_path / "out" / "journal.jsonl").read_bytes()
    assert len({json.loads(line)["reply"] for line in written.splitlines()}) == 3
    (tmp_path / "out" / "journal.jsonl").write_bytes(b"".join(written.splitlines(keepends=True)[:2]))
    make(tmp_path / "out", model, style=style, max_requests=3, max_tokens=24)
    assert (tmp_path / "out" / "journal.jsonl").read_bytes() == written, "a reply does not depend on those before"


@pytest.mark.slow
def test_a_model_of_the_demo_that_learned_the_replies_makes_the_same_data(tmp_path):
    """Random weights say nothing of use. These have learned what a teacher replied to the same prompts."""
    seeds = [
        {"instruction": "Name a river of Asia", "instances": [{"output": "Mekong"}], "is_classification": False},
        {
            "instruction": "Is it sweet or sour?",
            "instances": [{"input": "lemon", "output": "sour"}],
            "is_classification": True,
        },
    ]
    (tmp_path / "seeds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in seeds))
    replies = {
        "instructions": "3. Compare tea and coffee in one sentence\n4. Draw a map of the town\n5. Is the animal wild or tame?",
        "classification": "No",
        "instances": "Example 1\nInput: today\nOutput: It is a fine day.",
    }

    class Teacher(Page):
        def answer(self, requests):
            for request in requests:
                text = replies[request.key.partition("/")[0]]
                messages = [{"role": "user", "content": request.prompt}, {"role": "assistant", "content": text}]
                learned.append({"messages": messages})
                yield request, Reply(text)

    learned = []
    options = {
        "seeds": tmp_path / "seeds.jsonl",
        "languages": ("en",),
        "max_requests": 1,
        "max_tokens": 96,
        "temperature": 0,
    }
    make(tmp_path / "taught", Teacher(), **options)
    write_tiny_checkpoint("baichuan", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    examples, _ = encode_conversations(tokenizer, learned, reply_end_ids(tokenizer, model.generation_config))
    batch = DataCollatorForSeq2Seq(tokenizer)(examples)
    optimizer, loss = torch.optim.AdamW(model.parameters(), lr=2e-3), torch.inf
    for _ in range(60):
        if loss < 0.03:
            break
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "model")
    statistics = make(tmp_path / "out", Local(str(tmp_path / "model")), **options)
    balances(tmp_path / "out", statistics)
    assert statistics["tasks"]["kept"] == 2 and statistics["instructions"]["discarded"] == {"forbidden_word": 1}
    assert results(tmp_path / "out") == results(tmp_path / "taught")
