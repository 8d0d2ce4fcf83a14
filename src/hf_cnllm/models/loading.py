"""Loading a checkpoint that is damaged or not this family's: one clear error instead of a half-random model."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from .._contract import check_transformers


class CheckpointLoadingMixin:
    """Put in front of `PreTrainedModel`."""

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        check_transformers()
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # PreTrainedModel stands behind

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As `PreTrainedModel.from_pretrained`.

        Raises:
            OSError: a safetensors file is damaged or truncated.
            ValueError: the checkpoint holds another model's weights and none of this family's backbone, which would stay
                random. A checkpoint without weights is left to transformers' report of missing ones.
        """
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise OSError(
                f"{_damaged_file(pretrained_model_name_or_path)} is damaged or truncated ({error}). Download it again."
            ) from error
        names = {name for name, _ in model.named_parameters()}
        backbone = {name for name in names if name.startswith(f"{cls.base_model_prefix}.")} or names
        holds_others = any(name.endswith((".weight", ".bias")) for name in info["unexpected_keys"])
        if holds_others and backbone <= set(info["missing_keys"]):
            raise ValueError(
                f"The weights of {pretrained_model_name_or_path} are not those of a {cls.__name__}: none of its tensors "
                f"has the name of one of the backbone's, such as {min(backbone)!r}. Is it another family's checkpoint?"
            )
        return (model, info) if output_loading_info else model


def _damaged_file(checkpoint) -> str:
    for path in sorted(Path(str(checkpoint)).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            return str(path)
    return f"A safetensors file of {checkpoint}"
