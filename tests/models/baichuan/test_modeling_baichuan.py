"""Baichuan against the original's numbers, and the features of the Hugging Face stack on both of its architectures."""

import pytest
import torch
from goldens import BACKENDS, GOLDENS, assert_close, cases_of, check_case, golden_cases
from transformers import AutoModelForCausalLM

from hf_cnllm.attention.alibi import alibi_slopes


CHECKPOINTS = ("baichuan_7b", "baichuan_13b", "baichuan2_7b", "baichuan2_13b")
SPECIAL_CASES = ("alibi", "normhead_eval", "normhead_eval_train_eval")


def load(name: str, backend: str = "sdpa", **overrides):
    return AutoModelForCausalLM.from_pretrained(GOLDENS / name, attn_implementation=backend, **overrides)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", golden_cases(*CHECKPOINTS, skip=SPECIAL_CASES))
def test_golden(case, backend):
    check_case(load(case.golden, backend, **case.config_overrides), case)
