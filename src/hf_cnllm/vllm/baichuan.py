"""Baichuan 1 and 2 for vLLM: RoPE or ALiBi, and NormHead, which is folded into the head when it is loaded."""

from vllm.config import VllmConfig
from vllm.model_executor.layers.rotary_embedding import get_rope

from ..attention.alibi import alibi_slopes
from ..loss.norm_head import inverse_row_norms
from ._compat import WeightsMapper
from .decoder import DecoderForCausalLM, Plan, Weights


class BaichuanForCausalLM(DecoderForCausalLM):
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_substr={".W_pack.": ".qkv_proj."},
        orig_to_new_stacked={".gate_proj": (".gate_up_proj", 0), ".up_proj": (".gate_up_proj", 1)},
    )
    packed_modules_mapping = {"qkv_proj": ["qkv_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    def plan(self, vllm_config: VllmConfig) -> Plan:
        config, longest = self.config, vllm_config.model_config.max_model_len
        heads = config.num_attention_heads
        head_dim = config.hidden_size // heads
        rotary = slopes = None
        if config.position_embedding == "alibi":
            slopes = alibi_slopes(heads).tolist()
        else:
            rows = max(longest, config.max_position_embeddings)
            rotary = get_rope(head_dim, max_position=rows, rope_parameters=config.rope_parameters)
        return Plan(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            ffn_size=config.intermediate_size,
            norm_eps=config.rms_norm_eps,
            rotary=rotary,
            alibi_slopes=slopes,
        )

    def prepared(self, weights: Weights) -> Weights:
        for name, weight in weights:
            if self.config.norm_head and name == "lm_head.weight":
                weight = (weight * inverse_row_norms(weight)[:, None]).to(weight.dtype)
            yield name, weight
