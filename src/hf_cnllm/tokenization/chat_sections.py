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
from itertools import chain
from typing import Any

from tokenizers import Encoding, Regex, Tokenizer, models, pre_tokenizers
from transformers import BatchEncoding

from .._compat import get_json_schema, render_jinja_template
from .backends import like
from .base import OriginalVocabularyTokenizer, check_texts
from .regex import any_of
from .rendered_chat import ChatBackends, EncodedChat, Marks, NoCharacterLeft, RenderedChat


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

        With `tokenize=False` the text is a `RenderedChat`, which `tokenizer(text, add_special_tokens=False)` encodes as
        `tokenize=True` does; copies that are ordinary strings have lost what is a control token.

        `sanitize_control_tokens` is accepted and always on. Contents may be lists of `{"type": "text", "text": …}`.

        Raises:
            ValueError: arguments that exclude each other, an empty conversation, a part of a message that is no text, or
                `sanitize_control_tokens=True` with `tokenize=False` and a template that changes what messages say.
        """
        must_sanitize = kwargs.pop("sanitize_control_tokens", False)
        chats, is_batched = self._read_chats(conversation)
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt are not compatible: choose one.")
        if return_assistant_tokens_mask and continue_final_message:
            raise ValueError("continue_final_message is not compatible with return_assistant_tokens_mask.")
        if return_assistant_tokens_mask and not (return_dict and tokenize):
            raise ValueError("`return_assistant_tokens_mask=True` requires `return_dict=True` and `tokenize=True`")

        template = self.get_chat_template(chat_template, tools)
        inputs = {"tools": self.read_tools(tools), "documents": documents, "border": "", **kwargs}
        options: dict[str, Any] = {
            **self.special_tokens_map,
            "chat_template": template,
            "return_assistant_tokens_mask": return_assistant_tokens_mask,
            "continue_final_message": continue_final_message,
            "add_generation_prompt": add_generation_prompt,
        }
        render: Callable[..., Any] = partial(render_jinja_template, **options)
        in_sections = partial(self._in_sections, render, template, chats, inputs)
        if not tokenize:
            texts, _ = render(conversations=chats, **inputs)
            texts = self._with_sections(texts, in_sections)
            if must_sanitize and not all(isinstance(text, RenderedChat) for text in texts):
                raise ValueError(
                    "the chat template changes what messages say, so that control tokens in them cannot be told from the "
                    "template's own in the rendered text. Use tokenize=True."
                )
            return texts if is_batched else texts[0]

        rendered, spans = in_sections()
        padding_side = self.prompt_padding_side if add_generation_prompt else None
        options = {"add_special_tokens": False, "padding_side": padding_side, **(tokenizer_kwargs or {})}
        padding_strategy, truncation_strategy, max_length, flags = self._get_padding_truncation_strategies(
            padding, truncation, max_length, **options
        )
        batch = self._encode_chats(
            rendered,
            is_batched,
            spans if return_assistant_tokens_mask else None,
            padding_strategy=padding_strategy,
            truncation_strategy=truncation_strategy,
            max_length=max_length,
            return_tensors=return_tensors,
            **{**options, **flags},
        )
        return batch if return_dict else batch["input_ids"]

    def _read_chats(self, conversation: Any) -> tuple[list[list[dict[str, Any]]], bool]:
        """The messages of the chat, or of each of the chats, and whether it is several."""
        first = conversation[0] if isinstance(conversation, (list, tuple)) and conversation else None
        is_batched = isinstance(first, (list, tuple)) or hasattr(first, "messages")
        chats = [self.read_messages(chat) for chat in (conversation if is_batched else [conversation])]
        if not all(chats):
            raise ValueError("Cannot apply chat template to an empty conversation. Provide at least one message.")
        return chats, is_batched

    def _in_sections(
        self, render: Callable, template: str, chats: list, inputs: dict[str, Any], has_borders: bool = True
    ) -> tuple[list[RenderedChat], list[list[tuple[int, int]]]]:
        """The chats as `render(conversations=chats, **inputs)` gives them, and the spans of characters that the assistant generates.

        Without borders only the control tokens in messages are marked: text between two others is one section.
        """
        backends = self._chat_backends(template)
        chats, inputs = as_data(chats), as_data(inputs)
        marks = Marks.unused_in(template, backends.control, json.dumps([chats, inputs], ensure_ascii=False))
        break_up = partial(re.compile(rf"(?={backends.control})([\s\S])").sub, rf"\1{marks.glue}")
        chats, inputs = as_data(chats, break_up), as_data(inputs, break_up)
        if has_borders:
            inputs["border"] = marks.border
        if has_borders and self.encodes_messages_alone:
            for message in chain.from_iterable(chats):
                if message.get("content"):
                    message["content"] = f"{marks.border}{message['content']}{marks.border}"
        marked, spans = render(conversations=chats, **inputs)
        rendered = [RenderedChat.of(text, marks, backends.control, template) for text in marked]
        return rendered, list(map(marks.leave_out, spans, marked))

    @staticmethod
    def _with_sections(texts: list[str], in_sections: Callable) -> list[str]:
        """The rendered texts as chats, or as they are if the template says something else about contents with marks in
        them: one that trims or compares contents does with borders, one that looks for control tokens always."""
        for has_borders in (True, False):
            try:
                rendered, _ = in_sections(has_borders=has_borders)
            except NoCharacterLeft:
                raise
            except Exception:  # whatever a template does with contents that are not what it expects
                continue
            if rendered == texts:
                return rendered
        return texts

    def encode_message(self, content: str) -> list[int]:
        """The ids of a message's content on its own: plain text, no control tokens, nothing added."""
        return self._chat_backends().plain.encode(self._in_normal_form(content), add_special_tokens=False).ids

    def is_control_token(self, index: int) -> bool:
        """Whether it is the id of a token that only a chat template writes, whatever a message says."""
        token = str(self.convert_ids_to_tokens(index))
        return self._chat_backends().control_ids.token_to_id(token) is not None

    @cached_property
    def _latest_chat_backends(self) -> dict[tuple, ChatBackends]:
        return {}

    def _chat_backends(self, template: str | None = None) -> ChatBackends:
        """The backends for the control tokens of now; built again when tokens are added or the template changes, which is
        the tokenizer's own unless given."""
        if template is None:
            template = self.chat_template if isinstance(self.chat_template, str) else ""
        listed = tuple(getattr(self, "chat_control_tokens", None) or ())
        added = self.added_tokens_decoder
        key = (template, listed, self._tokenizer, repr(added))
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
        backends = ChatBackends(any_of(written), control_ids, plain)
        self._latest_chat_backends.clear()
        self._latest_chat_backends[key] = backends
        return backends

    def _without_control_tokens(self, control: Collection[str]) -> Tokenizer:
        """A backend that shares the tokenizer's model and steps but can yield none of the `control` tokens.

        Control tokens that were added to the vocabulary are simply not added here. Those that the model makes of their
        own text are also kept from it: the first character of that text becomes a pre-token of its own.
        """
        backend = self.text_backend()
        added = backend.get_added_tokens_decoder().values()
        plain = like(backend, [token for token in added if token.content not in control])
        pieces = [token for token in control if any(made.value == token for made in backend.model.tokenize(token))]
        if pieces:
            split = pre_tokenizers.Split(Regex(rf"(?={any_of(pieces)})[\s\S]"), "isolated")
            steps = [] if backend.pre_tokenizer is None else [backend.pre_tokenizer]
            plain.pre_tokenizer = pre_tokenizers.Sequence([split, *steps])
        return plain

    def _encode_plus(self, text, text_pair=None, add_special_tokens: bool = True, **kwargs: Any) -> BatchEncoding:
        must_sanitize = kwargs.pop("sanitize_control_tokens", False)
        splits_all = kwargs.get("split_special_tokens")
        splits_all = self.split_special_tokens if splits_all is None else splits_all
        if splits_all or not _holds_chat([text, text_pair]):
            if must_sanitize and not splits_all:
                raise ValueError(
                    "sanitize_control_tokens=True needs the chat itself, not a text without a sign of what in it is a user's: "
                    "use apply_chat_template(messages, tokenize=True), or pass its rendered text unchanged."
                )
            return self._encode_texts(text, text_pair, add_special_tokens=add_special_tokens, **kwargs)
        is_batched = isinstance(text, (list, tuple))
        rows = list(text) if is_batched else [text]
        if (
            text_pair is not None
            or kwargs.pop("is_split_into_words", False)
            or not all(isinstance(r, str) for r in rows)
        ):
            raise ValueError(
                "a rendered chat is a whole text, not one of a pair or of words: pass str(chat) for those."
            )
        return self._encode_chats(rows, is_batched, add_special_tokens=add_special_tokens, **kwargs)

    def _in_normal_form(self, text: str) -> str:
        """The text as the backends take it. Raises TypeError for one that they do not."""
        check_texts(text)
        return text

    def _encode_texts(self, text, text_pair=None, **kwargs: Any) -> BatchEncoding:
        """What `tokenizer(…)` makes of texts that are no rendered chats."""
        return super()._encode_plus(text, text_pair, **kwargs)

    def _encode_chats(
        self,
        rows: Sequence[str],
        is_batched: bool,
        spans: list[list[tuple[int, int]]] | None = None,
        *,
        padding_strategy: Any = "do_not_pad",
        truncation_strategy: Any = "do_not_truncate",
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        add_special_tokens: bool = False,
        return_tensors=None,
        return_offsets_mapping: bool = False,
        verbose: bool = True,
        **kwargs: Any,
    ) -> BatchEncoding:
        """Encodes rendered chats, and other texts among them, truncates, pads and packs them as `tokenizer(…)` would.

        Args:
            spans: of each chat, the characters that the assistant generates, for the column `assistant_masks`.
            kwargs: the other arguments of `tokenizer(…)`; the `return_*` among them say what is in the batch.
        """
        flags = {name: value for name, value in kwargs.items() if name.startswith("return_")}
        others = {name: value for name, value in kwargs.items() if name not in flags}
        others |= {"truncation_strategy": truncation_strategy, "max_length": max_length}
        templates = {row.template for row in rows if isinstance(row, RenderedChat)}
        backends = {template: self._chat_backends(template) for template in templates}
        backend = self._tokenizer
        chats: list[EncodedChat | None] = []
        encodings: list[Encoding] = []
        for row in rows:
            if not isinstance(row, RenderedChat):
                chats.append(None)
                encodings += self._encode_texts([row], add_special_tokens=add_special_tokens, **others).encodings
                continue
            chats.append(chat := EncodedChat.of(row, backends[row.template], self._in_normal_form))
            encoding = chat.encoding
            if truncation_strategy != "do_not_truncate":
                added = backend.num_special_tokens_to_add(False) if add_special_tokens else 0
                encoding.truncate(max(max_length - added, 0), direction=self.truncation_side)
            if add_special_tokens:
                self._take_whole_texts()
                encoding = backend.post_process(encoding)
            self._eventual_warn_about_too_long_sequence(encoding.ids, max_length, verbose)
            encodings.append(encoding)
        self.pad_encodings(encodings, padding_strategy, max_length, pad_to_multiple_of, padding_side)
        columns = {}
        if return_offsets_mapping:
            columns["offset_mapping"] = [
                self._beside(encoding, chat.offsets(), (0, 0)) if chat else encoding.offsets
                for chat, encoding in zip(chats, encodings, strict=True)
            ]
        if spans is not None:
            columns["assistant_masks"] = [
                self._beside(encoding, chat.generated(parts), 0)
                for chat, encoding, parts in zip(chats, encodings, spans, strict=True)
                if chat
            ]
        batch = self.batch_of(encodings, is_batched, return_tensors, columns, **flags)
        # Without its encodings a batch has no `char_to_token` and the like, which would be wrong.
        return batch if all(chat.has_exact_offsets for chat in chats if chat) else BatchEncoding(batch.data)

    def _beside(self, encoding: Encoding, values: list, filler: Any) -> list:
        """Values of a chat's tokens, for those that truncation has left, with `filler` for what was put around them."""
        is_own = [not added for added in encoding.special_tokens_mask]
        kept = sum(is_own)
        own = iter(values[len(values) - kept :] if self.truncation_side == "left" else values)
        return [next(own) if here else filler for here in is_own]


def _holds_chat(text: Any) -> bool:
    return isinstance(text, RenderedChat) or (isinstance(text, (list, tuple)) and any(map(_holds_chat, text)))
