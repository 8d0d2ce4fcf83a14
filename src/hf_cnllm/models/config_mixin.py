"""What every configuration of this package does the same way when it meets a checkpoint's `config.json`."""

from typing import Any

from transformers import PreTrainedConfig

from .._compat import TokenizerHooks

COMMON_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


class CheckpointConfigMixin(TokenizerHooks):
    """Put in front of `PreTrainedConfig`: refuses another family's checkpoint and writes no pointers to remote code."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Builds the configuration from a checkpoint's `config.json`. Keyword arguments go before it, by whichever of its
        names a field has there, and before what is derived from it.

        Raises:
            ValueError: `config_dict["model_type"]` names another family.
        """
        found = config_dict.get("model_type")
        if found not in (None, cls.model_type):
            raise ValueError(
                f"This checkpoint's `model_type` is {found!r}, but {cls.__name__} reads {cls.model_type!r} checkpoints. "
                "Load it with AutoModel*.from_pretrained, or with the classes of its own family."
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
            if fields.setdefault(field, value) != value:
                raise ValueError(
                    f"The configuration contradicts itself: `{field}` has two values, {fields[field]} and {value}, one "
                    f"of them under another name ({', '.join(k for k, v in cls.attribute_map.items() if v == field)}). "
                    "Keep one."
                )

    def to_dict(self) -> dict[str, Any]:
        """As `PreTrainedConfig.to_dict`, without `auto_map`: the code files it points to are not saved with the model."""
        output = super().to_dict()
        output.pop("auto_map", None)
        return output

    def check_positive(self, *fields: str) -> None:
        """Refuses sizes that are not positive; None is none.

        Raises:
            ValueError: naming the field.
        """
        for field in fields:
            value = getattr(self, field)
            if value is not None and value <= 0:
                raise ValueError(f"`{field}` must be a positive number, got {value}.")

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
