"""Native vLLM models for the families that vLLM lacks, or runs wrongly, and the hooks that their checkpoints need.

vLLM calls [`register`] in each of its processes. Nothing here is imported before, and nothing of vLLM before a model asks
for it.
"""

MODELS = {
    "BaichuanForCausalLM": "baichuan:BaichuanForCausalLM",
    "BaiChuanForCausalLM": "baichuan:BaichuanForCausalLM",
    "QWenLMHeadModel": "qwen:QWenLMHeadModel",
    "ChatGLMModel": "chatglm:ChatGLMForConditionalGeneration",
    "ChatGLMForConditionalGeneration": "chatglm:ChatGLMForConditionalGeneration",
    # Refused in a sentence, see `served.py`, where vLLM would say something obscure.
    "GLMModel": "unsupported:UnsupportedModel",
    "GLMForConditionalGeneration": "unsupported:UnsupportedModel",
    "GLM130BForConditionalGeneration": "unsupported:UnsupportedModel",
}
"""Architecture, as config.json names it -> module and class here."""
VERSIONS = ("0.31", "0.32", "0.33")
"""The minor releases of vLLM that the models were tested with."""


def add_hooks() -> None:
    """Lets vLLM read the models' configurations. Idempotent.

    Raises:
        ImportError, AttributeError: this vLLM is not one of `VERSIONS`, or lacks what the models build on.
    """
    from vllm import __version__

    if ".".join(__version__.split(".")[:2]) not in VERSIONS:
        raise ImportError("not tested")
    from . import hooks

    hooks.register()


def register() -> None:
    """Entry point `vllm.general_plugins`: the models, by their names in config.json, and their hooks. Idempotent. A vLLM
    for which there are no hooks serves everything else as before, and refuses these models."""
    from vllm import ModelRegistry

    models = MODELS
    try:
        add_hooks()
    except (ImportError, AttributeError):
        models = dict.fromkeys(MODELS, "unsupported:UnsupportedModel")
    for architecture, place in models.items():
        ModelRegistry.register_model(architecture, f"{__name__}.{place}")
