"""Training scripts to run as they are, `python -m hf_cnllm.recipes.NAME`, or to copy and change."""
