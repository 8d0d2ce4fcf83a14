"""Tiny files of C-Eval, CMMLU, MMLU and GSM8K in the layouts in which their authors publish them."""

import csv
import json
from pathlib import Path

# benchmark -> the split that is asked about
BENCHMARKS = {"ceval": "val", "cmmlu": "test", "mmlu": "test", "gsm8k": "test"}
SUBJECT = {
    "ceval": {"subject": "law", "title": "法学"},
    "cmmlu": {"subject": "college_law", "title": "大学法律"},
    "mmlu": {"subject": "professional_law"},
    "gsm8k": {},
}
COLUMNS = {
    "ceval": {"dev": "id,question,A,B,C,D,answer,explanation", "val": "id,question,A,B,C,D,answer"},
    "cmmlu": dict.fromkeys(("dev", "test"), ",Question,A,B,C,D,Answer"),
    "mmlu": dict.fromkeys(("dev", "test"), None),
}
QUESTIONS = 6


def question(split: str, number: int) -> str:
    return f'{split} {number}, “引号”, "a, b"\nsecond line'


def write_benchmark(benchmark: str, data: Path, subject: str | None = None) -> Path:
    """Writes a subject's files below `data`; returns that of the split that is asked about."""
    if benchmark == "gsm8k":
        for split in ("train", "test"):
            rows = [{"question": question(split, n), "answer": f"So {n} + 1.\n#### {n + 1}"} for n in range(QUESTIONS)]
            path = data / benchmark / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path
    subject = subject or SUBJECT[benchmark]["subject"]
    for split, header in COLUMNS[benchmark].items():
        path = data / benchmark / split / (f"{subject}.csv" if benchmark == "cmmlu" else f"{subject}_{split}.csv")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            lines = csv.writer(file)
            if header:
                lines.writerow(header.split(","))
            for number in range(QUESTIONS):
                cells = [question(split, number), "1", "2", "3", "None", "ABCD"[number % 4]]
                numbered = [] if header is None else [number]
                lines.writerow([*numbered, *cells, *["因为"] * (split == "dev" and benchmark == "ceval")])
    return path
