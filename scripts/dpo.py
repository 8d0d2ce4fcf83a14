"""`python scripts/dpo.py …`, in a clone, is `python -m hf_cnllm.recipes.dpo …`."""

import runpy

runpy.run_module("hf_cnllm.recipes.dpo", run_name="__main__", alter_sys=True)
