"""`python scripts/kto.py …`, in a clone, is `python -m hf_cnllm.recipes.kto …`."""

import runpy

runpy.run_module("hf_cnllm.recipes.kto", run_name="__main__", alter_sys=True)
