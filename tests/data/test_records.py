"""Records of compressed files and of Parquet: what lines and rows give, and what damage leaves."""

import datetime
import os
from collections import Counter

import pytest

from hf_cnllm.data.records import plan_shards, read_piece, read_texts

pa = pytest.importorskip("pyarrow", reason="needs the extra data")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra data")


def records_of(path, shard_bytes=1 << 26, limit=1 << 20):
    shards = plan_shards([path], shard_bytes)
    return [found for shard in shards for piece in shard.pieces for found in read_piece(piece, limit)]


def write_zst(path, content: bytes):
    with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as stream:
        stream.write(content)
    return path


def write_parquet(path, columns, **options):
    parquet.write_table(pa.table(columns), path, **options)
    return path


def test_zst_is_read_like_plain_files(tmp_path):
    content = '{"id": 1, "text": "一"}\nno json\n{"text": "二"}\n'.encode()
    packed, plain = write_zst(tmp_path / "a.jsonl.zst", content), tmp_path / "a.jsonl"
    plain.write_bytes(content)
    found = records_of(packed)
    assert found[:2] == [{"id": 1, "text": "一"}, "skipped_not_json"]
    assert [found[2]["text"], records_of(plain)[2]["id"]] == ["二", found[2]["id"].replace(".zst", "")]
    packed.write_bytes(packed.read_bytes() * 2)  # frames one after the other, as parallel compressors write them
    assert len(records_of(packed, shard_bytes=10)) == 6
    assert [
        found["text"] for found in records_of(write_zst(tmp_path / "b.txt.zst", b"one\n\ntwo")) if "text" in found
    ] == [
        "one",
        "two",
    ]


def test_zst_that_is_cut_or_none(tmp_path):
    whole = write_zst(tmp_path / "a.txt.zst", b"".join(os.urandom(20).hex().encode() + b"\n" for _ in range(20_000)))
    cut = tmp_path / "cut.txt.zst"
    cut.write_bytes(whole.read_bytes()[:-100_000])
    *found, last = records_of(cut)
    assert last == f"cut_short:{cut}" and found == [
        {**record, "id": record["id"].replace("a.txt", "cut.txt")} for record in records_of(whole)[: len(found)]
    ]
    assert len(found) > 5000
    cut.write_bytes(b"no zst")
    assert records_of(cut) == [f"damaged:{cut}"]


def test_rows_of_parquet(tmp_path):
    columns = {
        "text": [f"文本{i}" for i in range(100)],
        "id": [None, *range(1, 100)],
        "date": [datetime.date(2020, 1, 1)] * 100,
        "score": [float("nan"), *[0.5] * 99],
    }
    path = write_parquet(tmp_path / "a.parquet", columns, row_group_size=9)
    found = records_of(path)
    assert found[0] == {"id": f"{path}:0", "text": "文本0", "date": "2020-01-01", "score": None}
    assert found[99] == {"text": "文本99", "id": 99, "date": "2020-01-01", "score": 0.5}
    assert len(plan_shards([path], 500)) > 5
    for shard_bytes in (50, 500, 2000):
        assert records_of(path, shard_bytes) == found, "every row once, whatever the pieces"


def test_rows_that_are_no_records(tmp_path):
    text = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff\xfe"]).buffers())
    assert records_of(write_parquet(tmp_path / "a.parquet", {"text": text}))[1] == "skipped_undecodable"
    rows = {"text": ["x" * 11, " ", None], "id": [1, 2, 3]}
    found = records_of(write_parquet(tmp_path / "b.parquet", rows), limit=10)
    assert found == ["skipped_too_long", "skipped_blank", "skipped_without_text"]
    assert records_of(write_parquet(tmp_path / "c.parquet", {"text": [b"bytes"]})) == ["skipped_not_json"]
    assert records_of(write_parquet(tmp_path / "d.parquet", {"x": [1]})) == ["skipped_without_text"]
    assert records_of(write_parquet(tmp_path / "e.parquet", {})) == []


@pytest.mark.parametrize("content", [b"", b"PAR1 none", None])
def test_damaged_parquet_is_named(tmp_path, content):
    path = write_parquet(tmp_path / "a.parquet", {"text": ["x"] * 100})
    path.write_bytes(path.read_bytes()[:-20] if content is None else content)
    assert records_of(path) == [f"damaged:{path}"]


def test_a_file_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    (shard,) = plan_shards([tmp_path / "a.jsonl"])
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(FileNotFoundError):
        list(read_piece(shard.pieces[0]))


def test_what_is_no_text_is_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes("好\n\n".encode() + "题\n题\n".encode("gb18030"))
    skipped = Counter()
    assert list(read_texts([tmp_path], skipped)) == list(read_texts([tmp_path])) == ["好"]
    assert skipped == {"blank": 1, "undecodable": 2}
