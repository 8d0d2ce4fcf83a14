"""Tokenizer of ChatGLM-6B, ChatGLM2 and ChatGLM3: one class, told apart by the vocabulary file and what is with it."""

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer
from tokenizers.models import BPE, Unigram
from transformers import BatchEncoding

from ..._compat import is_for_pipeline
from ...tokenization.backends import surround_texts, taking_spaces
from ...tokenization.base import as_list, id_of, known
from ...tokenization.chat_sections import ChatTokenizer, plain_messages
from ...tokenization.folder import DOWNLOAD_AGAIN, check_added_tokens, check_settings
from ...tokenization.rendered_chat import RenderedChat, unused_characters
from ...tokenization.sentencepiece import SentencePieceModel, mend_bytes
from ...tokenization.sentencepiece_mixin import SentencePieceMixin
from ...tokenization.templates import read_template
from ..chat import as_messages
from ..old_names import instead_use
from .sp_tokenizer import IceTokenizer, SPTokenizer
from .tool_calls import ASSISTANT, Answer, as_chatglm3_messages, as_chatglm3_tools
from .vocabulary_chatglm import (
    ICE_TEXT,
    IMAGE_TOKENS,
    ROLES,
    STAND_INS,
    TOKENIZER_MODEL,
    VERSIONS,
    WHITE_SPACE,
    ChatGLMVersion,
    build_bpe_backend,
    build_ice_backend,
    recognize_version,
    symbols_as_text,
    with_ice_pieces,
    without_control_names,
    write_white_space,
)

# Ids in the configuration of ChatGLM-6B -> their tokens.
ICE_TEXT_MODEL_TOKENS = {
    "mask_token_id": ("[MASK]",),
    "gmask_token_id": ("[gMASK]",),
    "bos_token_id": ("<sop>",),
    "eos_token_id": ("<eop>", "</s>"),
}
PUBLISHED_PIECES, FIRST_MERGED = 64_789, (259, "▁t")  # of ChatGLM2's and ChatGLM3's file
# Arguments of `tokenizer(…)` that are about one text, not about a batch.
ENCODING_OPTIONS = ("truncation_strategy", "stride", "is_split_into_words", "split_special_tokens")


class ChatGLMTokenizer(SentencePieceMixin, ChatTokenizer):
    r"""SentencePiece Unigram (ChatGLM-6B, `ice_text.model`) or BPE (ChatGLM2 and 3, `tokenizer.model`).

    | version                    | special tokens      | chat                                               |
    |----------------------------|---------------------|----------------------------------------------------|
    | `chatglm_early`, `chatglm` | text, [gMASK] <sop> | `[Round 0]\n问：…\n答：…`; a lone question as it is |
    | `chatglm2`                 | [gMASK] sop, text   | `[Round 1]\n\n问：…\n\n答：…`                      |
    | `chatglm3`                 | [gMASK] sop, text   | role, a line of metadata, content; tools           |

    In ChatGLM-6B special tokens may stand in text (`[MASK]`, `<eop>`, …), in ChatGLM2 and 3 they may not, as in the
    originals. In chats, messages never yield one. ChatGLM3's take `tools` (functions, JSON schemas or its own `{"name",
    "description", "parameters"}`), and messages may have `tool_calls`, the role `tool`, and ChatGLM3's own `metadata`, role
    `observation` and, in a system message, `tools`.

    Args:
        vocab_file: `ice_text.model` or `tokenizer.model`.
        generation: `"chatglm_early"`, `"chatglm"`, `"chatglm2"` or `"chatglm3"`; by default recognized.
        num_image_tokens: ids in front of ChatGLM-6B's text vocabulary; by default 20,000 in the early revision.
        encode_special_tokens: ChatGLM3: whether the four role tokens are read from text. May be set at any time.
        do_lower_case, remove_space: ChatGLM-6B: lower-case the text; squeeze its white space.
        control_token_ids: ids of the control tokens as `save_pretrained` writes them, which the vocabulary must give them.
        gmask_token, end_token, eop_token: accepted as in the original configurations; they have one value each.

    Raises:
        ValueError: a vocabulary file is missing, damaged, of another family or not of this `generation`, or nothing
            tells the generation.
    """

    vocab_files_names = {"vocab_file": TOKENIZER_MODEL, "ice_text_file": ICE_TEXT, "tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    padding_side = "left"
    model_type = "chatglm"
    PUBLISHED_SIZES = {130_528: 130_344, 150_528: 150_344, 65_024: PUBLISHED_PIECES + 5}
    encodes_messages_alone = False  # the templates say where a text ends
    gmask_token, end_token, eop_token = "[gMASK]", "</s>", "<eop>"
    gMASK_token = gmask_token  # the early revision's spelling

    def __init__(
        self,
        vocab_file: str | os.PathLike | None = None,
        *,
        ice_text_file: str | os.PathLike | None = None,
        tokenizer_file: str | os.PathLike | None = None,
        tokenizer_object: Tokenizer | None = None,
        generation: str | None = None,
        num_image_tokens: int | None = None,
        encode_special_tokens: bool = False,
        do_lower_case: bool = False,
        remove_space: bool = False,
        control_token_ids: Mapping[str, int] | None = None,
        **kwargs: Any,
    ):
        if vocab_file is not None and ice_text_file is not None:
            raise ValueError(
                f"{vocab_file} and {ice_text_file} are two vocabularies: remove the one that is not used."
            )
        check_settings(
            "ChatGLMTokenizer",
            {
                "num_image_tokens": num_image_tokens,
                "encode_special_tokens": encode_special_tokens,
                "do_lower_case": do_lower_case,
                "remove_space": remove_space,
                "control_token_ids": control_token_ids,
            },
        )
        vocab_file = ice_text_file if vocab_file is None else vocab_file
        if vocab_file is not None and generation is None:
            tokenizer_file = None  # not written by this class, so it may read special tokens from text
        if tokenizer_file is None and tokenizer_object is None:
            if vocab_file is None:
                raise ValueError(f"ChatGLMTokenizer: neither {ICE_TEXT} nor {TOKENIZER_MODEL} was found.")
            self._sentencepiece = SentencePieceModel.from_file(vocab_file)
            generation = recognize_version(self._sentencepiece, os.fspath(vocab_file), generation, kwargs)
        if generation not in VERSIONS:
            raise ValueError(
                f"generation is {generation!r}, but must be one of {', '.join(VERSIONS)}: {tokenizer_file} does "
                f"not say which one it is of. Put {ICE_TEXT} or {TOKENIZER_MODEL} beside it, or pass generation=…"
            )
        if num_image_tokens is None:
            num_image_tokens = IMAGE_TOKENS if generation == "chatglm_early" else 0
        self.generation, self.num_image_tokens = generation, num_image_tokens
        self.do_lower_case, self.remove_space = do_lower_case, remove_space
        version = self._version
        self.vocab_files_names = {"vocab_file": version.vocab_file, "tokenizer_file": "tokenizer.json"}
        kwargs = without_control_names(kwargs)
        self._named = {name: kwargs.pop(name, token) for name, token in version.special_tokens.items()}
        names = ("num_image_tokens", "do_lower_case", "remove_space") if version.is_ice else ()
        kwargs |= {name: getattr(self, name) for name in names}
        if generation == "chatglm3":
            kwargs["encode_special_tokens"] = encode_special_tokens
        kwargs.setdefault("clean_up_tokenization_spaces", version.cleans_up)
        kwargs.setdefault("model_input_names", list(version.input_names))
        super().__init__(vocab_file, tokenizer_file, tokenizer_object, generation=generation, **self._named, **kwargs)
        if control_token_ids is not None and tokenizer_object is None:
            ids = {index: token for token, index in control_token_ids.items()}
            check_added_tokens(self._tokenizer, ids, str(tokenizer_file or vocab_file))
        if encode_special_tokens:
            self.encode_special_tokens = True
        if self.chat_template is None:
            self.chat_template = read_template(version.template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *init_inputs, **kwargs):
        if is_for_pipeline(kwargs):  # which pads no rows of two dimensions; the models find the positions themselves
            kwargs.setdefault("model_input_names", ["input_ids", "attention_mask"])
        return super().from_pretrained(pretrained_model_name_or_path, *init_inputs, **kwargs)

    @property
    def _version(self) -> ChatGLMVersion:
        return VERSIONS[self.generation]

    def read_model(self, vocab_file: str) -> SentencePieceModel:
        model = self.__dict__.pop("_sentencepiece")
        return with_ice_pieces(model, self.num_image_tokens) if self._version.is_ice else model

    def backend_of(self, model: SentencePieceModel) -> Tokenizer:
        if not self._version.is_ice:
            return build_bpe_backend(model, self._version)
        backend = build_ice_backend(model, self.do_lower_case, self.remove_space)
        named = [str(token) for token in self._named.values() if token is not None]
        backend.add_special_tokens([taking_spaces(token) for token in named if backend.token_to_id(token) is not None])
        return backend

    def use_original(self, vocab_file: str, backend: Tokenizer, model: SentencePieceModel | None = None) -> None:
        options: dict[str, Any] = {}
        if self._version.is_ice:
            if self.do_lower_case or self.remove_space:
                return
            extend = partial(with_ice_pieces, num_image_tokens=self.num_image_tokens)
            options = {"extend": extend, "prepare": write_white_space, "written": WHITE_SPACE, "lost": STAND_INS}
        super().use_original(vocab_file, backend, model, **options)

    @property
    def MODEL_TOKENS(self) -> dict[str, tuple[str, ...]]:
        return ICE_TEXT_MODEL_TOKENS if self._version.is_ice else {}

    def check_backend(self, config: Mapping[str, Any], source: str | None) -> None:
        engine, ids = self._tokenizer.model, self._tokenizer.get_vocab(with_added_tokens=False)
        if self._version.is_ice:
            is_ours = isinstance(engine, Unigram) and "<n>" in ids and ids.get("<unk>") == self.num_image_tokens
            embeddings = config.get("vocab_size")
            if self.num_image_tokens and isinstance(embeddings, int) and len(ids) > embeddings:
                raise ValueError(
                    f"num_image_tokens is {self.num_image_tokens} in tokenizer_config.json, but config.json beside it is that of "
                    f"a model without so many ids (vocab_size {embeddings}). Set it to that checkpoint's: 0, or "
                    f"{IMAGE_TOKENS} in the early revision."
                )
        else:
            is_ours = isinstance(engine, BPE) and engine.byte_fallback and ids.get("<unk>") == 0
            is_ours = is_ours and (ROLES[0] in ids) == (self.generation == "chatglm3")
        is_ours = is_ours and ids.keys() >= {*self._version.control, "<s>", "</s>"}
        if not is_ours:
            raise ValueError(
                f"{source} is not a vocabulary of {self.generation}, which tokenizer_config.json and what stands beside it "
                f"say it is: it has other pieces or rules. {DOWNLOAD_AGAIN}."
            )

    def listed_tokens(self, added: Mapping[Any, Any]) -> Mapping[Any, Any]:
        """Without those of the published vocabulary, if this is another one that goes with its settings."""
        if self._version.is_ice or self._tokenizer.id_to_token(FIRST_MERGED[0]) == FIRST_MERGED[1]:
            return added
        published = dict(enumerate(self._version.control, PUBLISHED_PIECES))
        return {index: token for index, token in added.items() if published.get(index) != str(token)}

    def is_settled(self, token: str) -> bool:
        return self._tokenizer.model.token_to_id(token) is not None  # also which of them text may contain

    def settings_to_save(self) -> dict[str, Any]:
        return super().settings_to_save() | {"control_token_ids": self.control_tokens}

    @property
    def control_tokens(self) -> dict[str, int]:
        """Control token -> id. In ChatGLM2 and 3 text never yields one."""
        return {token: self._tokenizer.token_to_id(token) for token in self._version.control}

    def get_added_vocab(self) -> dict[str, int]:
        """Tokens that were added, and the control tokens, which are pieces of the backend's vocabulary here."""
        return self.control_tokens | super().get_added_vocab()

    @property
    def encode_special_tokens(self) -> bool:
        return any(token.content == ROLES[0] for token in self.added_tokens_decoder.values())

    @encode_special_tokens.setter
    def encode_special_tokens(self, value: bool) -> None:
        if value == self.encode_special_tokens:
            return
        self._require("encode_special_tokens", "chatglm3")
        if value:
            self._tokenizer.add_tokens([AddedToken(role, normalized=False, special=False) for role in ROLES])
        else:  # tokens cannot be taken from a backend
            state = json.loads(self._tokenizer.to_str())
            state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in ROLES]
            self._tokenizer = Tokenizer.from_str(json.dumps(state))

    gmask_token_id, end_token_id, eop_token_id = id_of(gmask_token), id_of(end_token), id_of(eop_token)

    # The originals' names for their parts.

    name = "GLMTokenizer"
    preprocess_text = instead_use("every call does it, as `do_lower_case` and `remove_space` say.")

    @property
    def tokenizer(self) -> Any:
        """ChatGLM2 and 3: the vocabulary file alone. ChatGLM-6B, whose is called `sp_tokenizer`, is its own, as nothing that
        a property raises would get past transformers' `__getattr__`."""
        return self if self._version.is_ice else SPTokenizer(self)

    @property
    def sp_tokenizer(self) -> Any:
        """ChatGLM-6B: the vocabulary file alone. ChatGLM2's and 3's is called `tokenizer`."""
        return IceTokenizer(self) if self._version.is_ice else self.tokenizer

    @property
    def special_tokens(self) -> dict[str, int]:
        """ChatGLM2 and 3: the usual names for ids; the control tokens are in `control_tokens`."""
        return {name: self.get_command(name) for name in ("<bos>", "<eos>", "<pad>")}

    def get_command(self, token: str) -> int:
        """Id of a control token, `"<|user|>"` say; `"<bos>"`, `"<eos>"`, `"<pad>"`, `"<unk>"` name the usual ones.

        Raises:
            ValueError: it is none of this version's.
        """
        usual = {"<bos>": "<s>", "<eos>": "</s>", "<pad>": self.pad_token, "<unk>": "<unk>"}
        token = usual.get(token, token)
        if token not in (*self._version.control, "<s>", *usual.values()):
            raise ValueError(f"{token!r} is not a special token of {self.generation}.")
        return self._tokenizer.token_to_id(token)

    def get_prefix_tokens(self) -> list[int]:
        """ChatGLM2 and 3: ids of `[gMASK] sop`, which every text begins with."""
        self._require("get_prefix_tokens", "chatglm2", "chatglm3")
        return [self.get_command("[gMASK]"), self.get_command("sop")]

    def _require(self, what: str, *generations: str) -> None:
        if self.generation not in generations:
            raise ValueError(
                f"{what} is for {' and '.join(generations)}; this tokenizer's generation is {self.generation}."
            )

    def update_post_processor(self) -> None:
        """Where the special tokens go is a matter of the version alone."""
        self._add_bos_token = self._add_eos_token = False
        self._end_texts_with(self._version.ending)

    def _end_texts_with(self, ending: str) -> None:
        usual, single, pair = self._version.ending, self._version.single, self._version.pair
        surround_texts(self._tokenizer, *(layout.replace(usual, ending).split() for layout in (single, pair)))

    @contextmanager
    def _early_ending(self, ids: list[int]) -> Iterator[int]:
        """Puts behind texts what the early revision has behind `ids`: [gMASK] only where there is no [MASK] to fill.
        Yields how many tokens that are."""
        mask = self.get_command("[MASK]")
        ending = self._version.ending if mask not in ids else "<sop>" if ids[-1] == mask else "</s> <sop>"
        self._end_texts_with(ending)
        try:
            yield len(ending.split())
        finally:
            self.update_post_processor()

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        if self.generation != "chatglm_early":
            return super().build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        with self._early_ending([*token_ids_0, *(token_ids_1 or [])]):
            return super().build_inputs_with_special_tokens(token_ids_0, token_ids_1)

    def _encode_texts(self, text, text_pair=None, add_special_tokens: bool = True, **kwargs: Any) -> BatchEncoding:
        batch = super()._encode_texts(text, text_pair, add_special_tokens=add_special_tokens, **kwargs)
        has_own_endings = self.generation == "chatglm_early" and add_special_tokens
        if not has_own_endings or "[MASK]" not in repr((text, text_pair)):
            return batch
        contents = [
            [index for index, added in zip(row.ids, row.special_tokens_mask, strict=True) if not added]
            for row in batch.encodings
        ]
        if not any(self.get_command("[MASK]") in ids for ids in contents):
            return batch
        return self._encode_with_endings(text, text_pair, contents, **kwargs)

    def _encode_with_endings(
        self,
        text,
        text_pair,
        contents,
        padding_strategy="do_not_pad",
        max_length=None,
        return_tensors=None,
        **kwargs: Any,
    ) -> BatchEncoding:
        """Each text, which has the ids `contents`, with an ending of its own; truncation makes room for the usual two."""
        options = {name: kwargs.pop(name) for name in ENCODING_OPTIONS if name in kwargs}
        padding = {name: kwargs.pop(name, None) for name in ("pad_to_multiple_of", "padding_side")}
        is_batched = isinstance(text[0] if options.get("is_split_into_words") else text, (list, tuple))
        texts, pairs = (text, text_pair or repeat(None)) if is_batched else ([text], [text_pair])
        encodings: list[Encoding] = []
        for one, other, ids in zip(texts, pairs, contents, strict=False):
            with self._early_ending(ids) as added:
                room = None if max_length is None else max_length - 2 + added
                pair = None if other is None else [other]
                # Offsets, so that the backend does it, which has the ending.
                batch = super()._encode_texts([one], pair, max_length=room, return_offsets_mapping=True, **options)
                encodings += batch.encodings
        self.pad_encodings(encodings, padding_strategy, max_length, **padding)
        return self.batch_of(encodings, is_batched, return_tensors, **kwargs)

    def _convert_encoding(self, encoding: Encoding, *args: Any, **kwargs: Any):
        data, encodings = super()._convert_encoding(encoding, *args, **kwargs)
        for row in encodings:
            for name, column in self._columns_of(row.ids, row.attention_mask).items():
                data[name].append(column)
        return data, encodings

    def _columns_of(self, ids: list[int], attention_mask: list[int]) -> dict[str, list]:
        return (
            {"position_ids": self._positions(ids, attention_mask)} if "position_ids" in self.model_input_names else {}
        )

    def _pad(self, encoded_inputs, *args: Any, padding_side: str | None = None, **kwargs: Any) -> dict:
        ids = encoded_inputs["input_ids"]
        if "position_ids" in self.model_input_names and "position_ids" not in encoded_inputs:
            attention_mask = encoded_inputs.get("attention_mask") or [1] * len(ids)
            encoded_inputs["position_ids"] = self._positions(ids, attention_mask)
        padded = super()._pad(encoded_inputs, *args, padding_side=padding_side, **kwargs)
        if "position_ids" in padded:
            missing = len(padded["input_ids"]) - len(ids)
            sides = (missing, 0) if (padding_side or self.padding_side) == "left" else (0, missing)
            positions = np.array(padded["position_ids"])
            padded["position_ids"] = np.pad(positions, [(0, 0)] * (positions.ndim - 1) + [sides]).tolist()
        return padded

    def _positions(self, ids: list[int], attention_mask: list[int]) -> list:
        """Positions of one row, `[length]` or, in ChatGLM-6B, `[2][length]`; 0 where there is padding.

        ChatGLM-6B: row 0 counts the context and stays, from <sop> on, at the first [MASK] (else [gMASK]); row 1 is 0
        in the context and counts from 1 from <sop> on.
        """
        start = attention_mask.index(1) if 1 in attention_mask else len(ids)
        real = ids[start : start + sum(attention_mask)]
        rows = [[*range(len(real))]]
        if self._version.is_ice:
            bos, mask, gmask = map(self._tokenizer.token_to_id, ("<sop>", "[MASK]", "[gMASK]"))
            context = real.index(bos) if bos in real else len(real)
            blank = mask if mask in real else gmask
            if blank in real:
                rows[0][context:] = [real.index(blank)] * (len(real) - context)
            rows.append([*[0] * context, *range(1, len(real) - context + 1)])
        missing = len(ids) - len(real)
        if missing:
            rows = [[*[0] * start, *row, *[0] * (missing - start)] for row in rows]
        return rows if len(rows) > 1 else rows[0]

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        """Text of the ids, without those that are negative (the padding of labels). Special tokens are no text, as in the
        originals, but a single one that is no list has its name: lm_eval, for one, asks for that of the end token."""
        if isinstance(token_ids, int) and not skip_special_tokens and token_ids in self.all_special_ids:
            return str(self.convert_ids_to_tokens(token_ids))
        ids = [index for index in as_list(token_ids) if index >= 0]
        if skip_special_tokens and self._version.keeps_unknown:
            skipped = set(self.all_special_ids) - {self.unk_token_id}
            ids, skip_special_tokens = [index for index in ids if index not in skipped], False
        return super()._decode(ids, skip_special_tokens, clean_up_tokenization_spaces, **kwargs)

    def convert_tokens_to_string(self, tokens: Iterable[str | None]) -> str:
        tokens = known(tokens)
        text = self._tokenizer.decoder.decode(mend_bytes(tokens))
        if self.generation != "chatglm3":
            return text
        if ASSISTANT not in tokens:
            return Answer.of([text])
        # Decoding depends on what stands around a token, so the turns are parted in the text of all of them.
        (mark,) = unused_characters(text)
        marked = [mark if token == ASSISTANT else token for token in tokens]
        return Answer.of(self._tokenizer.decoder.decode(mend_bytes(marked)).split(mark))

    def clean_up_tokenization(self, text: str) -> str:
        clean_up = super().clean_up_tokenization
        return Answer.of(map(clean_up, text.turns)) if isinstance(text, Answer) else clean_up(text)

    def chat_control_pieces(self) -> Iterable[str]:
        return [*self._version.control, "</s>"]

    def _without_control_tokens(self, control: Collection[str]) -> Tokenizer:
        plain = super()._without_control_tokens(control)
        if self._version.is_ice and self._tokenizer.normalizer:
            rules = symbols_as_text(plain, self._tokenizer.normalizer)
            plain.normalizer = self.library.normalizer_like(rules, are_symbols_text=True) if self.library else rules
        return plain

    def read_messages(self, conversation: Any) -> list[dict[str, Any]]:
        return (as_chatglm3_messages if self.generation == "chatglm3" else plain_messages)(conversation)

    def read_tools(self, tools: Any) -> Any:
        return as_chatglm3_tools(tools)

    def build_prompt(self, query: str, history: Sequence[tuple[str, str]] | None = None) -> str:
        """ChatGLM-6B and ChatGLM2: the text that asks `query` after `history`, (query, response) each."""
        self._require("build_prompt", "chatglm_early", "chatglm", "chatglm2")
        prompt = self.apply_chat_template(as_messages(query, history), tokenize=False)
        return prompt.without_prefix() if isinstance(prompt, RenderedChat) else prompt.removeprefix("[gMASK]sop")

    def build_single_message(self, role: str, metadata: str, message: str) -> list[int]:
        """ChatGLM3: ids of one turn, without prefix: the role, a line of `metadata`, and `message` as plain text."""
        self._require("build_single_message", "chatglm3")
        if f"<|{role}|>" not in ROLES:
            raise ValueError(f"role is {role!r}, but must be one of system, user, assistant, observation.")
        return [self.get_command(f"<|{role}|>"), *self.encode_message(f"{metadata}\n"), *self.encode_message(message)]

    def build_chat_input(
        self, query: str, history: Sequence[dict[str, Any]] | None = None, role: str = "user"
    ) -> BatchEncoding:
        """ChatGLM3: the model's input, tensors `[1, length]`, for answering `query` after the messages `history`."""
        self._require("build_chat_input", "chatglm3")
        messages = [*(history or []), {"role": role, "content": query}]
        return self.apply_chat_template([messages], add_generation_prompt=True, return_tensors="pt")
