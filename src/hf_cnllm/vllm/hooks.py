"""What vLLM asks about a checkpoint before it makes a model: sizes, what is refused, and an engine's settings."""

from typing import Any

from transformers import AutoTokenizer
from vllm.platforms import current_platform

from ..models.chatglm.quantization import QUANT_METHOD
from . import _compat
from .served import check_served, longest, needs_ntk, stop_ids


class Convertor(_compat.ModelArchConfigConvertorBase):
    """Reads a configuration, or refuses it."""

    def __init__(self, hf_config: Any, *args: Any, **kwargs: Any):
        check_served(hf_config)
        super().__init__(hf_config, *args, **kwargs)


class OwnConvertor(Convertor):
    """For the model types that are this package's alone; GLM-4 shares GLM's."""

    def derive_max_model_len_and_key(self) -> tuple[float, str | None]:
        return longest(self.hf_config)

    def get_quantization_config(self) -> Any:
        """None for the integers of ChatGLM's own checkpoints, which are dequantized when they are loaded."""
        config = super().get_quantization_config()
        return None if config and config["quant_method"] == QUANT_METHOD else config


class Hook(_compat.VerifyAndUpdateConfig):
    """Ends answers where the family's chats end them."""

    @classmethod
    def verify_and_update_model_config(cls, model_config: Any) -> None:
        if model_config.skip_tokenizer_init or model_config.runner_type != "generate":
            return
        tokenizer = AutoTokenizer.from_pretrained(model_config.tokenizer, revision=model_config.tokenizer_revision)
        _compat.add_stop_ids(model_config, stop_ids(tokenizer))


class BaichuanHook(Hook):
    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        """Of CUDA's backends FlashInfer, the default on some cards, takes ALiBi's slopes and does not use them."""
        if vllm_config.model_config.hf_config.position_embedding != "alibi" or not current_platform.is_cuda():
            return
        attention = vllm_config.attention_config
        if attention.backend is None:
            attention.backend = _compat.AttentionBackendEnum.FLASH_ATTN
        elif attention.backend == _compat.AttentionBackendEnum.FLASHINFER:
            raise ValueError("vLLM's FlashInfer backend leaves ALiBi out. Choose FLASH_ATTN or TRITON_ATTN.")


class QWenHook(Hook):
    """With dynamic NTK the keys of a prompt depend on its length. The only door through which a model of vLLM sees a whole
    prompt is the one that makes positions for M-RoPE, and keys of one prompt are no use to another."""

    @classmethod
    def verify_and_update_model_config(cls, model_config: Any) -> None:
        super().verify_and_update_model_config(model_config)
        config = model_config.hf_config
        if needs_ntk(config, model_config.max_model_len):
            config.rope_parameters = {
                "rope_type": "default",
                "rope_theta": config.rotary_emb_base,
                "mrope_section": [1, 1, 1],
            }

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        model_config = vllm_config.model_config
        if needs_ntk(model_config.hf_config, model_config.max_model_len):
            vllm_config.cache_config.enable_prefix_caching = False


HOOKS: dict[str, type[_compat.VerifyAndUpdateConfig]] = {
    "BaichuanForCausalLM": BaichuanHook,
    "BaiChuanForCausalLM": BaichuanHook,
    "QWenLMHeadModel": QWenHook,
    "ChatGLMModel": Hook,
    "ChatGLMForConditionalGeneration": Hook,
}
CONVERTORS = {
    **{"baichuan": OwnConvertor, "qwen": OwnConvertor, "chatglm": OwnConvertor},
    **{"glm": Convertor, "glm130b": Convertor},
}


def _token_ids_mixin() -> type:
    from .tool_parser import WithTokenIds

    return WithTokenIds


def register() -> None:
    _compat.use_own_config("chatglm")
    for model_type, convertor in CONVERTORS.items():
        _compat.set_convertor(model_type, convertor)
    for architecture, hook in HOOKS.items():
        _compat.set_architecture_hook(architecture, hook)
    _compat.add_tool_parser("chatglm3", f"{__package__}.tool_parser", "ChatGLM3ToolParser", _token_ids_mixin)
