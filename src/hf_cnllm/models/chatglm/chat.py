"""`model.chat` and `model.stream_chat` of ChatGLM-6B, ChatGLM2 and ChatGLM3, over `generate`."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig

from ..._compat import CACHE
from ..._compat.modeling import pop_cache
from ..chat import as_messages, by_name, generated_tokens, iterate_tokens, streamed_tokens
from .tool_calls import TRAINING_TIME, ToolCallError, read_answer

# What each generation's `chat` passes to `generate` unless told otherwise, and the tokens that end its answers.
_CHATGLM = {"max_length": 2048, "top_p": 0.7, "temperature": 0.95}, ("<eop>",)
_CHATGLM2 = {"max_length": 8192, "top_p": 0.8, "temperature": 0.8}
DEFAULTS = {
    "chatglm_early": _CHATGLM,
    "chatglm": _CHATGLM,
    "chatglm2": (_CHATGLM2, ("<eos>",)),
    "chatglm3": (_CHATGLM2, ("<eos>", "<|user|>", "<|observation|>")),
}

# What follows `history` in the originals' `chat` and `stream_chat`, where scripts pass it by position.
_OPTIONS = ("do_sample", "top_p", "temperature", "logits_processor")
_CHAT_OPTIONS = ("max_length", "num_beams", *_OPTIONS)
_STREAM_OPTIONS = ("past_key_values", "max_length", *_OPTIONS, "return_past_key_values")
CHAT_OPTIONS = {
    "chatglm_early": (_CHAT_OPTIONS, ("max_length", *_OPTIONS)),
    "chatglm": (_CHAT_OPTIONS, ("max_length", *_OPTIONS)),
    "chatglm2": (_CHAT_OPTIONS, _STREAM_OPTIONS),
    "chatglm3": (("role", *_CHAT_OPTIONS), ("role", *_STREAM_OPTIONS)),
}

# ChatGLM-6B: these marks become Chinese beside a Chinese character.
_MARKS = re.compile(r"(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")
_CHINESE_MARKS = dict(zip(",!:;?", "，！：；？", strict=True))


class ConversationCache(DynamicCache):
    """The keys and values of a conversation so far, and the ids of the tokens that they belong to."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config=config)
        self.token_ids: list[int] = []

    def keep(self, token_ids: list[int]) -> None:
        """Says which tokens were fed, the last of them perhaps not yet; drops what was fed after them."""
        fed = self.get_seq_length()
        if fed > len(token_ids):
            self.crop(len(token_ids) - fed)
        self.token_ids = token_ids[:fed]


class ChatGLMChatMixin:
    """Chat methods for `ChatGLMForConditionalGeneration`, before `GenerationMixin` among its bases.

    The tokenizer's `generation` decides about prompts, history and answers:

    * ChatGLM-6B and ChatGLM2: `history` is `[(query, response), …]`, and the response is a text.
    * ChatGLM3: `history` is messages, `{"role", "content"}` and perhaps `metadata` and `tools`; the response is a
      text, or `{"name", "parameters"}` when the model calls a tool. What the tool gives is the next query, with
      `role="observation"`.
    """

    config: PreTrainedConfig

    def chat(
        self, tokenizer, query: str, history: Sequence | None = None, *args: Any, **options: Any
    ) -> tuple[str | dict[str, Any], list]:
        """Answers `query`; returns (response, history with both added). `history` is left as it was.

        Args:
            tokenizer: a `ChatGLMTokenizer`.
            args: options by position, in the order of `CHAT_OPTIONS`.
            options: ChatGLM3: `role`, whose words the query is, `"user"` by default; and arguments of `generate`. By default it
                samples, with `top_p` 0.7 and `temperature` 0.95 for ChatGLM-6B, else 0.8 both; `max_length`, of prompt and
                answer together, is 2048 for ChatGLM-6B, else 8192.

        Raises:
            ValueError: a history of another shape, or an unknown role.
            ToolCallError: ChatGLM3's answer is a malformed tool call.
        """
        options = by_name(CHAT_OPTIONS[tokenizer.generation][0], args, options)
        messages = _messages(tokenizer, query, history, options.pop("role", "user"))
        prompt = _prompt(tokenizer, messages)
        arguments = _generation_arguments(tokenizer, **options)
        ids = generated_tokens(self, prompt, arguments["eos_token_id"], **arguments)
        return self._answer(tokenizer, tokenizer.decode(ids), query, history, messages)

    def stream_chat(
        self, tokenizer, query: str, history: Sequence | None = None, *args: Any, **options: Any
    ) -> Iterator[tuple]:
        """Answers `query` step by step: yields (response, history) so far. Arguments as in `chat`.

        Steps that end inside a character, or in a tool call that cannot be read yet, are left out. A tool call that is
        malformed in the end raises `ToolCallError`.

        Args:
            options: as in `chat`, and for ChatGLM2 and 3
                `past_key_values`: the third value of the turn before, so that only this turn is computed (with P-tuning
                everything is computed anew);
                `return_past_key_values`: also yield that value, for use once the iteration has ended.
        """
        options = by_name(CHAT_OPTIONS[tokenizer.generation][1], args, options)
        messages = _messages(tokenizer, query, history, options.pop("role", "user"))
        cache, return_past_key_values = (options.pop(n, None) for n in ("past_key_values", "return_past_key_values"))
        if cache is None and return_past_key_values:
            cache = ConversationCache(self.config)
        if cache is not None and self.config.architecture == "chatglm":
            raise ValueError("ChatGLM-6B has no past_key_values from turn to turn: it reads every prompt anew.")
        if not isinstance(cache, ConversationCache | None):
            raise ValueError("past_key_values must be what stream_chat(…, return_past_key_values=True) yielded.")
        prompt = _prompt(tokenizer, messages, [] if cache is None else cache.token_ids)
        arguments = _generation_arguments(tokenizer, **options)
        if cache is not None and not self.config.pre_seq_len:  # P-tuning's keys are in no prompt: nothing is kept
            arguments["cache"] = cache

        def steps() -> Iterator[tuple]:
            ids: list[int] = []
            text = shown = ""

            def step() -> tuple:
                answer = self._answer(tokenizer, text, query, history, messages)
                return (*answer, cache) if return_past_key_values else answer

            try:
                with closing(iterate_tokens(self, prompt, arguments["eos_token_id"], **arguments)) as answers:
                    for ids in answers:
                        text = tokenizer.decode(ids)
                        if text and not text.endswith("\ufffd"):
                            with suppress(ToolCallError):
                                now = step()
                                shown = text
                                yield now
            finally:
                if cache is not None:
                    cache.keep(prompt + ids)
            if text != shown:
                yield step()

        return steps()

    def stream_generate(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig | None = None,
        logits_processor: Sequence | None = None,
        stopping_criteria: Sequence | None = None,
        prefix_allowed_tokens_fn: Callable | None = None,
        return_past_key_values: bool = False,
        **kwargs: Any,
    ) -> Iterator[Any]:
        """`generate` step by step: yields the prompts and all tokens so far, [batch, length], the token that ends included.

        Args:
            return_past_key_values: yield (ids, cache) instead.
            kwargs: as those of `generate`. A cache, `past_key_values`, is of the first tokens of `input_ids`.

        Raises:
            ValueError: the cache is longer than the prompt: the originals took the last turn's ids alone.
        """
        cache = pop_cache(kwargs)
        if cache is not None and cache.get_seq_length() - (self.config.pre_seq_len or 0) >= input_ids.shape[1]:
            raise ValueError(
                "past_key_values holds as many tokens as input_ids: pass the ids of all turns, not of the last one alone, or "
                "use stream_chat(…, past_key_values=…, return_past_key_values=True)."
            )
        cache = DynamicCache(config=self.config) if cache is None and return_past_key_values else cache
        named = {
            **{"generation_config": generation_config, "logits_processor": logits_processor, CACHE: cache},
            **{"stopping_criteria": stopping_criteria, "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn},
        }
        kwargs |= {name: value for name, value in named.items() if value is not None}

        def steps() -> Iterator[Any]:
            with closing(streamed_tokens(self, input_ids=input_ids, **kwargs)) as answers:
                ids = next(answers).to(input_ids.device)
                for tokens in answers:
                    ids = torch.cat((ids, tokens.reshape(len(ids), -1).to(ids.device)), dim=1)
                    yield (ids, cache) if return_past_key_values else ids

        return steps()

    def process_response(self, output: str | Sequence[str], history: Sequence[Mapping[str, Any]] | None = None):
        """A generated text as an answer: the tidied text or, given ChatGLM3's history, (response, history).

        Args:
            output: for ChatGLM3 what `tokenizer.decode` returned: it knows where `<|assistant|>` was a token and begins a
                turn. A string from elsewhere is parted wherever that name stands, as in the original, though the model
                may quote it: `[output]` is one turn.
        """
        if history is not None:
            return read_answer(output, history)
        text = output.strip().replace(*TRAINING_TIME)
        if self.config.architecture == "chatglm" and not self.config.early_positions:
            text = _MARKS.sub(lambda mark: _CHINESE_MARKS[mark[0]], text)
        return text

    def _answer(self, tokenizer, text: str, query: str, history: Sequence | None, messages: list[dict]) -> tuple:
        if tokenizer.generation == "chatglm3":
            return self.process_response(text, messages)
        response = self.process_response(text)
        return response, [*map(tuple, history or []), (query, response)]


def _generation_arguments(tokenizer, do_sample: bool = True, **options: Any) -> dict[str, Any]:
    defaults, _ = DEFAULTS[tokenizer.generation]
    used = {"max_length": "max_new_tokens" not in options, "top_p": do_sample, "temperature": do_sample}
    for name, default in defaults.items():
        given = options.pop(name, None)
        if used[name]:
            options[name] = default if given is None else given
    ends = end_ids(tokenizer)
    return {"do_sample": do_sample, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id, **options}


def end_ids(tokenizer) -> list[int]:
    """The ids that end an answer."""
    return [tokenizer.get_command(name) for name in DEFAULTS[tokenizer.generation][1]]


def _messages(tokenizer, query: str, history: Sequence | None, role: str) -> list[dict[str, Any]]:
    if not isinstance(role, str):
        raise ValueError(f"role is {role!r}, but must be a string.")
    if tokenizer.generation == "chatglm3":
        return [*(history or []), {"role": role, "content": query}]
    if role != "user":
        raise ValueError(f"role is {role!r}, but {tokenizer.generation} has no roles: only ChatGLM3 has.")
    return as_messages(query, history)


def _prompt(tokenizer, messages: list[dict[str, Any]], past: Sequence[int] = ()) -> list[int]:
    """The ids that the answer follows: those of all messages or, behind those of the `past` turns, of the last one."""
    if past and tokenizer.generation != "chatglm3":
        question = f"\n\n[Round {len(messages) // 2 + 1}]\n\n问：{messages[-1]['content']}\n\n答："
        return [*past, *tokenizer.encode_message(question)[1:]]  # without the ▁ that begins a text
    messages, skipped = (messages[-1:], len(tokenizer.get_prefix_tokens())) if past else (messages, 0)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return [*past, *ids[skipped:]]
