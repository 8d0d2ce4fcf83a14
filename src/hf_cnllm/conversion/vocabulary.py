"""A tokenizer as `tokenizer.json` alone says it, for engines that know no class of this package."""

import json
import re
import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from transformers import TokenizersBackend

from ..hub.json_files import read_object
from ..hub.saving import write_json
from ..models.chatglm import ChatGLMTokenizer
from ..tokenization.chat_sections import ChatTokenizer
from ..tokenization.sentencepiece import SentencePieceModel

# ChatGLM2 and 3 have control tokens that are words (`sop`); as tokens that are found in texts they have GLM-4's names.
RENAMED = {name: f"<{name}>" for name in ("sop", "eop")}
# What the templates say to this package's tokenizer alone -> what says the same to one that encodes the whole text: a text of
# its own begins with SentencePiece's blank.
TEMPLATE_FORMS = (
    (re.compile(r"\s*\{#-.*?-#\}\s*", re.DOTALL), ""),
    # With what transformers' renderer takes away around a tag.
    (re.compile(r"(?:\s*\{%-|(?:(?<=\n)[ \t]*)?\{%)\s*(?:end)?generation\s*(?:-%\}\s*|%\}\n?)"), ""),
    (re.compile(r"border ~ content ~ border"), '(" " if content else "") ~ content'),
    (re.compile(r"\{\{- border -\}\}"), '{{- " " if message["content"] else "" -}}'),
    (re.compile(r"\[gMASK\]sop\b"), "[gMASK]<sop>"),
)
SENTENCEPIECE = "tokenizer.model"


def write_vocabulary(tokenizer: ChatTokenizer, tokenizer_class: str, folder: Path) -> None:
    """Writes `tokenizer.json`, its settings and the chat template.

    Control tokens of the family's chats, which texts never yield in this package, are special tokens here: only so can a
    rendered chat be encoded.

    Args:
        tokenizer: of the original.
        tokenizer_class: what reads it.
    """
    rules, template, control = (
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        tokenizer.chat_control_pieces(),
    )
    if isinstance(tokenizer, ChatGLMTokenizer):
        control = [RENAMED.get(token, token) for token in control]
        for name, other in RENAMED.items():
            rules = rules.replace(json.dumps(name), json.dumps(other))
    else:  # Baichuan reserves a thousand
        control = [piece for piece in control if piece in str(template)]
    backend = Tokenizer.from_str(rules)
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    if isinstance(template, str):
        for form, other in TEMPLATE_FORMS:
            template = form.sub(other, template)
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    exported = TokenizersBackend(
        tokenizer_object=backend,
        chat_template=template,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **named,
    )
    exported.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    settings = read_object(file)
    settings |= {"tokenizer_class": tokenizer_class, "add_bos_token": tokenizer.add_bos_token}
    settings["added_tokens_decoder"] = {
        str(index): token.__getstate__() for index, token in exported.added_tokens_decoder.items()
    }
    settings.pop("backend", None)
    if (normalizer := backend.normalizer) and tokenizer_class != "Qwen2Tokenizer":
        settings["add_prefix_space"] = normalizer.normalize_str("a") != "a"
    write_json(file, settings)


def write_for_llama_cpp(original: Path, folder: Path) -> None:
    """What llama.cpp's converter reads beside `tokenizer.json`: the pieces' scores, and which of them are found before all
    others. (Where a text begins with SentencePiece's blank, llama.cpp would put one behind each of these, too.)"""
    file = original / SENTENCEPIECE
    if not file.is_file():
        return
    shutil.copyfile(file, folder / file.name)
    model = SentencePieceModel.from_file(file)
    if not model.add_dummy_prefix:
        symbols = {symbol: model.ids[symbol] for symbol in model.symbols}
        write_json(folder / "added_tokens.json", symbols)
