"""`python scripts/reward.py …`, in a clone, is `python -m hf_cnllm.recipes.reward …`."""

import runpy

runpy.run_module("hf_cnllm.recipes.reward", run_name="__main__", alter_sys=True)
