"""`python scripts/pretrain_glm.py …`, in a clone, is `python -m hf_cnllm.recipes.pretrain_glm …`."""

import runpy

runpy.run_module("hf_cnllm.recipes.pretrain_glm", run_name="__main__", alter_sys=True)
