"""C-Eval, CMMLU, MMLU and GSM8K in lm_eval, from files: the prompts, all subjects, and a run on a model."""

import json
import sys

import pytest
import yaml

from benchmark_files import BENCHMARKS, write_benchmark
from hf_cnllm.cli import main
from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint
from hf_cnllm.evaluation import TASKS

pytest.importorskip("lm_eval")

from lm_eval.tasks import TaskManager

SUBJECTS = {"ceval": 52, "cmmlu": 67, "mmlu": 57, "gsm8k": 1}
ONE = {
    "ceval": ("law", "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n", "", "\n答案：", ""),
    "cmmlu": ("college_law", "以下是关于大学法律的单项选择题，请直接给出正确答案的选项。\n\n", "题目：", "\n答案是：", ""),
    "mmlu": ("professional_law", "The following are multiple choice questions (with answers) about professional law.\n\n", "", "\nAnswer:", " "),
}  # fmt: skip


def subjects_of(benchmark):
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    groups = yaml.load((TASKS / f"{benchmark}.yaml").read_text(encoding="utf-8"), Loader)["task"]
    return [task["task"] for group in groups for task in group["task"]]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    for benchmark in ONE:
        for subject in subjects_of(benchmark):
            write_benchmark(benchmark, folder, subject)
    write_benchmark("gsm8k", folder)
    return folder


@pytest.fixture(scope="module")
def tasks(data):
    """Benchmark -> name -> task."""
    manager = TaskManager(include_path=str(TASKS), metadata={"data": str(data)})
    loaded = {benchmark: manager.load([f"{benchmark}_local"])["tasks"] for benchmark in BENCHMARKS}
    return {
        benchmark: {name.split("::")[-1]: task for name, task in found.items()} for benchmark, found in loaded.items()
    }


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_subject_is_there(benchmark, tasks):
    assert len(tasks[benchmark]) == SUBJECTS[benchmark]
    assert all(len(task.eval_docs) == 6 and task.config.num_fewshot == 5 for task in tasks[benchmark].values())


@pytest.mark.parametrize("benchmark", ONE)
def test_the_prompt_is_the_authors(benchmark, tasks):
    subject, description, before, answer, space = ONE[benchmark]
    task = tasks[benchmark][subject]

    def example(split, number):
        text = f'{before}{split} {number}, “引号”, "a, b"\nsecond line'
        return f"{text}\nA. 1\nB. 2\nC. 3\nD. None{answer}"

    shots = [f"{example('dev', number)}{space}{'ABCDA'[number]}\n\n" for number in range(5)]
    asked = task.eval_docs[1]
    assert task.fewshot_context(asked, num_fewshot=5) == description + "".join(shots) + example(
        BENCHMARKS[benchmark], 1
    )
    requests = task.construct_requests(asked, "?", metadata=(subject, 1, 1))
    assert [request.args for request in requests] == [("?", space + letter) for letter in "ABCD"]
    results = [(-3.0, False), (-1.0, True), (-2.0, False), (-4.0, False)]
    assert task.process_results(asked, results)["acc"] == 1.0


def test_gsm8k_asks_as_lm_eval_does(tasks):
    (task,) = tasks["gsm8k"].values()
    task.set_fewshot_seed(0)
    context = task.fewshot_context(task.eval_docs[1], num_fewshot=5)
    assert context.startswith("Question: train ") and context.count("\n#### ") == 5
    assert context.endswith('Question: test 1, “引号”, "a, b"\nsecond line\nAnswer:')


@pytest.mark.parametrize(
    "benchmark", ["ceval", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mmlu", "gsm8k"))]
)
def test_a_model_is_scored(benchmark, data, tmp_path, monkeypatch):
    write_tiny_checkpoint("baichuan", tmp_path / "checkpoint")
    monkeypatch.setattr(sys, "argv", [])
    words = ["--model", "hf", "--model_args", f"pretrained={tmp_path / 'checkpoint'},max_length=512"]
    words += [
        "--tasks",
        f"{benchmark}_local",
        "--include_path",
        "hf_cnllm",
        "--metadata",
        json.dumps({"data": str(data)}),
    ]
    words += ["--device", "cpu", "--limit", "4", "--num_fewshot", "1", "--output_path", str(tmp_path / "out")]
    assert not main(["run", "lm_eval", *words])
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text(encoding="utf-8"))
    whole = results["groups"][f"{benchmark}_local"]
    if benchmark == "gsm8k":
        assert whole["exact_match,strict-match"] == 0.0
        return
    subjects = [row["acc,none"] for name, row in results["results"].items() if name.count("::") > 1]
    assert len(subjects) == SUBJECTS[benchmark] and 0 < whole["acc,none"] < 1
    assert whole["acc,none"] == pytest.approx(sum(subjects) / len(subjects))
