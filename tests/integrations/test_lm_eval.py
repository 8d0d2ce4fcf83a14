"""`hf-cnllm run lm_eval` on a task of its own, offline: the log-probabilities and answers are the model's."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cnllm.cli import main
from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint

pytest.importorskip("lm_eval")

ROWS = [
    {"question": "一加一等于", "choices": ["二", "七"], "answer": 0},
    {"question": "天空是", "choices": ["红色的", "蓝色的"], "answer": 1},
]
# lm_eval reads JSON as YAML.
TASKS = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "tiny_answer": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def evaluated(folder, tmp_path, monkeypatch) -> dict[str, list[dict]]:
    """Task -> lm_eval's record of each row, in order."""
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, **shared, **task}))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", [])
    words = ["--model", "hf", "--model_args", f"pretrained={folder}", "--tasks", ",".join(TASKS)]
    words += [
        "--device",
        "cpu",
        "--include_path",
        str(tmp_path),
        "--output_path",
        str(tmp_path / "out"),
        "--log_samples",
    ]
    assert not main(["run", "lm_eval", *words])
    records = {}
    for name in TASKS:
        (path,) = (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
        records[name] = sorted(map(json.loads, path.read_text().splitlines()), key=lambda record: record["doc_id"])
    return records


@pytest.mark.parametrize(
    "checkpoint",
    ["chatglm3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("baichuan", "qwen", "chatglm2"))],
)
def test_lm_eval(checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint"
    write_tiny_checkpoint(checkpoint, folder, seed=1)
    (folder / "generation_config.json").unlink(missing_ok=True)  # its max_new_tokens would go before lm_eval's limit
    records = evaluated(folder, tmp_path, monkeypatch)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    for row, choice, answer in zip(ROWS, records["tiny_choice"], records["tiny_answer"], strict=True):
        prompt = tokenizer(row["question"], return_tensors="pt")
        length = prompt["input_ids"].shape[1]
        scores = []
        for ending, ((found, _),) in zip(row["choices"], choice["resps"], strict=True):
            ids = tokenizer(row["question"] + ending, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                log_probs = model(ids).logits[0, length - 1 : -1].float().log_softmax(-1)
            scores.append(log_probs.gather(-1, ids[0, length:, None]).sum().item())
            assert float(found) == pytest.approx(scores[-1], abs=1e-3)
        assert choice["acc"] == float(scores.index(max(scores)) == row["answer"])
        output = model.generate(**prompt, max_new_tokens=6, do_sample=False)
        assert answer["resps"] == [[tokenizer.decode(output[0, length:], skip_special_tokens=True)]]
