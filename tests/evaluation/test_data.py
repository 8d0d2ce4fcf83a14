"""Files of C-Eval, CMMLU, MMLU and GSM8K in the layouts of their authors, and what is wrong with them."""

import pytest

from benchmark_files import BENCHMARKS, SUBJECT, write_benchmark
from hf_cnllm.evaluation.data import read_ceval, read_cmmlu, read_gsm8k, read_mmlu


def read(benchmark, data):
    readers = {"ceval": read_ceval, "cmmlu": read_cmmlu, "mmlu": read_mmlu, "gsm8k": read_gsm8k}
    # What lm_eval passes on beside: the model's arguments and its own.
    return readers[benchmark](**SUBJECT[benchmark], data=str(data), pretrained="x", config_source="y")


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_questions_are_read(benchmark, tmp_path):
    write_benchmark(benchmark, tmp_path)
    splits = read(benchmark, tmp_path)
    asked = splits[BENCHMARKS[benchmark]]
    assert asked["question"][1] == f'{BENCHMARKS[benchmark]} 1, “引号”, "a, b"\nsecond line'
    if benchmark == "gsm8k":
        assert asked["answer"] == [f"So {n} + 1.\n#### {n + 1}" for n in range(6)]
        return
    assert asked["answer"] == ["A", "B", "C", "D", "A", "B"] and asked["D"][0] == "None"
    assert {*asked["title"]} == {SUBJECT[benchmark].get("title", "professional law")}
    assert len(splits["dev"]) == 6 and splits["dev"]["question"][0].startswith("dev 0")


@pytest.mark.parametrize("benchmark", BENCHMARKS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "is missing: `data` must be the folder"),
        (lambda path: path.write_text(""), "holds no question"),
        (lambda path: path.write_bytes(path.read_bytes() + "题".encode("gbk")), "is not UTF-8"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "line "),
    ],
    ids=["missing", "empty", "encoding", "cut"],
)
def test_files_that_are_wrong_are_named(benchmark, change, message, tmp_path):
    path = write_benchmark(benchmark, tmp_path)
    change(path)
    with pytest.raises(ValueError, match=message) as error:
        read(benchmark, tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_no_folder_is_answered_with_the_option(benchmark):
    with pytest.raises(ValueError, match="--metadata"):
        read(benchmark, "")


def test_an_answer_is_a_letter(tmp_path):
    path = write_benchmark("mmlu", tmp_path)
    path.write_text(path.read_text(encoding="utf-8") + "q,1,2,3,4,E\n", encoding="utf-8")
    with pytest.raises(ValueError, match="the answer 'E', which is none of A, B, C, D"):
        read("mmlu", tmp_path)


@pytest.mark.parametrize(
    ("benchmark", "line", "message"),
    [
        ("mmlu", "one, two,A,B,C,D,A,D", "more cells than there are columns"),
        ("gsm8k", '{"question": null, "answer": 3}', "expected"),
    ],
)
def test_a_line_of_another_form_is_named(benchmark, line, message, tmp_path):
    path = write_benchmark(benchmark, tmp_path)
    path.write_text(path.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"line \d+.*{message}"):
        read(benchmark, tmp_path)
