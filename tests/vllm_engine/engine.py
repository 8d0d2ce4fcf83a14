"""vLLM engines for the tests: small, in this process, and gone afterwards."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_engine.checkpoints import LONGEST, NEW_TOKENS

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@contextmanager
def engine(folder: Any, **options: Any) -> Iterator[Any]:
    """A `vllm.LLM`, in fp32, without a tokenizer and with nothing compiled unless `options` say so."""
    from vllm import LLM

    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_model_len": LONGEST,
        "max_num_seqs": 8,
        **options,
    }
    llm = LLM(str(folder), **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def continued(llm: Any, prompts: list[list[int]], **options: Any) -> tuple[list[list[int]], int]:
    """What vLLM goes on with greedily, all prompts in one batch, and how many of their tokens came out of its cache."""
    from vllm import SamplingParams

    greedily = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], greedily, use_tqdm=False, **options)
    return [list(o.outputs[0].token_ids) for o in outputs], sum(o.num_cached_tokens or 0 for o in outputs)
