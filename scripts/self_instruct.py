"""`python scripts/self_instruct.py …`, in a clone, is `python -m hf_cnllm.recipes.self_instruct …`."""

import runpy

runpy.run_module("hf_cnllm.recipes.self_instruct", run_name="__main__", alter_sys=True)
