"""The models that supervised fine-tuning is tested on: every family, and transformers' own LLaMA and BLOOM."""

import json
import shutil

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_cnllm.data.conversations import load_instructions
from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint
from hf_cnllm.training.sft_data import fills_blanks, set_control_ids, use_template

# Row of the table -> tiny checkpoint, changes of its configuration, template.
ROWS = {
    "baichuan rope": ("baichuan", {}, None),
    "baichuan alibi": ("baichuan", {"position_embedding": "alibi", "norm_head": True, "z_loss_weight": 2e-4}, None),
    "chatglm": ("chatglm", {}, None),
    "chatglm2": ("chatglm2", {}, None),
    "chatglm3": ("chatglm3", {}, None),
    "qwen": ("qwen", {"seq_length": 16}, None),  # NTK and LogN act beyond
    "glm": ("glm", {}, None),
    "llama": ("llama", {}, "llama2"),
    "bloom": ("bloom", {}, "bloom"),
}
SMALL = {"hidden_size": 32, "vocab_size": 600}
FOREIGN = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SMALL, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    ),
    "bloom": lambda: BloomForCausalLM(BloomConfig(**SMALL, n_layer=2, n_head=4)),
}
CHATS = load_instructions("zh")[:3] + load_instructions("en")[:3]
ROWS_OF_DATA = [{"messages": chat} for chat in CHATS]
TURNS = [
    {"role": "system", "content": "用诗回答。"},
    *({"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")),
]


def write_bpe(folder):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator((message["content"] for chat in CHATS for message in chat), trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def write_checkpoint(name, folder):
    """The folder, with a tiny checkpoint of this name in it."""
    if not folder.exists() and name in FOREIGN:
        torch.manual_seed(0)
        FOREIGN[name]().save_pretrained(folder)
        write_bpe(folder)
    elif not folder.exists():
        write_tiny_checkpoint(name, folder)
    return folder


def write_row(row, root):
    """The folder below `root` with the tiny checkpoint of a row of the table, whose configuration has the row's changes."""
    name, changes, _ = ROWS[row]
    folder = write_checkpoint(name, root / name)
    if not changes:
        return folder
    changed = root / row.replace(" ", "-")
    if not changed.exists():
        shutil.copytree(folder, changed)
        config = json.loads((changed / "config.json").read_text()) | changes
        (changed / "config.json").write_text(json.dumps(config))
    return changed


def loaded(folder, changes, template):
    config = transformers.AutoConfig.from_pretrained(folder, **changes)
    kind = transformers.AutoModelForSeq2SeqLM if fills_blanks(config) else AutoModelForCausalLM
    torch.manual_seed(0)
    model, tokenizer = kind.from_config(config), AutoTokenizer.from_pretrained(folder)
    if not fills_blanks(config):
        use_template(tokenizer, template)
    set_control_ids(model, tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.config.use_cache = False
    return model.eval(), tokenizer
