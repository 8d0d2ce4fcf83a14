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


def register() -> None:
    """Entry point `vllm.general_plugins`: the models, by their names in config.json, and what reads their configurations.
    Idempotent. A vLLM that lacks what they build on serves everything else as before, and refuses these."""
    from vllm import ModelRegistry

    models = MODELS
    try:
        from . import hooks

        hooks.register()
    except (ImportError, AttributeError):
        models = dict.fromkeys(MODELS, "unsupported:UnsupportedModel")
    for architecture, place in models.items():
        ModelRegistry.register_model(architecture, f"{__name__}.{place}")
