"""A model with its tokenizer, and the one thing the terminal and the page ask of them: an answer, step by step."""

import argparse
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from jinja2 import TemplateError
from transformers import AutoTokenizer

from ..._compat import logging
from ...data.conversations import reply_end_ids, with_system_in_question
from ...data.infilling import either_of, infill
from ...families import Family
from ...hub.places import ADAPTER_CONFIG, refuse_classifier
from ...models.chat import iterate_tokens
from ...models.chatglm.chat import DEFAULTS, end_ids
from ...models.chatglm.tool_calls import as_chatglm3_tools, read_answer
from ..checkpoint import read_checkpoint
from .tools import TOOLS

Message = dict[str, Any]
SAMPLING = ("temperature", "top_p", "top_k")
MAX_NEW_TOKENS, MAX_NEW_TOKENS_OF_A_BLANK = 1024, 64  # where neither the user nor the checkpoint says
UNSETTLED_LENGTH = 12
TOOLS_SYSTEM = (
    "Answer the following questions as best as you can. You have access to the following tools:"  # ChatGLM3's own
)


class Reply(NamedTuple):
    """An answer so far."""

    text: str  # as it is shown; each step's begins with that of the step before, but for the last one's tidying
    turns: list[Message]  # what the answer adds to the messages
    call: dict[str, Any] | None = None  # the tool that the model calls, as `{"name": …, "parameters": …}`
    left_out: int = 0  # of the oldest rounds, which the prompt had no room for
    is_cut: bool = False  # it has `max_new_tokens`


class ChatModel:
    """Answers messages with a checkpoint: by its chat template, by going on with a text, or by filling its blanks."""

    def __init__(self, model: Any, tokenizer: Any, family: Family, is_raw: bool = False, options: dict | None = None):
        self.model, self.tokenizer, self.family = model, tokenizer, family
        generation = model.generation_config
        self.fills_blanks = family.generates_with != "AutoModelForCausalLM"
        # Qwen's base models say so themselves.
        self.is_raw = not self.fills_blanks and (is_raw or getattr(generation, "chat_format", None) == "raw")
        self.generation = getattr(tokenizer, "generation", None)  # of ChatGLM
        self.options = {"do_sample": generation.do_sample} | {
            name: value for name in SAMPLING if (value := getattr(generation, name)) is not None
        }
        self.ends: set[int] = set()
        if self.generation is not None:
            sampling, _ = DEFAULTS[self.generation]
            self.options |= {"do_sample": True, **{name: sampling[name] for name in ("top_p", "temperature")}}
            self.ends = set(end_ids(tokenizer))
        if self.keeps_history:
            self.ends |= set(reply_end_ids(tokenizer, generation))
        elif (end := generation.eos_token_id) is not None:
            self.ends |= set(end if isinstance(end, list) else [end])
        self.options = self.with_options(options or {})

    @classmethod
    def load(cls, args: argparse.Namespace) -> "ChatModel":
        """The model that the command line names.

        Raises:
            ValueError: it is of no family of this package, or has no use for an option.
            OSError: it is not there.
        """
        logging.set_verbosity_error()
        checkpoint = read_checkpoint(args.model)
        refuse_classifier(checkpoint.name, "MODEL")
        adapter = args.adapter or checkpoint.adapter
        source = checkpoint.folder or checkpoint.name
        if adapter is not None:
            if not (Path(adapter) / ADAPTER_CONFIG).is_file():
                raise FileNotFoundError(f"{adapter} is no folder of an adapter: it has no {ADAPTER_CONFIG}")
            print(f"adapter {adapter} on {checkpoint.name}")
        has_tokenizer = adapter is not None and (Path(adapter) / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(adapter if has_tokenizer else source)
        if args.tools_demo and getattr(tokenizer, "generation", None) != "chatglm3":
            raise ValueError("--tools-demo needs a model whose chats have tools: of the families here, ChatGLM3")
        if args.system and checkpoint.family.generates_with != "AutoModelForCausalLM":
            raise ValueError("--system has no meaning here: this model fills blanks")
        if args.seed is not None:
            transformers.set_seed(args.seed)
        on_gpu = torch.cuda.is_available()
        auto_class = getattr(transformers, checkpoint.family.generates_with)
        model = auto_class.from_pretrained(source, dtype=args.dtype, **({"device_map": "auto"} if on_gpu else {}))
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter)
        names = (*SAMPLING, "repetition_penalty", "max_new_tokens")
        options = {name: value for name in names if (value := getattr(args, name)) is not None}
        if args.greedy:
            options["do_sample"] = False
        return cls(model.eval(), tokenizer, checkpoint.family, args.raw, options)

    def with_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `generate`: the model's own, and those in their place."""
        merged = {**self.options, **options}
        if options.get("do_sample") is None and any(name in options for name in SAMPLING):
            merged["do_sample"] = True
        if not merged["do_sample"]:
            merged |= dict.fromkeys(SAMPLING)
        usual = MAX_NEW_TOKENS_OF_A_BLANK if self.fills_blanks else MAX_NEW_TOKENS
        merged.setdefault("max_new_tokens", self.model.generation_config.max_new_tokens or usual)
        return merged

    @property
    def keeps_history(self) -> bool:
        """Whether an answer is one of a chat, with a system message and what was said before."""
        return not (self.is_raw or self.fills_blanks)

    @property
    def hint(self) -> str:
        """What to write."""
        if self.fills_blanks:
            blanks = either_of(self.tokenizer.convert_ids_to_tokens(self.tokenizer.mask_token_ids))
            return f"Write a text with {blanks}: the model fills it. Every text stands alone."
        return "Begin a text: the model goes on with it. Every text stands alone." if self.is_raw else "Ask something."

    @property
    def room(self) -> int:
        """Tokens of prompt and answer together."""
        config = self.model.config
        return max(self.family.trained_length(config), getattr(config, "max_position_embeddings", None) or 0)

    def opening(self, system: str, has_tools: bool = False) -> list[Message]:
        """The messages that a chat begins with."""
        if has_tools:
            tools = as_chatglm3_tools(list(TOOLS.values()))
            return [{"role": "system", "content": system or TOOLS_SYSTEM, "tools": tools}]
        return [{"role": "system", "content": system}] if system else []

    def answer(self, messages: Sequence[Message], **options: Any) -> Generator[Reply]:
        """Answers the last of the messages. The last reply is the whole answer; closing the iterator ends it early.

        Raises:
            ValueError: the messages do not fit the model, or its answer is a malformed tool call.
            RuntimeError: the model's numbers are not finite.
        """
        merged = self.with_options(options)
        if self.fills_blanks:
            yield self._filled(messages[-1]["content"], merged)
            return
        prompt, left_out = self._prompt(messages, merged["max_new_tokens"])
        limit = merged["max_new_tokens"] = min(merged["max_new_tokens"], self.room - len(prompt))
        merged |= {"eos_token_id": sorted(self.ends) or None, "pad_token_id": self.tokenizer.pad_token_id}
        ids: list[int] = []
        with closing(iterate_tokens(self.model, prompt, self.ends, **merged)) as steps:
            for ids in steps:
                yield self._reply(ids, messages, is_whole=False)
        yield self._reply(ids, messages, is_whole=True)._replace(left_out=left_out, is_cut=len(ids) >= limit)

    # --- the prompt ---

    def _prompt(self, messages: Sequence[Message], max_new_tokens: int) -> tuple[list[int], int]:
        """The ids, and how many of the oldest rounds were left out to have room for an answer."""
        room = self.room - min(max_new_tokens, self.room // 4)
        if self.is_raw:
            text = messages[-1]["content"]
            rounds, ids = [0], self.tokenizer.build_inputs_with_special_tokens(self.tokenizer.encode_message(text))
        else:
            rounds = [index for index, message in enumerate(messages) if message["role"] == "user"]
            ids = self._encode(messages)
        left_out = 0
        while len(ids) > room and left_out + 1 < len(rounds):
            left_out += 1
            ids = self._encode([*messages[: rounds[0]], *messages[rounds[left_out] :]])
        if len(ids) >= self.room:
            raise ValueError(f"this is {len(ids):,} tokens long, and the model reads {self.room:,}: shorten it")
        return ids, left_out

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        messages = list(messages)
        if messages[0]["role"] == "system":
            try:
                self.tokenizer.apply_chat_template(messages[:2], tokenize=False)
            except TemplateError:  # ChatGLM-6B and ChatGLM2 have no such role
                messages = with_system_in_question(messages)
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    # --- the answer ---

    def _reply(self, ids: list[int], messages: Sequence[Message], is_whole: bool) -> Reply:
        text = self.tokenizer.decode(ids, skip_special_tokens=self.generation != "chatglm3")
        if self.generation == "chatglm3" and not self.is_raw:
            return self._chatglm3_reply(text, messages, is_whole)
        if self.generation is not None and not self.is_raw:
            text = self.model.process_response(text)
        text = text if self.is_raw else text.strip()
        text = text if is_whole else _settled(text)
        return Reply(text, [{"role": "assistant", "content": text}])

    def _chatglm3_reply(self, text: str, messages: Sequence[Message], is_whole: bool) -> Reply:
        if not is_whole and "\n" not in text:
            return Reply("", [])  # perhaps the name of a tool, which the first line says
        response: Any = None
        turns = read_answer(text, [{"role": "user"}])[1][1:]
        if is_whole or "tools" not in messages[0]:
            response = read_answer(text, messages)[0]
        shown = "\n".join(
            f"{turn['metadata']}\n{turn['content']}" if turn["metadata"] else turn["content"] for turn in turns
        )
        call = response if isinstance(response, dict) and "parameters" in response else None
        return Reply(shown if is_whole else _settled(shown), turns, call)

    def _filled(self, text: str, options: dict[str, Any]) -> Reply:
        blanks = self.tokenizer.convert_ids_to_tokens(self.tokenizer.mask_token_ids)
        if not any(blank in text for blank in blanks):
            text += blanks[-1]
        filled = str(infill(self.model, self.tokenizer, text, **options))
        return Reply(filled, [{"role": "assistant", "content": filled}])


def _settled(text: str) -> str:
    """The text without an end that the next token may still change: half a character, white space, marks that become
    Chinese before a Chinese character, and the placeholder that ChatGLM's `process_response` replaces."""
    head, tail = text[:-UNSETTLED_LENGTH], text[-UNSETTLED_LENGTH:]
    if (place := tail.rfind("[[")) >= 0 and "]]" not in tail[place:]:
        tail = tail[:place]
    return head + tail.rstrip("\ufffd,!:;?[ \t\r\n")
