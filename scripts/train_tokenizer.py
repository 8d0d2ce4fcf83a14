"""`python scripts/train_tokenizer.py …`, in a clone, is `python -m hf_cnllm.recipes.train_tokenizer …`."""

import runpy

runpy.run_module("hf_cnllm.recipes.train_tokenizer", run_name="__main__", alter_sys=True)
