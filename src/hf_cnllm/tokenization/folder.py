"""What a tokenizer's files must agree on: its settings, its vocabulary, and what stands beside them in the folder."""

import codecs
import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ..hub.saving import write_json

MODEL_TYPES = ("baichuan", "chatglm", "glm", "glm130b", "qwen")
NAMED_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
DOWNLOAD_AGAIN = "Download the files of one checkpoint again, or save the tokenizer again"


class Folder:
    """The JSON files beside a vocabulary."""

    def __init__(self, vocabulary: str | os.PathLike | None):
        self.path = None if vocabulary is None else Path(vocabulary).parent
        self.read = cache(self._read)

    def _read(self, name: str) -> dict[str, Any]:
        """The keys of a file; none if it is not there.

        Raises:
            ValueError: the file is damaged.
        """
        if self.path is None or not (self.path / name).is_file():
            return {}
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.path / name} is damaged ({error}). Download it again.") from error
        return content if isinstance(content, dict) else {}

    def model_config(self, model_type: str) -> dict[str, Any]:
        """The keys of `config.json`, if it is of that type.

        Raises:
            ValueError: it is that of another family of this package.
        """
        config = self.read("config.json")
        found = str(config.get("model_type")).removeprefix("hf_cnllm_")  # see GLMConfig.written_model_type
        if found != model_type and found in MODEL_TYPES:
            raise ValueError(
                f"{self.path}: config.json is that of a model of type {found!r}, and the tokenizer is one for {model_type!r}. "
                f"{DOWNLOAD_AGAIN}."
            )
        return config if found == model_type else {}

    def names_token(self, role: str, token: str) -> bool:
        """Whether a configuration file here says that `token` is the `role`, `"eos_token"` say."""
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            value = self.read(name).get(role)
            if token == (value.get("content") if isinstance(value, dict) else value):
                return True
        return False


# ---- settings ----


def _is_error_handler(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(codecs.lookup_error(value))
    except LookupError:
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Settings that a checkpoint gives: what they must be, and whether they are. None is always fine: it means the default.
_SWITCH = ("true or false", lambda value: isinstance(value, bool))
_SIDE = ("'left' or 'right'", lambda value: value in ("left", "right"))
_TOKEN = ("a token", lambda value: isinstance(value, str | AddedToken) and str(value) != "")
_TOKENS = ("a list of tokens", lambda value: isinstance(value, dict | list | tuple))
SETTINGS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces", "split_special_tokens"), _SWITCH
    ),
    **dict.fromkeys(("add_prefix_space", "do_lower_case", "strip_accents", "tokenize_chinese_chars"), _SWITCH),
    **dict.fromkeys(("remove_space", "first_revision", "encode_special_tokens"), _SWITCH),
    **dict.fromkeys(("padding_side", "truncation_side"), _SIDE),
    **dict.fromkeys(NAMED_TOKENS, _TOKEN),
    **dict.fromkeys(("extra_special_tokens", "additional_special_tokens"), _TOKENS),
    "errors": ("a way to handle errors as of `bytes.decode`, 'replace' say", _is_error_handler),
    "model_max_length": ("a positive number", lambda value: _is_number(value) and value > 0),
    "num_image_tokens": ("a number from 0 on", lambda value: _is_number(value) and value >= 0 and value == int(value)),
    "control_token_ids": ("an object with keys", lambda value: isinstance(value, dict)),
    "sp_model_kwargs": ("an object with keys", lambda value: isinstance(value, dict)),
}


def check_settings(owner: str, settings: Mapping[str, Any]) -> None:
    """Refuses values that mean nothing.

    Raises:
        ValueError: naming the setting, its value and what it must be.
    """
    # transformers takes every text whose name ends in `_token`, that of add_bos_token too, for a token of the model's own.
    more = settings.get("model_specific_special_tokens")
    for name, value in {**(more if isinstance(more, dict) else {}), **settings}.items():
        what, is_valid = SETTINGS.get(name, ("", None))
        if is_valid and value is not None and not is_valid(value):
            raise ValueError(f"{owner}: `{name}` must be {what}, got {value!r}. Correct it in tokenizer_config.json.")


# ---- tokens and their ids ----


def check_named_tokens(
    folder: Folder, vocabulary: Callable[[str], int | None], settings: Mapping[str, Any], added: Mapping[Any, Any]
) -> None:
    """Refuses names of special tokens, as files of the folder give them, that its vocabulary does not have. The caller may
    name new ones, which are added.

    Raises:
        ValueError: naming the token.
    """
    known = set(map(str, added.values()))
    for role in NAMED_TOKENS:
        token = settings.get(role)
        if token is None or str(token) in known or vocabulary(str(token)) is not None:
            continue
        if folder.names_token(role, str(token)):
            raise ValueError(
                f"{folder.path}: `{role}` is {str(token)!r}, which is no token of the vocabulary. Correct it in "
                "tokenizer_config.json and special_tokens_map.json, or download the files again."
            )


def check_added_tokens(backend: Tokenizer, added: Mapping[Any, Any], source: str | None) -> None:
    """Refuses a vocabulary with which added tokens have other ids than the checkpoint gives them.

    Raises:
        ValueError: naming the token, both ids and the files.
    """
    for index, token in added.items():
        found = backend.token_to_id(str(token))
        if found != index:
            raise ValueError(
                f"tokenizer_config.json or added_tokens.json gives {token} the id {index}, but "
                f"with {source} it has {found}: that is cut, or of another tokenizer. {DOWNLOAD_AGAIN}."
            )


def check_model_config(
    backend: Tokenizer,
    config: Mapping[str, Any],
    tokens: Mapping[str, tuple[str, ...]],
    published: Mapping[int, int],
    source: str | None,
) -> None:
    """Refuses a vocabulary that is smaller than the model's: its control tokens have other ids, or it is a published one
    with entries missing. A model with fewer embeddings than the tokenizer has ids is not judged.

    Args:
        config: the keys of config.json.
        tokens: key of an id there -> the tokens that it can be the id of.
        published: number of embeddings -> number of ids.

    Raises:
        ValueError: naming the key, both numbers and the files.
    """
    embeddings = config.get("padded_vocab_size") or config.get("vocab_size")
    size = backend.get_vocab_size()
    if not isinstance(embeddings, int) or embeddings < size:
        return
    wanted = published.get(embeddings, 0)
    if size < wanted:
        raise ValueError(
            f"{source} gives {size} ids, but config.json beside it is that of a model with {wanted} (vocab_size {embeddings}): "
            f"the vocabulary is cut. {DOWNLOAD_AGAIN}."
        )
    for key, names in tokens.items():
        value, known = config.get(key), [index for name in names if (index := backend.token_to_id(name)) is not None]
        if isinstance(value, int) and known and value not in known:
            raise ValueError(
                f"config.json gives the {key} {value}, but with {source} {names[0]} has the id {known[0]}: that is cut, or of "
                f"another tokenizer. {DOWNLOAD_AGAIN}."
            )


def list_added_tokens(config_file: str, added: Mapping[int, AddedToken], **settings: Any) -> None:
    """Writes into `tokenizer_config.json` what transformers leaves to `tokenizer.json` alone: the added tokens, without which
    loading would parse the whole of that file in Python, and more `settings`."""
    config = json.loads(Path(config_file).read_text(encoding="utf-8"))
    config |= settings | {"added_tokens_decoder": {index: token.__getstate__() for index, token in added.items()}}
    write_json(Path(config_file), config, sort_keys=True)
