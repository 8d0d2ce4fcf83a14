"""Baichuan, GLM/ChatGLM and Qwen v1 on today's Transformers."""
