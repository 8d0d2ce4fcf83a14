"""transformers' pipelines, whole batches at a time."""

import pytest
import torch
from transformers import pipeline

import hf_cnllm  # noqa: F401
from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint

TEXTS = ["你好", "天空为什么是蓝色的？今天天气怎么样？", "Hello"]
CHATS = [[{"role": "user", "content": text}] for text in TEXTS]


@pytest.mark.parametrize("family", ["chatglm", "chatglm2", "baichuan", "qwen"])
def test_a_batch_is_answered_as_its_texts_alone(family, tmp_path):
    write_tiny_checkpoint(family, tmp_path / family)
    pipe = pipeline("text-generation", model=str(tmp_path / family), dtype=torch.float32)
    pipe.tokenizer.padding_side = "left"
    pipe.tokenizer.pad_token = pipe.tokenizer.pad_token or pipe.tokenizer.eos_token
    pipe.model.generation_config.suppress_tokens = [*range(len(pipe.tokenizer), pipe.model.config.vocab_size)]
    for inputs in (TEXTS, CHATS):
        options = {"max_new_tokens": 4, "do_sample": False, "return_tensors": True}
        alone = [pipe([one], **options)[0][0]["generated_token_ids"][-4:] for one in inputs]
        together = pipe(inputs, batch_size=3, **options)
        assert [answer[0]["generated_token_ids"][-4:] for answer in together] == alone
