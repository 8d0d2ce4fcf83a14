"""Checkpoints of these families as ones of architectures that every engine has, and back: `hf-cnllm export`.

`roads` says what becomes what, `weights` streams the tensors, `vocabulary` writes the tokenizer, `adapters` turns LoRA.
`glm130b` merges the files that GLM-130B was released in: `hf-cnllm convert`.
"""
