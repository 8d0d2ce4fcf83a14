"""`python scripts/sft.py …`, in a clone, is `python -m hf_cnllm.recipes.sft …`."""

import runpy

runpy.run_module("hf_cnllm.recipes.sft", run_name="__main__", alter_sys=True)
