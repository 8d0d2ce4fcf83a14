"""`python scripts/judge.py …`, in a clone, is `python -m hf_cnllm.recipes.judge …`."""

import runpy

runpy.run_module("hf_cnllm.recipes.judge", run_name="__main__", alter_sys=True)
