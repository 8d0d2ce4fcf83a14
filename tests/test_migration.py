"""docs/migration.md: every row that can be run is run, and none is without a test."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Trainer,
    TrainingArguments,
)

from goldens import GOLDENS
from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint
from qwen_models import LENGTHS, WIDTH, generate, load

PAGE = Path(__file__).parents[1] / "docs" / "migration.md"
TEXTS = ["你好", "a longer text 123"]


def rows(heading):
    (section,) = re.findall(rf"## {heading}\n(.+?)(?=\n## |\Z)", PAGE.read_text(encoding="utf-8"), flags=re.S)
    return [line.split(" | ")[0].removeprefix("| ") for line in section.splitlines() if line.startswith("| ")][1:]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Family -> (model, tokenizer) of a tiny checkpoint."""
    made = {}
    for family in ("baichuan", "qwen", "chatglm", "chatglm3"):
        write_tiny_checkpoint(family, folder := tmp_path_factory.mktemp("migration") / family)
        auto = AutoModel if "glm" in family else AutoModelForCausalLM
        made[family] = (
            auto.from_pretrained(folder, trust_remote_code=True).eval(),
            AutoTokenizer.from_pretrained(folder),
        )
    return made


# ---- what transformers removed: old code, which fails, and the new, which runs ----


def arguments(**given):
    return TrainingArguments("unused", report_to=[], save_strategy="no", **{"use_cpu": True} | given)


def trainer(tiny, **given):
    return Trainer(tiny["qwen"][0], arguments(), **given)


def run(code):
    return lambda tiny: exec(code, {})


REMOVED = {
    "`Trainer(tokenizer=tokenizer)`": (
        lambda tiny: trainer(tiny, tokenizer=tiny["qwen"][1]),
        lambda tiny: trainer(tiny, processing_class=tiny["qwen"][1]),
    ),
    '`TrainingArguments(evaluation_strategy="no")`': (
        lambda tiny: arguments(evaluation_strategy="no"),
        lambda tiny: arguments(eval_strategy="no"),
    ),
    "`TrainingArguments(warmup_ratio=0.01)`": (
        lambda tiny: arguments(warmup_ratio=0.01),
        lambda tiny: arguments(warmup_steps=0.01).get_warmup_steps(200) == 2 or pytest.fail("no ratio"),
    ),
    "`TrainingArguments(overwrite_output_dir=True)`": (
        lambda tiny: arguments(overwrite_output_dir=True),
        lambda tiny: arguments(),
    ),
    "`TrainingArguments(no_cuda=True)`": (
        lambda tiny: arguments(no_cuda=True),
        lambda tiny: arguments(use_cpu=True),
    ),
    "`trainer.args.local_rank == 0` (Qwen's `finetune.py`)": (
        lambda tiny: trainer(tiny).args.local_rank == 0 or pytest.fail("it would not save"),
        lambda tiny: trainer(tiny).is_world_process_zero() or pytest.fail("it would not save"),
    ),
    "`from transformers import deepspeed`": (
        run("from transformers import deepspeed"),
        run("from transformers.integrations import deepspeed; deepspeed.is_deepspeed_zero3_enabled()"),
    ),
    "`from transformers.deepspeed import is_deepspeed_zero3_enabled`": (
        run("from transformers.deepspeed import is_deepspeed_zero3_enabled"),
        run("from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled"),
    ),
    "`from transformers import AdamW`": (run("from transformers import AdamW"), run("from torch.optim import AdamW")),
    "`from transformers.generation.logits_process import LogitsWarper`": (
        run("from transformers.generation.logits_process import LogitsWarper"),
        run("from transformers import LogitsProcessor"),
    ),
    "`tokenizer.batch_encode_plus(texts)`": (
        lambda tiny: tiny["chatglm"][1].batch_encode_plus(TEXTS),
        lambda tiny: tiny["chatglm"][1](TEXTS),
    ),
    "`tokenizer.encode_plus(text)`": (
        lambda tiny: tiny["chatglm"][1].encode_plus(TEXTS[0]),
        lambda tiny: tiny["chatglm"][1](TEXTS[0]),
    ),
    "`model.config.max_length`, `model.config.num_beams`": (
        lambda tiny: (tiny["chatglm"][0].config.max_length, tiny["chatglm"][0].config.num_beams),
        lambda tiny: (tiny["chatglm"][0].generation_config.max_length, tiny["chatglm"][0].generation_config.num_beams),
    ),
    "`past_key_values[0][0].shape`": (
        lambda tiny: cache_of(tiny)[0][0].shape,
        lambda tiny: cache_of(tiny).get_seq_length() == 3 or pytest.fail("another length"),
    ),
}


def cache_of(tiny):
    return tiny["qwen"][0](torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values


def test_every_removed_thing_is_tested():
    assert rows("What transformers removed") == list(REMOVED)


@pytest.mark.parametrize("row", REMOVED)
def test_what_transformers_removed(row, tiny):
    old, new = REMOVED[row]
    with pytest.raises((TypeError, ImportError, AttributeError, pytest.fail.Exception)):
        old(tiny)
    new(tiny)


# ---- what is different here ----


def on_baichuan(tiny):
    with pytest.raises(NotImplementedError, match="quantize the model while it is loaded"):
        tiny["baichuan"][0].quantize(8)
    assert AutoModel.from_pretrained(GOLDENS / "chatglm2_6b").quantize(8).quantized


def by_position(tiny):
    model, tokenizer = tiny["chatglm3"]
    names = list(inspect.signature(model.forward).parameters)[:3]
    assert names == ["input_ids", "attention_mask", "position_ids"]
    assert model(**tokenizer(TEXTS[0], return_tensors="pt")).logits is not None


def chat_with_a_string(tiny):
    model, tokenizer = tiny["baichuan"]
    with pytest.raises(ValueError, match="messages must be a list such as"):
        model.chat(tokenizer, "你好")
    config = GenerationConfig(max_new_tokens=3)
    assert isinstance(model.chat(tokenizer, [{"role": "user", "content": "你好"}], generation_config=config), str)


def masks(tiny):
    model, tokenizer = tiny["chatglm"]
    for name in ("get_masks", "get_position_ids"):
        with pytest.raises(NotImplementedError):
            getattr(model, name)(None, None)
    assert model(**tokenizer(TEXTS, return_tensors="pt", padding=True)).logits.shape[0] == 2


def last_turn(tiny):
    model, tokenizer = tiny["chatglm3"]
    options = {"max_new_tokens": 4, "do_sample": False, "return_past_key_values": True}
    *_, (_, history, cache) = model.stream_chat(tokenizer, "a", None, **options)
    with pytest.raises(ValueError, match="the ids of all turns"):
        model.stream_generate(torch.tensor([[5]]), past_key_values=cache)
    *_, (_, after, _) = model.stream_chat(tokenizer, "b", history, past_key_values=cache, **options)
    assert len(after) == 4


def qwens_decoder(tiny):
    tokenizer = tiny["qwen"][1]
    table = {index: token for token, index in (tokenizer.mergeable_ranks | tokenizer.special_tokens).items()}
    assert table[tokenizer.eod_id] == "<|endoftext|>" and table[tokenizer.encode("a")[0]] == b"a"


def decoding(tiny):
    for _, tokenizer in tiny.values():
        assert tokenizer.decode([len(tokenizer) + 3]) == ""
    with pytest.raises(OverflowError):
        tiny["qwen"][1].decode([-100])


DIFFERENT = {
    "`model.quantize(8)` on Baichuan": on_baichuan,
    "`model(input_ids, position_ids, attention_mask)` by position": by_position,
    '`model.chat(tokenizer, "…")` of Baichuan': chat_with_a_string,
    "`model.get_masks(…)`, `model.get_position_ids(…)`": masks,
    "`stream_generate(last_turn, past_key_values=…)`": last_turn,
    "`tokenizer.decoder` of Qwen (id to bytes)": qwens_decoder,
    "`KeyError` or `IndexError` around `tokenizer.decode`": decoding,
}


# ---- error messages ----


def sp_model(tiny):
    tokenizer = tiny["baichuan"][1]
    assert tokenizer.sp_model.encode("你好") == tokenizer.encode("你好", add_special_tokens=False)


def padding_sides(tiny):
    for family in ("chatglm", "chatglm3"):
        for side in ("left", "right"):
            batch = tiny[family][1](TEXTS, padding=True, padding_side=side)
            assert batch["attention_mask"][0][0 if side == "left" else -1] == 0


def setting_eos(tiny, folder):
    _, tokenizer = tiny["chatglm3"]
    tokenizer.eos_token = "</s>"
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder).eos_token == "</s>"


def inner_tokenizer(tiny):
    assert tiny["chatglm3"][1].tokenizer.index_special_tokens


def generates(tiny):
    for model, tokenizer in (tiny["chatglm"], tiny["chatglm3"]):
        answer, _ = model.chat(tokenizer, "a", max_length=60, do_sample=False)
        steps = list(model.stream_chat(tokenizer, "a", max_length=60, do_sample=False))
        assert [text for text, _ in steps][-1:] == ([answer] if answer else [])


def cached_pass(tiny):
    assert cache_of(tiny).get_seq_length() == 3


def configuration(tiny):
    for model, _ in (tiny["chatglm"], tiny["chatglm3"]):
        assert model.max_sequence_length > 0 and model.config.num_hidden_layers == model.config.num_layers


def long_prompts(tiny):
    torch.manual_seed(0)
    model = load()
    batch, mask = torch.randint(5, 60, (len(LENGTHS), WIDTH)), torch.zeros(len(LENGTHS), WIDTH, dtype=torch.long)
    for row, length in enumerate(LENGTHS):
        mask[row, -length:] = 1
    together = generate(model, batch, mask)[:, WIDTH:]
    assert torch.equal(together[:1], generate(model, batch[:1])[:, WIDTH:])
    assert max(LENGTHS) > model.config.seq_length > min(LENGTHS)


def silence(tiny):
    code = "import hf_cnllm; hf_cnllm.QWenLMHeadModel, hf_cnllm.BaichuanForCausalLM, hf_cnllm.ChatGLMModel"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def lora(tiny):
    for folder in ("baichuan_13b", "chatglm2_6b"):
        auto = AutoModel if "glm" in folder else AutoModelForCausalLM
        model = auto.from_pretrained(GOLDENS / folder)
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2)).train()
        ids = torch.tensor([[5, 6, 7, 8]])
        model(input_ids=ids, labels=ids).loss.backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)


def quantized(tiny, folder):
    model = AutoModel.from_pretrained(GOLDENS / "chatglm2_6b").quantize(4)
    model.save_pretrained(folder)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(AutoModel.from_pretrained(folder)(ids).logits, model(ids).logits)


def prefix(tiny):
    config = AutoConfig.from_pretrained(GOLDENS / "chatglm2_6b", pre_seq_len=4)
    trained, fresh = (AutoModel.from_pretrained(GOLDENS / "chatglm2_6b", config=config) for _ in range(2))
    state = {
        n.removeprefix("transformer.prefix_encoder."): p for n, p in trained.state_dict().items() if "prefix" in n
    }
    fresh.transformer.prefix_encoder.load_state_dict(state)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(fresh(ids).logits, trained(ids).logits)


def batches(tiny):
    options = {"max_new_tokens": 4, "do_sample": False}
    for family, (model, tokenizer) in tiny.items():
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        inputs = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left")
        together = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        single = tokenizer(TEXTS[0], return_tensors="pt")
        alone = model.generate(**single, **options)[:, single["input_ids"].shape[1] :]
        assert torch.equal(together[:1, : alone.shape[1]], alone), family


def no_code(tiny):
    assert all(type(model).__module__.startswith("hf_cnllm.") for model, _ in tiny.values())


MESSAGES = {
    "`'BaichuanTokenizer' object has no attribute 'sp_model'`": sp_model,
    "`_pad() got an unexpected keyword argument 'padding_side'`": padding_sides,
    "`property 'eos_token' of 'ChatGLMTokenizer' object has no setter`": setting_eos,
    "`'ChatGLMTokenizer' object has no attribute 'tokenizer'`": inner_tokenizer,
    "`object has no attribute '_extract_past_from_model_output'`": generates,
    "`'DynamicCache' object is not subscriptable`, `'NoneType' object has no attribute 'shape'` in a forward pass": cached_pass,
    "`'ChatGLMConfig' object has no attribute 'max_length'`, `'num_hidden_layers'`": configuration,
    "Qwen repeats itself or writes garbage on prompts beyond 2,048 or 8,192 tokens, in batches above all": long_prompts,
    "warnings about flash-attn at import": silence,
    "`element 0 of tensors does not require grad` with LoRA and gradient checkpointing": lora,
    "a quantized model saves and does not load, or is saved as a whole for a prefix of some megabytes": quantized,
    "a P-tuning checkpoint (`prefix_encoder` alone) does not load": prefix,
    "batches answer otherwise than single prompts": batches,
    "`does not recognize this architecture`, `ModuleNotFoundError: flash_attn.…` in a checkpoint's code": no_code,
}
NOT_RUN = ["`CUDA out of memory` from a mask of ALiBi, quadratic in the length"]


def test_every_other_row_is_tested():
    assert rows("What is different here") == list(DIFFERENT)
    assert sorted(rows("Your error message")) == sorted([*MESSAGES, *NOT_RUN])


@pytest.mark.parametrize("row", [*DIFFERENT, *MESSAGES])
def test_what_the_page_says(row, tiny, tmp_path):
    check = (DIFFERENT | MESSAGES)[row]
    check(tiny, tmp_path) if check in (setting_eos, quantized) else check(tiny)
