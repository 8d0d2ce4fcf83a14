"""Exports through llama.cpp's own converter and engine: its tokenizer's ids and its greedy tokens are transformers'.

`nox -s gguf` installs llama-cpp-python and says where llama.cpp's sources are.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from exportable import BAICHUAN2, IDS, Kind, write_checkpoint
from hf_cnllm.conversion.checkpoint import export_checkpoint
from tokenizer_goldens import TokenizerGolden

llama_cpp = pytest.importorskip("llama_cpp", reason="the lane `gguf` installs llama-cpp-python")
pytestmark = pytest.mark.slow

NEW_TOKENS = 24
LEAD = 0.1  # by which a taught token leads: many times what F16 is off by
TEXTS = ("白日依山尽，", "Hello world, how are you?\n", "for(int i=0;i<10;i++){\n\tsum+=a;\n}", "  x\n\n y")
# llama.cpp knows 13B, and so ALiBi, by its 40 layers; Qwen's way of cutting texts by a real vocabulary.
KINDS = {
    "baichuan": Kind("baichuan1_small", "baichuan-rope", "llama"),
    "baichuan2": Kind("baichuan2_small", "baichuan-rope", "llama", BAICHUAN2),
    "baichuan2-13b": Kind("baichuan2_small", "baichuan-alibi", "baichuan", BAICHUAN2 | {"num_hidden_layers": 40}),
    "qwen": Kind("qwen", "qwen", "qwen2", IDS),
    "chatglm2": Kind("chatglm2_small", "chatglm2", "llama", {"add_qkv_bias": True}),
    "chatglm3": Kind("chatglm3_small", "chatglm2", "llama", {"add_qkv_bias": True}),
}
# Whose recorded texts all have the original's ids, and whether that one reads special tokens from them: docs/serving.md.
RECORDED = {"baichuan2": True, "baichuan2-13b": True, "chatglm2": False, "chatglm3": False}
# What its converter leaves out of a `baichuan` file.
OVERRIDES = {"baichuan2-13b": {"tokenizer.ggml.add_space_prefix": False}}


def llama_cpp_folder(name):
    variable = "HF_CNLLM_LLAMA_CPP_FOR_BAICHUAN" if name == "baichuan2-13b" else "HF_CNLLM_LLAMA_CPP"
    if variable not in os.environ:
        pytest.skip(f"{variable} does not say where llama.cpp's sources are")
    return Path(os.environ[variable])


def teach(folder):
    """Some tokens behind each text, by heart: the choices of random weights lie closer together than half precision tells
    apart, those of a model that has learned something do not."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(0)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    answers = torch.randint(300, len(tokenizer) - 300, (len(TEXTS), NEW_TOKENS)).tolist()
    longest = max(map(len, prompts))
    rows = [ids + answer + [0] * (longest - len(ids)) for ids, answer in zip(prompts, answers, strict=True)]
    labels = torch.full((len(TEXTS), longest + NEW_TOKENS), -100)
    for row, ids, answer in zip(labels, prompts, answers, strict=True):
        row[len(ids) : len(ids) + NEW_TOKENS] = torch.tensor(answer)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        output = model(torch.tensor(rows), labels=labels)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        learned = labels[:, 1:] != -100
        scores, wanted = output.logits[:, :-1][learned].detach(), labels[:, 1:][learned][:, None]
        lead = (scores.gather(1, wanted) - scores.scatter(1, wanted, -torch.inf).amax(1, keepdim=True)).min()
        if lead > LEAD:
            break
    assert lead > LEAD
    model.half().save_pretrained(folder)


@pytest.mark.parametrize("precision", ["f32", "f16"])
@pytest.mark.parametrize("name", KINDS)
def test_the_tokens_of_transformers(name, precision, tmp_path):
    converter = llama_cpp_folder(name) / "convert_hf_to_gguf.py"
    kind = KINDS[name]._replace(dtype=torch.float16 if precision == "f16" else torch.float32)
    write_checkpoint(kind, tmp_path / "source", std=0.1)
    if precision == "f16":
        teach(tmp_path / "source")
    export_checkpoint(tmp_path / "source", tmp_path / "out", kind.target)
    words = [str(tmp_path / "out"), "--outfile", str(tmp_path / "model.gguf"), "--outtype", precision]
    subprocess.run([sys.executable, str(converter), *words], check=True, capture_output=True, timeout=600)
    cache = {"f32": llama_cpp.GGML_TYPE_F32, "f16": llama_cpp.GGML_TYPE_F16}[precision]
    options = {"n_ctx": 256, "n_threads": 1, "type_k": cache, "type_v": cache, "kv_overrides": OVERRIDES.get(name)}
    engine = llama_cpp.Llama(str(tmp_path / "model.gguf"), verbose=False, **options)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32).eval()
    for text in TEXTS:
        alone = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert engine.tokenize(text.encode(), add_bos=False, special=True) == alone
        ids = tokenizer(text)["input_ids"]
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        expected = model.generate(torch.tensor([ids]), **options, eos_token_id=None)[0, len(ids) :].tolist()
        engine.reset()
        found = engine.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0)
        assert [token for token, _ in zip(found, range(NEW_TOKENS), strict=False)] == expected
    if name in RECORDED:
        cases = [case for case in TokenizerGolden(kind.vocabulary)["strings"] if case["text"]]
        texts = {case["text"]: case["ids"] for case in cases if isinstance(case["ids"], list)}
        options = {"add_bos": False, "special": RECORDED[name]}
        assert {text: engine.tokenize(text.encode(), **options) for text in texts} == texts and len(texts) > 240
