"""The benchmark: every family beside transformers' Llama of equal shape, on this machine, in one interleaved run.

What is measured is a table (`tasks.MODEL_TASKS` and `start_up`), and so is what it is measured on (`subjects.SUBJECTS`).
"""
