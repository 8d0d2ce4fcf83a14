"""`python scripts/rloo.py …`, in a clone, is `python -m hf_cnllm.recipes.rloo …`."""

import runpy

runpy.run_module("hf_cnllm.recipes.rloo", run_name="__main__", alter_sys=True)
