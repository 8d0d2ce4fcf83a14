"""`python scripts/grpo.py …`, in a clone, is `python -m hf_cnllm.recipes.grpo …`."""

import runpy

runpy.run_module("hf_cnllm.recipes.grpo", run_name="__main__", alter_sys=True)
