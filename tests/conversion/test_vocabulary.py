"""Exported tokenizers give the recorded ids of the originals, as far as tokenizers without this package can."""

import json

import pytest
from transformers import AutoTokenizer

from hf_cnllm.conversion.roads import ROADS
from hf_cnllm.conversion.vocabulary import TEMPLATE_FORMS, write_vocabulary
from hf_cnllm.hub.saving import staged_folder
from hf_cnllm.models.baichuan import BaichuanTokenizer
from hf_cnllm.models.chatglm import ChatGLMTokenizer
from hf_cnllm.models.qwen import QWenTokenizer
from tokenizer_goldens import TokenizerGolden

FAMILIES = {
    "baichuan1": (BaichuanTokenizer, "llama"),
    "baichuan2": (BaichuanTokenizer, "llama"),
    "chatglm2": (ChatGLMTokenizer, "glm"),
    "chatglm3": (ChatGLMTokenizer, "glm"),
    "qwen": (QWenTokenizer, "qwen2"),
    "qwen_v0": (QWenTokenizer, "qwen2"),
}
# Control tokens of chats, which a rendered chat must be able to spell: docs/serving.md.
READ_FROM_TEXTS = {
    "baichuan1": ("<reserved_102>",),  # and what follows it begins a text
    "chatglm2": ("</s>", "<unk>", "[MASK]", "[gMASK]", "<sop>"),
    "chatglm3": ("</s>", "<unk>", "[MASK]", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>"),
}
SMALL = [f"{name}_small" for name in FAMILIES if name != "qwen_v0"]


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)])
def test_ids_of_the_recorded_texts(name, tmp_path):
    golden, family = TokenizerGolden(name), name.removesuffix("_small")
    tokenizer_class, target = FAMILIES[family]
    road = next(road for road in ROADS if road.target == target)
    write_vocabulary(golden.load(tokenizer_class), road.tokenizer_class, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": target}))
    exported = AutoTokenizer.from_pretrained(tmp_path)
    assert type(exported).__module__.startswith("transformers.")
    compared = 0
    for case in golden["strings"]:
        for field, adds in (("ids", False), ("ids_special", True)):
            if not isinstance(case.get(field), list):
                continue  # what the original refused
            compared += 1
            if exported.encode(case["text"], add_special_tokens=adds) != case[field]:
                assert any(token in case["text"] for token in READ_FROM_TEXTS.get(family, ())), case["text"]
    assert compared > 240


def test_no_room_for_the_vocabulary(tmp_path, files_up_to):
    """tokenizers' own error, which is of no class that tells, is one of the disk."""
    tokenizer = TokenizerGolden("qwen_small").load(QWenTokenizer)
    with (
        files_up_to(9_000),
        pytest.raises(OSError, match=r"is the disk full\? \(File too large"),
        staged_folder(tmp_path / "out") as folder,
    ):
        write_vocabulary(tokenizer, "Qwen2Tokenizer", folder)


def test_templates_need_nothing_of_this_package(tmp_path):
    tokenizer = TokenizerGolden("chatglm3_small").load(ChatGLMTokenizer)
    write_vocabulary(tokenizer, "PreTrainedTokenizerFast", tmp_path)
    template = (tmp_path / "chat_template.jinja").read_text(encoding="utf-8")
    assert "border" not in template and "generation -%" not in template.replace("add_generation", "")
    exported = AutoTokenizer.from_pretrained(tmp_path)
    tool = {"name": "weather", "description": "of a city", "parameters": {"type": "object", "properties": {}}}
    messages = [{"role": "user", "content": "北京？"}]
    both = [
        t.apply_chat_template(messages, tools=[tool], add_generation_prompt=True)["input_ids"]
        for t in (tokenizer, exported)
    ]
    assert both[0] == both[1]


def test_marks_of_answers_go_with_the_white_space_that_goes_with_them():
    template = "a\n  {% generation %}\n  b\n  {% endgeneration %}\nc{%- generation -%}\n d \n{%- endgeneration -%}\n e{% generation %}f"
    for form, other in TEMPLATE_FORMS:
        template = form.sub(other, template)
    assert template == "a\n  b\ncd" + "ef"
