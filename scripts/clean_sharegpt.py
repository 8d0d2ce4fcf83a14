"""`python scripts/clean_sharegpt.py …`, in a clone, is `python -m hf_cnllm.recipes.clean_sharegpt …`."""

import runpy

runpy.run_module("hf_cnllm.recipes.clean_sharegpt", run_name="__main__", alter_sys=True)
