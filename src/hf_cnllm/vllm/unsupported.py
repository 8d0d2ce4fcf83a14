"""Stands in for the models where they cannot run, and says why when one is asked for."""

from importlib.metadata import version

import vllm
from torch import nn

from . import VERSIONS, add_hooks


class UnsupportedModel(nn.Module):
    """Has the methods by which vLLM tells a language model, so that it gets as far as making one."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__()
        architecture = vllm_config.model_config.architecture
        try:
            add_hooks()
        except (ImportError, AttributeError) as error:
            raise RuntimeError(
                f"hf_cnllm {version('hf_cnllm')} serves {architecture} with vLLM {VERSIONS[0]} to {VERSIONS[-1]}, not with "
                f"{vllm.__version__} ({error})."
            ) from error
        raise RuntimeError(f"vLLM cannot serve {architecture}; see docs/serving.md of hf_cnllm.")

    def embed_input_ids(self, input_ids): ...

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None): ...

    def compute_logits(self, hidden_states): ...
