"""Stands in for the models where they cannot run, and says why when one is asked for."""

import importlib.metadata

from torch import nn

SERVED_BY = "vLLM 0.31 and 0.32"


class UnsupportedModel(nn.Module):
    """Has the methods by which vLLM tells a language model, so that it gets as far as making one."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__()
        architecture = vllm_config.model_config.architecture
        try:
            from . import hooks

            hooks.register()
        except (ImportError, AttributeError) as error:
            found = importlib.metadata.version("hf_cnllm")
            raise RuntimeError(
                f"hf_cnllm {found} serves {architecture} with {SERVED_BY}; this vLLM has changed what it builds on ({error})."
            ) from error
        raise RuntimeError(f"vLLM cannot serve {architecture}; see docs/serving.md of hf_cnllm.")

    def embed_input_ids(self, input_ids): ...

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None): ...

    def compute_logits(self, hidden_states): ...
