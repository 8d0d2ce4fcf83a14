"""ChatGLM2 and ChatGLM3 for vLLM. Integer weights of the line's quantized checkpoints become floats when they are loaded."""

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.rotary_embedding import get_rope

from ..models.chatglm.modeling_chatglm2 import rope_parameters
from ..models.chatglm.quantized_linear import dequantize_rows
from ._compat import WeightsMapper
from .decoder import DecoderForCausalLM, Plan, Weights


class ChatGLMForConditionalGeneration(DecoderForCausalLM):
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "transformer.embedding.word_embeddings.": "model.embed_tokens.",
            "transformer.encoder.layers.": "model.layers.",
            "transformer.encoder.final_layernorm.": "model.norm.",
            "transformer.output_layer.": "lm_head.",
        },
        orig_to_new_substr={
            ".self_attention.query_key_value.": ".self_attn.qkv_proj.",
            ".self_attention.dense.": ".self_attn.o_proj.",
            ".mlp.dense_h_to_4h.": ".mlp.gate_up_proj.",
            ".mlp.dense_4h_to_h.": ".mlp.down_proj.",
        },
    )
    packed_modules_mapping = {"qkv_proj": ["qkv_proj"], "gate_up_proj": ["gate_up_proj"]}
    ignored_suffixes = ("rotary_pos_emb.inv_freq",)

    def plan(self, vllm_config: VllmConfig) -> Plan:
        config, longest = self.config, vllm_config.model_config.max_model_len
        self.dtype = vllm_config.model_config.dtype
        return Plan(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            ffn_size=config.ffn_hidden_size,
            norm_eps=config.layernorm_epsilon,
            qkv_bias=config.add_bias_linear or config.add_qkv_bias,
            bias=config.add_bias_linear,
            rotary=get_rope(
                config.head_dim,
                max_position=max(longest, config.seq_length),
                is_neox_style=False,
                rope_parameters=rope_parameters(config),
            ),
        )

    def prepared(self, weights: Weights) -> Weights:
        """Without quantization what is in the files; else an integer weight waits for its scale, or the scale for it."""
        bits, waiting = self.config.quantization_bit, dict[str, torch.Tensor]()
        for name, tensor in weights:
            module, _, kind = name.rpartition(".")
            if not bits or (kind != "weight_scale" and tensor.is_floating_point()):
                yield name, tensor
            elif (other := waiting.pop(module, None)) is None:
                waiting[module] = tensor
            else:
                integers, scale = (other, tensor) if kind == "weight_scale" else (tensor, other)
                yield f"{module}.weight", dequantize_rows(integers, scale, bits, self.dtype)
        if waiting:
            raise ValueError(
                f"`{min(waiting)}` has a quantized weight without its `weight_scale`, or one without the other."
            )
