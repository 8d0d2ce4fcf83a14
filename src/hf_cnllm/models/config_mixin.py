"""What every configuration of this package does the same way when it meets a checkpoint's `config.json`."""

from typing import Any


class CheckpointConfigMixin:
    """Put in front of `PreTrainedConfig`: refuses another family's checkpoint and writes no pointers to remote code."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Builds the configuration from a checkpoint's `config.json`.

        Raises:
            ValueError: `config_dict["model_type"]` names another family.
        """
        found = config_dict.get("model_type")
        if found not in (None, cls.model_type):
            raise ValueError(
                f"This checkpoint's `model_type` is {found!r}, but {cls.__name__} reads {cls.model_type!r} checkpoints. "
                "Load it with AutoModel*.from_pretrained, or with the classes of its own family."
            )
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As `PreTrainedConfig.to_dict`, without `auto_map`: the code files it points to are not saved with the model."""
        output = super().to_dict()
        output.pop("auto_map", None)
        return output
