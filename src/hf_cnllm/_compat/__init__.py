"""transformers' insides: the only folder that imports them or knows about versions.

Everything else imports `transformers`' documented top level, or from here, and reads as if only the newest release
existed. An entry without a version is the same in all supported ones; the others say from or until which version they
are needed. `_contract.py` checks what is relied on here when the installed release is newer than `NEWEST_TESTED`.

Here is what registration, configurations and tokenizers need. What models need is in `modeling.py`: with it come all of
transformers' models' foundations, which whoever needs a tokenizer does not wait for.
"""

# ruff: noqa: F401  (others import these from here)

import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import HfHubHTTPError
from packaging.version import Version
from tokenizers import Encoding

OLDEST = Version("5.16.1")
NEWEST_TESTED = Version("5.24.0")
INSTALLED = Version(transformers.__version__)

TESTED = f"transformers {OLDEST} to {NEWEST_TESTED}"
PIP_INSTALL = f'pip install "transformers>={OLDEST},<={NEWEST_TESTED}"'

if INSTALLED < OLDEST:
    raise ImportError(f"hf_cnllm needs transformers {OLDEST} or newer, but {INSTALLED} is installed: {PIP_INSTALL}")


@contextmanager
def insides() -> Iterator[None]:
    """Around imports of transformers' insides: an ImportError says which versions have them."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"transformers {INSTALLED} has changed what hf_cnllm builds on ({error}). It works with {TESTED}: {PIP_INSTALL}"
        ) from error


with insides():
    from transformers import AutoTokenizer, BatchEncoding
    from transformers.modeling_rope_utils import RopeParameters
    from transformers.models.auto.tokenization_auto import (
        TOKENIZER_MAPPING_NAMES,
        get_tokenizer_config,
        tokenizer_class_from_name,
    )
    from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME, PushToHubMixin, logging

    # The halves of `apply_chat_template`: chats are rendered, and encoded in sections of our own.
    from transformers.utils.chat_template_utils import get_json_schema, render_jinja_template

# Whether this file is one that `remote_code=True` put beside a checkpoint, and transformers runs from there.
IS_COPY = __name__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")

# What `generate` calls the cache: until 5.23 by its old name, which 5.24 changed everywhere.
OLD_CACHE_NAME = "past_key_values"
CACHE_NAMES = ("cache", OLD_CACHE_NAME)
CACHE = "cache" if Version("5.24.0.dev0") <= INSTALLED else OLD_CACHE_NAME


class UnsupportedTransformersError(RuntimeError):
    """The installed transformers has changed what this package builds on."""


@functools.cache
def check_transformers() -> None:
    """Called when a model or tokenizer is made; looks once, and only at a transformers newer than the newest tested.

    Raises:
        UnsupportedTransformersError: naming what changed, the tested versions and the command that installs one of them.
    """
    if INSTALLED <= NEWEST_TESTED:
        return
    from .._contract import broken_promises

    if broken := broken_promises():
        raise UnsupportedTransformersError(
            f"transformers {INSTALLED} has changed what hf_cnllm builds on: {'; '.join(broken)}. "
            f"hf_cnllm works with {TESTED}: {PIP_INSTALL}"
        )
    warnings.warn(
        f"transformers {INSTALLED} is newer than {NEWEST_TESTED}, the newest that hf_cnllm was tested with. What it builds "
        "on has been checked and still holds.",
        stacklevel=2,
    )


# --- names ------------------------------------------------------------------------------------------------------------


def registered(auto_class: Any, config_class: type) -> Any:
    """The model class that an auto class has for a configuration; None if there is none."""
    return auto_class._model_mapping.get(config_class, None)


_named: dict[str, Any] = {}


def name_in_transformers(model_class: Any, in_place_of: Any = None) -> None:
    """Makes `transformers.<name>` a class of ours, unless there is one of that name other than `in_place_of`. TRL, `transformers
    serve`, pipelines and vLLM look up what a config.json has in `architectures` there, and there is no way to register a name
    (until 5.24)."""
    for module in (transformers, sys.modules["transformers"]):
        if getattr(module, model_class.__name__, in_place_of) is in_place_of:
            setattr(module, model_class.__name__, model_class)
            _named[model_class.__name__] = model_class


def keep_names_in_transformers() -> None:
    """`transformers.processing_utils`, which comes with the first model, puts a second module in the place of the first, which
    others hold by then as we do. A configuration is made before a name of its `architectures` is looked up: then this gives
    the second module the names of the first."""
    for name, model_class in _named.items():
        vars(sys.modules["transformers"]).setdefault(name, model_class)


# --- publishing -------------------------------------------------------------------------------------------------------


# Of what reaches the Hub: httpx's, from huggingface_hub 2 on httpx2's.
HTTPError = HfHubHTTPError.__bases__[0]


class PublishingHooks:
    """Stands in front of what has a `push_to_hub`: its private hook, under a name of our own."""

    def before_upload(self, folder: Path, repo_id: str) -> None:
        """Sees a folder that is saved and about to be uploaded, with the card that transformers made."""

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        self.before_upload(Path(working_dir), repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def training_summary(trainer) -> Any:
    """What transformers' own model cards say of a Trainer's run."""
    from transformers.modelcard import TrainingSummary

    return TrainingSummary.from_trainer(trainer, license="other")  # or it would ask the Hub for the base model's


def reporting_callbacks(report_to: Any) -> list:
    """The callback classes of what `TrainingArguments(report_to=…)` names: TensorBoard and the like."""
    from transformers.integrations import get_reporting_integration_callbacks

    return get_reporting_integration_callbacks(report_to)


def tensor_parallel_config(size: int) -> Any:
    """The `distributed_config` of `from_pretrained` that cuts weights among so many processes as they are read."""
    from transformers.distributed import DistributedConfig

    return DistributedConfig(tp_size=size)


# --- tokenizers -------------------------------------------------------------------------------------------------------


# How `from_pretrained` finds files.
FILE_OPTIONS = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")


class TokenizerHooks:
    """Stands in front of `PreTrainedConfig`: what `AutoTokenizer` asks the configuration beside a tokenizer, which is
    `model_name` before it reads anything, and `tokenizer_class` where tokenizer_config.json names none. By then the caller's
    `trust_remote_code` is out of reach, and so is the choice of a class that the checkpoint names."""

    own_tokenizer: str | None = None
    """Class of the tokenizer where neither tokenizer_config.json nor config.json names one."""
    own_vocabularies: tuple[str, ...] = ()
    """Files that are nothing without a tokenizer_config.json which names the class, or has one of `own_settings`."""
    own_settings: tuple[str, ...] = ()

    def check_tokenizer(self) -> None:
        """Refuses a checkpoint whose files would make `AutoTokenizer` run code or take transformers' generic class.

        Raises:
            ValueError: naming the file and the key to set.
        """
        name = getattr(self, "name_or_path", None)
        if not name or IS_COPY:  # who runs a copy has trusted the folder
            return
        options = options_of_tokenizer(name)
        settings = get_tokenizer_config(name, **options)
        if not isinstance(settings, dict):
            raise ValueError(f"tokenizer_config.json in {name} is not an object with keys. Download it again.")
        class_name, auto_map = settings.get("tokenizer_class"), settings.get("auto_map")
        code = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
        found = None
        if isinstance(class_name, str):
            names = (class_name.removesuffix("Fast"), class_name)
            found = next(filter(None, map(tokenizer_class_from_name, names)), None)
        is_ours = found is not None and not found.__module__.startswith("transformers.")
        folder = os.path.join(name, options.get("subfolder") or "")
        has_vocabulary = any(os.path.isfile(os.path.join(folder, file)) for file in self.own_vocabularies)
        fault = None
        if code and not is_ours:
            fault = f"points to code (`auto_map`), which is never run, and its `tokenizer_class` is {class_name!r}"
        elif class_name is not None and found is None:
            fault = f"names a `tokenizer_class` that there is not, {class_name!r}"
        # transformers knows the model_type of GLM for that of GLM-4, and takes its generic class unless there is code.
        elif is_ours and not code and TOKENIZER_MAPPING_NAMES.get(self.model_type):  # type: ignore[attr-defined]
            fault = "has no `auto_map`, so that AutoTokenizer takes it for GLM-4's"
        elif class_name is None and not settings.keys() & set(self.own_settings) and has_vocabulary:
            fault = "is missing, or names no `tokenizer_class`"
        if fault:
            ours = self.own_tokenizer or (found.__name__ if is_ours and found else "GLMChineseTokenizer, say")
            raise ValueError(
                f"tokenizer_config.json in {name} {fault}. Load the tokenizer with its class of this package "
                f"({ours}) and save it again, or download the file again."
            )

    @property
    def model_name(self) -> Any:
        self.check_tokenizer()
        if "model_name" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no attribute 'model_name'")
        return vars(self)["model_name"]

    @model_name.setter
    def model_name(self, value: Any) -> None:
        vars(self)["model_name"] = value

    @property
    def tokenizer_class(self) -> str | None:
        recorded = vars(self).get("tokenizer_class")
        if recorded is None:
            self.check_tokenizer()
        return recorded or self.own_tokenizer

    @tokenizer_class.setter
    def tokenizer_class(self, value: str | None) -> None:
        vars(self)["tokenizer_class"] = value


def options_of_tokenizer(name: str) -> dict[str, Any]:
    """By what the caller of `AutoTokenizer` has the files of `name` found, which it hands to nobody: a checkpoint is looked at
    where it will be read from, be that another cache, folder or revision. Others are given what is there."""
    here, frame = (AutoTokenizer.__module__, "from_pretrained"), sys._getframe().f_back
    while frame is not None:
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) == here:
            given = frame.f_locals
            if str(given.get("pretrained_model_name_or_path")) == name:
                kwargs = given.get("kwargs", {})  # `_contract` sees to it that they are there
                return {option: kwargs[option] for option in FILE_OPTIONS if option in kwargs}
        frame = frame.f_back
    return {"local_files_only": True}


def is_for_pipeline(arguments: dict[str, Any]) -> bool:
    """Whether `pipeline(...)` is what loads a tokenizer with these arguments of `from_pretrained`."""
    return arguments.get("_from_pipeline") is not None


class LateEncodings(BatchEncoding):
    """A batch of a fast tokenizer whose encodings are worked out when they are first asked for: all that `BatchEncoding` knows
    of them is in its attribute `_encodings`."""

    is_fast = True

    def __init__(self, data: dict[str, Any], encode: Callable[[], list[Encoding]], tensor_type: Any = None):
        self._encode = encode
        super().__init__(data, None, tensor_type, n_sequences=1)

    @property
    def _encodings(self) -> list[Encoding] | None:
        if self._found is None:
            self._found = self._encode()
        return self._found

    @_encodings.setter
    def _encodings(self, encodings: list[Encoding] | None) -> None:
        self._found = encodings
