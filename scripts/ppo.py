"""`python scripts/ppo.py …`, in a clone, is `python -m hf_cnllm.recipes.ppo …`."""

import runpy

runpy.run_module("hf_cnllm.recipes.ppo", run_name="__main__", alter_sys=True)
