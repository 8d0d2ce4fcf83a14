"""`python scripts/rejection_sampling.py …`, in a clone, is `python -m hf_cnllm.recipes.rejection_sampling …`."""

import runpy

runpy.run_module("hf_cnllm.recipes.rejection_sampling", run_name="__main__", alter_sys=True)
