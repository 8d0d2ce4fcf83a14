"""Tasks of lm-evaluation-harness for C-Eval, CMMLU, MMLU and GSM8K whose data lies in a folder (docs/tools.md)."""

from pathlib import Path

TASKS = Path(__file__).parent / "tasks"
