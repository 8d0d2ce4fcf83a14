"""Loading a checkpoint that is damaged or not this family's: one clear error instead of a half-random model."""

from contextlib import nullcontext
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import BitsAndBytesConfig, PreTrainedConfig

from .._compat import check_transformers
from .._compat.modeling import AdapterHooks, LoadingHooks
from ..hub.publishing import PublishingMixin
from ..hub.saving import check_saved, index_taken_away, is_first_process
from ..hub.weight_files import check_indexes, check_weight_files
from ..stand_ins import take_places
from .old_names import FromConfig

# Heads that PEFT names for every classification, whatever they are called.
ADDED_BY_PEFT = {"score", "classifier", "qa_outputs"}


class CheckpointLoadingMixin(PublishingMixin, AdapterHooks, LoadingHooks):
    """Put in front of `PreTrainedModel`."""

    vocab_size = FromConfig()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        take_places(cls)

    def __init__(self, config: PreTrainedConfig, *args, **kwargs):
        check_transformers()
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # PreTrainedModel stands behind
        self.model_tags = ["hf_cnllm", config.model_type]  # of each model: transformers adds to the list

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As `PreTrainedModel.from_pretrained`; `load_in_8bit` and `load_in_4bit` mean a `BitsAndBytesConfig`, as they did.

        Raises:
            OSError: a safetensors file is damaged or truncated, or a save into the folder was interrupted.
            ValueError: the checkpoint holds another model's weights and none of this family's backbone, which would stay
                random; or its files are not of one save, see [`check_weight_files`]. A checkpoint without weights is left to
                transformers' report of missing ones.
        """
        if bits := {name: True for name in ("load_in_8bit", "load_in_4bit") if kwargs.pop(name, False)}:
            if kwargs.get("quantization_config") is not None:
                raise ValueError(f"give either {min(bits)} or quantization_config, not both.")
            kwargs["quantization_config"] = BitsAndBytesConfig(**bits)
        folder = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        if folder.is_dir():
            check_indexes(folder)
            check_saved(folder)
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

    def check_adapter(self, config) -> None:
        """Refuses `modules_to_save` that there are not, over which PEFT passes in silence: names differ by family."""
        names = {module: name for name, module in self.named_modules()}  # type: ignore[attr-defined]
        wanted = set(getattr(config, "modules_to_save", None) or ()) - ADDED_BY_PEFT
        missing = sorted(name for name in wanted if not any(known.endswith(name) for known in names.values()))
        if missing:
            embedding, head = self.get_input_embeddings(), self.get_output_embeddings()  # type: ignore[attr-defined]
            ours = (names[module].rpartition(".")[2] for module in (embedding, head) if module is not None)
            raise ValueError(
                f"modules_to_save: {type(self).__name__} has no module {missing[0]!r}. Its embedding and head are "
                f"{' and '.join(map(repr, ours))}; the model holds the adapter already, so load it again."
            )

    @classmethod
    def check_weight_files(cls, model, files, quantizer) -> None:
        foreign = (
            getattr(quantizer, "pre_quantized", False) and quantizer.quantization_config.quant_method != "chatglm"
        )
        # Another method's files hold what only its own layers know.
        expected = {} if foreign else {name: tensor.dtype for name, tensor in model.state_dict().items()}
        check_weight_files(files, expected, f"{cls.base_model_prefix}.")

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As `PreTrainedModel.save_pretrained`. Over an older checkpoint in shards its index is taken away first, and written
        last: a save that is killed leaves a folder that does not load, never a mixture. See docs/security.md."""
        variant = kwargs.get("variant", args[4] if len(args) > 4 else None)
        index = Path(save_directory, f"model.safetensors.index.{f'{variant}.' if variant else ''}json")
        adapter_only = getattr(self, "_hf_peft_config_loaded", False)
        with nullcontext() if adapter_only or not is_first_process() else index_taken_away(index):
            return super().save_pretrained(save_directory, *args, **kwargs)


def _damaged_file(checkpoint) -> str:
    for path in sorted(Path(str(checkpoint)).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError:
            return str(path)
    return f"A safetensors file of {checkpoint}"
