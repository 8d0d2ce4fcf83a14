"""ChatGLM's own weight-only INT8/INT4 checkpoints, as a quantization method of transformers.

The originals' configurations only say `quantization_bit`; `ChatGLMConfig` turns that into the `quantization_config`
below. `model.quantize(4)` makes such a model from a float one,
`from_pretrained(..., quantization_config=ChatGLMQuantizationConfig(bits=4))` while loading one, and `model.dequantize()`
goes back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ..._compat.modeling import HfQuantizer, QuantizationConfigMixin, registers_quantization
from ...hub.weight_files import FLOATS, INTEGERS, check_files_are_there, stored_tensors
from .quantized_linear import QuantizedEmbedding, QuantizedLinear, QuantizedRows, refuse_unfit_weights

QUANT_METHOD = "chatglm"
# What the originals quantize in each layer; embeddings, norms, biases and heads stay floats.
LAYER_LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
# Of them those whose columns GLM-130B's processes share, with a scale each.
COLUMNS_SHARED = ("dense", "dense_4h_to_h")


@registers_quantization(QUANT_METHOD)
class ChatGLMQuantizationConfig(QuantizationConfigMixin):
    """How a ChatGLM checkpoint is quantized.

    Args:
        bits: 8 or 4.
        quantize_embeddings: as ChatGLM-6B's `quantization_embeddings`: the word embeddings too.
        groups: as GLM-130B's `quantization_groups`, of a checkpoint that has them.
    """

    def __init__(self, bits: int = 8, quantize_embeddings: bool = False, groups: int = 1, **kwargs):
        if bits not in (4, 8):
            raise ValueError(f"ChatGLM weights are quantized to 4 or 8 bits, not {bits}")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # transformers declares its own methods only
        self.bits = bits
        self.quantize_embeddings = quantize_embeddings
        self.groups = groups


@registers_quantization(QUANT_METHOD)
class ChatGLMQuantizer(HfQuantizer):
    """Loads, makes, saves and undoes `ChatGLMQuantizationConfig` quantization on any device."""

    quantization_config: ChatGLMQuantizationConfig

    def is_serializable(self) -> bool:
        return True

    state_dict_to_save: dict[str, torch.Tensor] | None = None

    @contextmanager
    def saving(self, state_dict: dict[str, torch.Tensor] | None) -> Iterator[None]:
        """While it lasts, what is saved is `state_dict`, which transformers does not hand on; all weights where it is None."""
        self.state_dict_to_save = state_dict
        try:
            yield
        finally:
            self.state_dict_to_save = None

    def get_state_dict_and_metadata(self, model: PreTrainedModel):
        """With a quantized embedding the head is stored too, though it is the same: the original code wants both."""
        _, metadata = super().get_state_dict_and_metadata(model)
        state_dict = self.state_dict_to_save
        if self.quantization_config.quantize_embeddings:
            state_dict = dict(model.state_dict() if state_dict is None else state_dict)
            for name in state_dict.keys() & model.all_tied_weights_keys.keys():
                state_dict[name] = state_dict[name].clone()
        return state_dict, metadata

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """What is not quantized may be trained, as the originals' P-tuning scripts do over INT4 weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs):
        if self.pre_quantized:
            self._replace(model, with_weights=False)
            if checkpoint_files := kwargs.get("checkpoint_files"):
                self._check_files(model, checkpoint_files)
        return model

    def _check_files(self, model: PreTrainedModel, checkpoint_files: list[str]):
        """Says what is wrong with a quantized checkpoint before anything is loaded from it."""
        check_files_are_there(checkpoint_files)
        prefix = f"{model.base_model_prefix}."  # a headless model loads from a checkpoint with a head, and vice versa
        stored = {
            name.removeprefix(prefix): tensor
            for file in checkpoint_files
            for name, tensor in stored_tensors(Path(file)).items()
        }
        tied = {name.removeprefix(prefix) for name in model.all_tied_weights_keys}
        for full_name, expected in model.state_dict(keep_vars=True).items():
            module_name, _, name = full_name.rpartition(".")
            module, key = model.get_submodule(module_name), full_name.removeprefix(prefix)
            if not isinstance(module, QuantizedRows) or name == "bias" or (key in tied and key not in stored):
                continue
            if key not in stored:
                raise ValueError(f"the checkpoint has no `{full_name}`, which `quantization_bit` {module.bits} needs")
            (shape, kind, _), wanted = stored[key], INTEGERS if name == "weight" else FLOATS
            if (shape, kind) != (tuple(expected.shape), wanted):
                raise ValueError(
                    f"`{full_name}` holds {kind} of shape {shape} in the checkpoint, but `quantization_bit` {module.bits} "
                    f"needs {wanted} of shape {tuple(expected.shape)}"
                )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs):
        config = self.quantization_config
        if not self.pre_quantized:
            if config.groups != 1:
                raise ValueError(
                    "`groups` is of checkpoints that were quantized in parts: leave it out to quantize here"
                )
            self.check_weights(model)
            self._replace(model, with_weights=True)
            self.pre_quantized = True
            model.tie_weights(recompute_mapping=False)
        model.config.quantization_bit = config.bits
        if hasattr(model.config, "quantization_groups"):
            model.config.quantization_groups = config.groups
        if config.quantize_embeddings:
            model.config.quantization_embeddings = True
        for module in model.modules():
            if isinstance(module, QuantizedRows):
                module.requires_grad_(False)  # loading makes every float a trainable parameter
        return model

    def check_weights(self, model: PreTrainedModel) -> None:
        """Refuses weights that cannot be quantized, before any is."""
        refuse_unfit_weights(
            {f"{name}.weight": module.weight for module, name in self._find_modules(model)[0].items()}
        )

    def _find_modules(self, model: PreTrainedModel):
        """The modules that the method quantizes, with their names, and which of them are embedding and head."""
        embedding, head = None, None
        if self.quantization_config.quantize_embeddings:
            embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        names: dict[nn.Linear | nn.Embedding, str] = {}
        for name, module in model.named_modules():
            is_linear = isinstance(module, nn.Linear) and name.rpartition(".")[2] in LAYER_LINEARS
            if is_linear or module is embedding or module is head:
                names[module] = name
        if not names:
            raise ValueError(
                f"{type(model).__name__} has no layers of ChatGLM's names ({', '.join(LAYER_LINEARS)}), which this method "
                "quantizes: use another one, such as BitsAndBytesConfig or TorchAoConfig."
            )
        return names, embedding, head

    def _replace(self, model: PreTrainedModel, with_weights: bool):
        """Puts a quantized module, empty or with the same weights, in the place of each that the method quantizes."""
        bits, (names, embedding, head) = self.quantization_config.bits, self._find_modules(model)
        for module, name in names.items():
            if isinstance(module, nn.Linear):
                groups = self.quantization_config.groups if name.rpartition(".")[2] in COLUMNS_SHARED else 1
                quantized: QuantizedRows = QuantizedLinear.like(module, bits, groups)
            else:
                quantized = QuantizedEmbedding.like(module, bits)
            if with_weights and module is not head:
                quantized.quantize_from(module)
            model.set_submodule(name, quantized)
        if head is not None:
            for parameter in ("weight", "weight_scale"):
                model.all_tied_weights_keys[f"{names[head]}.{parameter}"] = f"{names[embedding]}.{parameter}"

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Back to float layers, in the model's dtype as it is now; another `dtype` is for the whole model."""
        if dtype is not None:
            model.to(dtype)  # type: ignore[arg-type]  # its decorator hides that this is a method
        return super().dequantize(model, dtype=model.dtype)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype):
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantizedLinear | QuantizedEmbedding):
                model.set_submodule(name, module.dequantize(dtype))
        model.all_tied_weights_keys = {
            target: source
            for target, source in model.all_tied_weights_keys.items()
            if not target.endswith("weight_scale")
        }
        model.tie_weights(recompute_mapping=False)
        model.config.quantization_bit = 0
        if hasattr(model.config, "quantization_groups"):
            model.config.quantization_groups = 1
        if self.quantization_config.quantize_embeddings:
            model.config.quantization_embeddings = False
            model.config.tie_word_embeddings = model.get_output_embeddings() is not None
        return model


def quantize(model: PreTrainedModel, bits: int, quantize_embeddings: bool = False) -> PreTrainedModel:
    """Quantizes a loaded float model in place and returns it.

    Raises:
        ValueError: `bits` is not 4 or 8, the model is quantized in another way already, or holds NaN or infinite
            weights, and is left as it was.
    """
    config = ChatGLMQuantizationConfig(bits=bits, quantize_embeddings=quantize_embeddings)
    if getattr(model, "is_quantized", False):
        found = model.config.quantization_config
        if found.to_dict() == config.to_dict():
            return model
        raise ValueError(f"this model is quantized already ({found.to_dict()}); call model.dequantize() first")
    quantizer = ChatGLMQuantizer(config, pre_quantized=False)
    quantizer.check_weights(model)
    model.is_quantized = True  # type: ignore[assignment]  # torch declares tensors and modules only
    model.quantization_method = QUANT_METHOD  # type: ignore[assignment]
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    quantizer.postprocess_model(model)
    return model
