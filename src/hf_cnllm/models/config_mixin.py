"""What every configuration of this package does the same way when it meets a checkpoint's `config.json`."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from .._compat import CACHE, IS_COPY, TokenizerHooks, keep_names_in_transformers
from ..hub.publishing import needs_package
from .adapter_targets import AdapterTargets, add_peft_targets

# Keys that point to code in the checkpoint's folder, which transformers runs with `trust_remote_code=True`. Where that is
# what runs this file, it needs the key.
CODE_POINTERS = ("custom_pipelines",) if IS_COPY else ("auto_map", "custom_pipelines")

# The Hub's files name the backbone in `architectures` and the model that generates in `auto_map`. Tools look up the first.
GENERATION_MODELS = {
    "ChatGLMModel": "ChatGLMForConditionalGeneration",
    "GLMModel": "GLMForConditionalGeneration",
}

COMMON_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "loss_chunk_size",
)


class CheckpointConfigMixin(TokenizerHooks):
    """Put in front of `PreTrainedConfig`: refuses another family's checkpoint and keeps no pointers to remote code."""

    keys_to_ignore_at_inference = [CACHE]
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {}  # transformers' default is Llama's names

    written_model_type: ClassVar[str | None] = None
    """The `model_type` in files that are written, where the original one is also that of a model of transformers."""
    adapter_targets: ClassVar[AdapterTargets]

    def __post_init__(self, **kwargs):
        super().__post_init__(**{key: value for key, value in kwargs.items() if key not in CODE_POINTERS})
        for backbone, model in GENERATION_MODELS.items():
            if self.architectures == [backbone]:
                self.architectures = [model]
        keep_names_in_transformers()

    @classmethod
    def from_json_file(cls, json_file):
        config_dict, _ = cls.get_config_dict(json_file)
        return cls.from_dict(config_dict)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls.with_original_type(config_dict), kwargs

    @classmethod
    def with_original_type(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        if cls.written_model_type is not None and config_dict.get("model_type") == cls.written_model_type:
            return config_dict | {"model_type": cls.model_type}
        return config_dict

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Builds the configuration from a checkpoint's `config.json`. Keyword arguments go before it, by whichever of its
        names a field has there, and before what is derived from it.

        Raises:
            ValueError: `config_dict["model_type"]` names another family, or `config_dict` an attention kernel to download;
                only a caller does.
        """
        config_dict = cls.with_original_type(config_dict)
        found = config_dict.get("model_type")
        if found not in (None, cls.model_type):
            raise ValueError(
                f"This checkpoint's `model_type` is {found!r}, but {cls.__name__} reads {cls.model_type!r} checkpoints. "
                "Load it with AutoModel*.from_pretrained, or with the classes of its own family."
            )
        for key in ("attn_implementation", "_attn_implementation"):
            name = config_dict.get(key)
            if name not in (None, "eager") and not _is_attention_function(name):
                raise ValueError(
                    f"This config.json asks for the attention kernel {name!r} (`{key}`), and a checkpoint names no code to "
                    "load. Remove the key; if you trust the kernel, pass attn_implementation=... to from_pretrained."
                )
        own_fields = cls.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
        overrides = {key: kwargs.pop(key) for key in list(kwargs) if cls.field_name(key) in own_fields}
        overridden = {cls.field_name(key) for key in overrides}
        config_dict = {key: value for key, value in config_dict.items() if cls.field_name(key) not in overridden}
        return super().from_dict(config_dict | overrides, **kwargs)

    @classmethod
    def field_name(cls, key: str) -> str:
        """The field that `key` is another name of, or `key` itself."""
        return cls.attribute_map.get(key, key)

    @classmethod
    def check_aliases(cls, values: dict[str, Any]) -> None:
        """Refuses two values of one field under different names.

        Raises:
            ValueError: naming the field and its other names.
        """
        fields: dict[str, Any] = {}
        for key, value in values.items():
            field = cls.field_name(key)
            first = fields.setdefault(field, value)
            if first is not value and first != value:  # NaN is not equal to itself
                raise ValueError(
                    f"The configuration contradicts itself: `{field}` has two values, {first} and {value}, one "
                    f"of them under another name ({', '.join(k for k, v in cls.attribute_map.items() if v == field)}). "
                    "Keep one."
                )

    def to_dict(self) -> dict[str, Any]:
        """As `PreTrainedConfig.to_dict`, without pointers to code: the files they point to are not saved with the model. It is also
        what PEFT reads of a model before it looks for default targets."""
        add_peft_targets(self.model_type, self.adapter_targets)
        return {key: value for key, value in super().to_dict().items() if key not in CODE_POINTERS}

    def to_json_file(self, json_file_path, use_diff: bool = True):
        """As `PreTrainedConfig.to_json_file`. What is written says that it needs this package; see `hub.publishing`."""
        values = json.loads(self.to_json_string(use_diff))
        if auto_map := needs_package("AutoConfig"):
            values["auto_map"] = auto_map
        values["model_type"] = self.written_model_type or self.model_type
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(json.dumps(values, indent=2, sort_keys=True) + "\n")

    def validate_numbers(self):
        """Part of `@strict`-powered validation: no value is NaN or infinite, and no epsilon negative.

        Raises:
            ValueError: naming the field.
        """
        for field, number in _numbers(vars(self)):
            if not math.isfinite(number):
                raise ValueError(f"`{field}` must be a finite number, got {number}.")
            if field.endswith(("_eps", "_epsilon")) and number < 0:
                raise ValueError(f"`{field}` must not be negative, got {number}.")

    def set_missing(self, values: Mapping[str, Any]) -> None:
        """Gives fields that are None their values."""
        for field, value in values.items():
            if getattr(self, field) is None:
                setattr(self, field, value)

    def check_sizes(self, *others: str) -> None:
        """Refuses sizes that are not positive, those that all families have and `others`; None is none.

        Raises:
            ValueError: naming the field.
        """
        for name in (*COMMON_SIZES, *others):
            value = getattr(self, name, None)
            if value is not None and value <= 0:
                raise ValueError(f"`{self.field_name(name)}` must be a positive number, got {value}.")

    def check_whole_heads(self) -> None:
        """Refuses a `hidden_size` that heads cannot share evenly.

        Raises:
            ValueError: naming both fields.
        """
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) is not a multiple of `num_attention_heads` "
                f"({self.num_attention_heads})."
            )


def _is_attention_function(name: Any) -> bool:
    from .._compat.modeling import ALL_ATTENTION_FUNCTIONS  # with what models need: few files name one

    return isinstance(name, str) and name in ALL_ATTENTION_FUNCTIONS


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Every float in a configuration's value, with the path to it."""
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _numbers(item, f"{name}[{index}]")
