"""`python scripts/prepare_corpus.py …`, in a clone, is `python -m hf_cnllm.recipes.prepare_corpus …`."""

import runpy

if __name__ == "__main__":  # workers import this file
    runpy.run_module("hf_cnllm.recipes.prepare_corpus", run_name="__main__", alter_sys=True)
