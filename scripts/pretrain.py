"""`python scripts/pretrain.py …`, in a clone, is `python -m hf_cnllm.recipes.pretrain …`."""

import runpy

runpy.run_module("hf_cnllm.recipes.pretrain", run_name="__main__", alter_sys=True)
