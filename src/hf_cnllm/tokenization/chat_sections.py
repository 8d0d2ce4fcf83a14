"""Chats as token ids: only the template writes control tokens, whatever a message says.

The originals let a user who types `</s>`, `<reserved_106>` or `<|im_end|>` forge turns. Here a chat template stays an
ordinary Jinja template, rendered by transformers' own sandbox, but the rendered text is encoded in sections:

    <reserved_106>·你好</s>再见·<reserved_107>          · marks the border of a message (a private-use character)
    ^ control     ^ plain text    ^ control

Text sections go through a backend that has no control tokens at all, so there is no string that yields one. Encoding
each message on its own is also what the originals of Baichuan, ChatGLM3 and Qwen do.

To plug a family in: subclass `ChatTokenizer`, set `self.chat_template` unless the checkpoint brings one, and override what
stands at the top of the class.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cached_property, partial
from importlib import resources
from itertools import accumulate, chain
from typing import Any, NamedTuple

from tokenizers import Encoding, Regex, Tokenizer, models, pre_tokenizers
from transformers import BatchEncoding

from .._compat import get_json_schema, render_jinja_template
from .base import OriginalVocabularyTokenizer
from .regex import any_of


def read_template(name: str) -> str:
    """The chat template `templates/<name>.jinja`."""
    return (resources.files(__package__) / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


class ChatBackends(NamedTuple):
    """What encodes the sections of a rendered chat, for one set of control tokens."""

    control: str  # pattern of the control tokens that a template may write
    control_ids: Tokenizer  # a whole control token -> its id
    plain: Tokenizer  # any other text


class Marks(NamedTuple):
    """Two characters that occur nowhere in the chat: `border` splits text, `glue` breaks up a control token."""

    border: str
    glue: str

    @classmethod
    def unused_in(cls, *texts: str) -> "Marks":
        used = set().union(*texts)
        free = (char for char in map(chr, range(0xF0000, 0xFFFFE)) if char not in used)
        return cls(next(free), next(free))

    def leave_out(self, spans: Sequence[tuple[int, int]], text: str) -> list[tuple[int, int]]:
        """Spans of characters of `text`, counted in the text without the marks."""
        shown = list(accumulate((char not in self for char in text), initial=0))
        return [(shown[start], shown[end]) for start, end in spans]


def as_data(value: Any, change: Callable[[str], str] = lambda text: text) -> Any:
    """`value` in containers, numbers and strings, as a template prints it: no text is left inside other objects.

    Every string, keys included, is replaced by what `change` makes of it.
    """
    if isinstance(value, str):
        return change(value)
    if value is None or isinstance(value, (int, float)):
        return value
    if isinstance(value, Mapping):
        return {as_data(key, change): as_data(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_data(item, change) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return as_data({field.name: getattr(value, field.name) for field in fields(value)}, change)
    if callable(getattr(value, "model_dump", None)):  # pydantic
        return as_data(value.model_dump(), change)
    return change(str(value))


def plain_messages(conversation: Any) -> list[dict[str, Any]]:
    """The messages without empty keys, and with lists of text parts joined into one string."""
    messages = []
    for message in getattr(conversation, "messages", conversation):
        if not isinstance(message, Mapping):
            raise TypeError(f"a chat is a list of messages with 'role' and 'content', but one of them is {message!r}")
        message = {key: value for key, value in message.items() if value is not None}
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            foreign = [part for part in content if not (isinstance(part, Mapping) and part.get("type") == "text")]
            if foreign:
                raise ValueError(f"this model reads text only, but a message's content has the part {foreign[0]!r}")
            message["content"] = "".join(part["text"] for part in content)
        messages.append(message)
    return messages


class ChatTokenizer(OriginalVocabularyTokenizer):
    """A fast tokenizer whose chats never take control tokens from message contents, tools or documents."""

    # Whether a message is encoded apart from the template's text around it (True), or the text between two control tokens
    # as one (False), unless the template writes `border`, a variable that is empty everywhere but here, where a text ends.
    encodes_messages_alone: bool = True
    prompt_padding_side: str | None = None  # of prompts that are to be continued, if it is another than that of texts

    def chat_control_pieces(self) -> Iterable[str]:
        """Pieces of the vocabulary that only a chat template may write, besides the added tokens that are special, stand in
        `chat_control_tokens` or in the template."""
        return ()

    def read_messages(self, conversation: Any) -> list[dict[str, Any]]:
        """The messages of one chat as the template takes them."""
        return plain_messages(conversation)

    def read_tools(self, tools: Any) -> Any:
        """The tools as the template takes them: JSON schemas, those of functions included."""
        return [get_json_schema(tool) if callable(tool) else tool for tool in tools] if tools else tools

    def apply_chat_template(
        self,
        conversation,
        tools=None,
        documents=None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        tokenize: bool = True,
        padding: bool | str = False,
        truncation: bool | str = False,
        max_length: int | None = None,
        return_tensors=None,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: dict[str, Any] | None = None,
        **kwargs,
    ):
        """As [`~PreTrainedTokenizerBase.apply_chat_template`], with every argument's meaning unchanged.

        `sanitize_control_tokens` is accepted and always on. Contents may be lists of `{"type": "text", "text": …}`.

        Raises:
            ValueError: arguments that exclude each other, an empty conversation, or a part of a message that is no text.
        """
        kwargs.pop("sanitize_control_tokens", None)
        first = conversation[0] if isinstance(conversation, (list, tuple)) and conversation else None
        is_batched = isinstance(first, (list, tuple)) or hasattr(first, "messages")
        chats = [self.read_messages(chat) for chat in (conversation if is_batched else [conversation])]
        if not all(chats):
            raise ValueError("Cannot apply chat template to an empty conversation. Provide at least one message.")
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt are not compatible: choose one.")
        if return_assistant_tokens_mask and continue_final_message:
            raise ValueError("continue_final_message is not compatible with return_assistant_tokens_mask.")
        if return_assistant_tokens_mask and not (return_dict and tokenize):
            raise ValueError("`return_assistant_tokens_mask=True` requires `return_dict=True` and `tokenize=True`")

        template = self.get_chat_template(chat_template, tools)
        inputs = {"tools": self.read_tools(tools), "documents": documents, "border": "", **kwargs}
        if tokenize:
            backends = self._chat_backends(template)
            chats, inputs = as_data(chats), as_data(inputs)
            marks = Marks.unused_in(template, json.dumps([chats, inputs], ensure_ascii=False))
            break_up = partial(re.compile(rf"(?={backends.control})([\s\S])").sub, rf"\1{marks.glue}")
            chats = as_data(chats, break_up)
            inputs = as_data(inputs, break_up) | {"border": marks.border}
            if self.encodes_messages_alone:
                for message in chain.from_iterable(chats):
                    if message.get("content"):
                        message["content"] = f"{marks.border}{message['content']}{marks.border}"
        texts_and_spans: Any = render_jinja_template(  # is annotated as one string
            conversations=chats,
            chat_template=template,
            return_assistant_tokens_mask=return_assistant_tokens_mask,
            continue_final_message=continue_final_message,
            add_generation_prompt=add_generation_prompt,
            **{**self.special_tokens_map, **inputs},
        )
        rendered, spans = texts_and_spans
        if not tokenize:
            return rendered if is_batched else rendered[0]
        padding_side = self.prompt_padding_side if add_generation_prompt else None
        batch = self._batch_of_chats(
            [EncodedChat.of(text, marks, backends) for text in rendered],
            list(map(marks.leave_out, spans, rendered)) if return_assistant_tokens_mask else None,
            is_batched,
            padding,
            truncation,
            max_length,
            return_tensors,
            **{"padding_side": padding_side, **(tokenizer_kwargs or {})},
        )
        return batch if return_dict else batch["input_ids"]

    def encode_message(self, content: str) -> list[int]:
        """The ids of a message's content on its own: plain text, no control tokens, nothing added."""
        template = self.chat_template if isinstance(self.chat_template, str) else ""
        return self._chat_backends(template).plain.encode(content, add_special_tokens=False).ids

    @cached_property
    def _latest_chat_backends(self) -> dict[tuple, ChatBackends]:
        return {}

    def _chat_backends(self, template: str) -> ChatBackends:
        """The backends for the control tokens of now; built again when tokens are added or the template changes."""
        listed = tuple(getattr(self, "chat_control_tokens", None) or ())
        added = self.added_tokens_decoder
        key = (template, listed, self._tokenizer, *((index, repr(token)) for index, token in added.items()))
        if backends := self._latest_chat_backends.get(key):
            return backends
        control = {
            token.content: index
            for index, token in added.items()
            if token.special or token.content in listed or (token.content in template and not token.content.isspace())
        }
        control |= {piece: self.convert_tokens_to_ids(piece) for piece in self.chat_control_pieces()}
        plain = self._without_control_tokens(control)
        # One character cannot be broken up to keep it out of messages, so it stays text in templates, too.
        written = {token: index for token, index in control.items() if len(token) > 1}
        if lost := next((token for token in control if token not in written and token in template), None):
            raise ValueError(f"the chat template has {lost!r}: control tokens need more than one character.")
        control_ids = Tokenizer(models.WordLevel(written, unk_token=""))
        backends = ChatBackends(any_of(written) or "(?!)", control_ids, plain)
        self._latest_chat_backends.clear()
        self._latest_chat_backends[key] = backends
        return backends

    def _without_control_tokens(self, control: Collection[str]) -> Tokenizer:
        """A backend that shares the tokenizer's model and steps but can yield none of the `control` tokens.

        Control tokens that were added to the vocabulary are simply not added here. Those that the model makes of their
        own text are also kept from it: the first character of that text becomes a pre-token of its own.
        """
        backend = self._tokenizer
        plain = Tokenizer(backend.model)
        if backend.normalizer is not None:
            plain.normalizer = backend.normalizer
        steps = [] if backend.pre_tokenizer is None else [backend.pre_tokenizer]
        pieces = [token for token in control if any(made.value == token for made in backend.model.tokenize(token))]
        if pieces:
            steps.insert(0, pre_tokenizers.Split(Regex(rf"(?={any_of(pieces)})[\s\S]"), "isolated"))
        if steps:
            plain.pre_tokenizer = pre_tokenizers.Sequence(steps)
        added = backend.get_added_tokens_decoder().values()
        plain.add_tokens([token for token in added if token.content not in control])
        return plain

    def _batch_of_chats(
        self,
        chats: "list[EncodedChat]",
        spans: list[list[tuple[int, int]]] | None,
        is_batched: bool,
        padding,
        truncation,
        max_length: int | None,
        return_tensors,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_offsets_mapping: bool = False,
        verbose: bool = True,
        add_special_tokens: bool = False,
        **flags,
    ) -> BatchEncoding:
        """Truncates, pads and packs encoded chats as `tokenizer(...)` would; `flags` are its `return_*` arguments."""
        padding_strategy, truncation_strategy, max_length, flags = self._get_padding_truncation_strategies(
            padding, truncation, max_length, pad_to_multiple_of, verbose, **flags
        )
        encodings = [chat.encoding for chat in chats]
        for encoding in encodings:
            if truncation_strategy != "do_not_truncate":
                encoding.truncate(max_length, direction=self.truncation_side)
            self._eventual_warn_about_too_long_sequence(encoding.ids, max_length, verbose)
        self.pad_encodings(encodings, padding_strategy, max_length, pad_to_multiple_of, padding_side)
        columns = {}
        if return_offsets_mapping:
            columns["offset_mapping"] = [self._beside(chat.encoding, chat.offsets(), (0, 0)) for chat in chats]
        if spans is not None:
            columns["assistant_masks"] = [
                self._beside(chat.encoding, chat.generated(parts), 0) for chat, parts in zip(chats, spans, strict=True)
            ]
        batch = self.batch_of(encodings, is_batched, return_tensors, columns, **flags)
        # Without its encodings a batch has no `char_to_token` and the like, which would be wrong.
        return batch if all(chat.has_exact_offsets for chat in chats) else BatchEncoding(batch.data)

    def _beside(self, encoding: Encoding, values: list, filler: Any) -> list:
        """Values of a chat's tokens, for those that truncation has left, with `filler` for padding."""
        kept = sum(encoding.attention_mask)
        values = values[len(values) - kept :] if self.truncation_side == "left" else values[:kept]
        before = encoding.attention_mask.index(1) if kept else 0
        return [filler] * before + values + [filler] * (len(encoding) - before - kept)


# --------------------------------------------------------------------------------------------------------------------
# one rendered chat


class EncodedChat(NamedTuple):
    """A rendered chat's tokens, as a whole and by section: one control token, or what is encoded as one plain text.

    Characters of the chat are counted without the marks.
    """

    encoding: Encoding
    sections: list[tuple[str, Encoding]]

    @classmethod
    def of(cls, rendered: str, marks: Marks, backends: ChatBackends) -> "EncodedChat":
        # Every other part is what the parentheses match: a control token, or None at a border.
        parts = re.split(f"{marks.border}|({backends.control})", rendered)
        texts = [(part.replace(marks.glue, ""), index % 2 == 1) for index, part in enumerate(parts) if part]
        plain_texts = [text for text, is_control in texts if not is_control]
        plain = iter(backends.plain.encode_batch(plain_texts, add_special_tokens=False))
        encodings = [backends.control_ids.encode(text) if is_control else next(plain) for text, is_control in texts]
        whole = Encoding.merge(encodings, growing_offsets=True)
        return cls(whole, [(text, encoding) for (text, _), encoding in zip(texts, encodings, strict=True)])

    @property
    def has_exact_offsets(self) -> bool:
        """Whether the offsets in `encoding` are those in the chat.

        Merging counts on from the end of each section's last token, which may stand before the end of the section.
        """
        ends = [encoding.offsets[-1][1] if len(encoding) else 0 for _, encoding in self.sections]
        return ends == [len(text) for text, _ in self.sections]

    def offsets(self) -> list[tuple[int, int]]:
        """The characters of the chat that each token stands for, as (start, end)."""
        offsets, begin = [], 0
        for text, encoding in self.sections:
            for start, end in encoding.offsets:
                first = begin + min(start, len(text) - 1)
                offsets.append((first, begin + end if start < end else first))
            begin += len(text)
        return offsets

    def generated(self, spans: Sequence[tuple[int, int]]) -> list[int]:
        """1 for tokens that lie in one of the `spans` of characters, which the assistant generates; else 0."""
        return [
            int(any(low < max(end, start + 1) and start < high for low, high in spans))
            for start, end in self.offsets()
        ]
