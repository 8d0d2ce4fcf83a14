"""The decoder that Baichuan, Qwen and ChatGLM2/3 are for vLLM: one stack, in the order of vLLM's own Llama.

The families differ in names, which each one's `WeightsMapper` translates, in biases, and in what positions do: rotate
queries and keys, slope the scores (ALiBi), scale the queries (LogN). A family says so in a [`Plan`].
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsPP, SupportsQuant
from vllm.sequence import IntermediateTensors

from ._compat import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)

Weights = Iterable[tuple[str, torch.Tensor]]
# Formats of `--load-format` that read a checkpoint's own files, all of them.
WHOLE_CHECKPOINT = ("auto", "hf", "safetensors", "fastsafetensors", "pt", "npcache")


@dataclass
class Plan:
    """What distinguishes a model. Sizes are those of the whole model, not of one rank.

    Attributes:
        ffn_size: width of the gated MLP.
        qkv_bias, bias: whether q | k | v, and the other linear layers, have a bias.
        rotary: turns (positions, query, key) into rotated query and key; None: nothing is rotated.
        query_scale: positions -> factors [tokens, 1] on the rotated queries, or None.
        alibi_slopes: one for each head.
        windows: for each layer, the number of tokens that its window holds, or None.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    norm_eps: float
    qkv_bias: bool = False
    bias: bool = False
    rotary: nn.Module | None = None
    query_scale: Callable[[torch.Tensor], torch.Tensor] | None = None
    alibi_slopes: Sequence[float] | None = None
    windows: Sequence[int | None] | None = None


class DecoderMLP(nn.Module):
    def __init__(self, plan: Plan, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        shared = {"bias": plan.bias, "quant_config": vllm_config.quant_config}
        self.gate_up_proj = MergedColumnParallelLinear(
            plan.hidden_size, [plan.ffn_size] * 2, prefix=f"{prefix}.gate_up_proj", **shared
        )
        self.down_proj = RowParallelLinear(plan.ffn_size, plan.hidden_size, prefix=f"{prefix}.down_proj", **shared)
        self.act_fn = SiluAndMul()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(hidden_states)
        output, _ = self.down_proj(self.act_fn(gate_up))
        return output


class DecoderAttention(nn.Module):
    def __init__(self, plan: Plan, vllm_config: VllmConfig, layer_idx: int, prefix: str):
        super().__init__()
        ranks, quant_config = get_tensor_model_parallel_world_size(), vllm_config.quant_config
        num_heads = plan.num_heads // ranks
        num_kv_heads = max(1, plan.num_kv_heads // ranks)  # a head that ranks share is on each of them
        self.sizes = [plan.head_dim * heads for heads in (num_heads, num_kv_heads, num_kv_heads)]
        self.qkv_proj = QKVParallelLinear(
            plan.hidden_size,
            plan.head_dim,
            plan.num_heads,
            plan.num_kv_heads,
            bias=plan.qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            plan.num_heads * plan.head_dim,
            plan.hidden_size,
            bias=plan.bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        slopes = plan.alibi_slopes
        if slopes is not None:
            first = get_tensor_model_parallel_rank() * num_heads
            slopes = list(slopes[first : first + num_heads])
        self.attn = Attention(
            num_heads,
            plan.head_dim,
            plan.head_dim**-0.5,
            num_kv_heads=num_kv_heads,
            alibi_slopes=slopes,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=plan.windows[layer_idx] if plan.windows else None,
            prefix=f"{prefix}.attn",
        )
        self.rotary_emb = plan.rotary

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, query_scale: torch.Tensor | None
    ) -> torch.Tensor:
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split(self.sizes, dim=-1)
        if self.rotary_emb is not None:
            query, key = self.rotary_emb(positions, query, key)
        if query_scale is not None:
            query = query * query_scale
        output, _ = self.o_proj(self.attn(query, key, value))
        return output


class DecoderLayer(nn.Module):
    def __init__(self, plan: Plan, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        layer_idx = int(prefix.rpartition(".")[2])
        self.input_layernorm = RMSNorm(plan.hidden_size, eps=plan.norm_eps)
        self.self_attn = DecoderAttention(plan, vllm_config, layer_idx, prefix=f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(plan.hidden_size, eps=plan.norm_eps)
        self.mlp = DecoderMLP(plan, vllm_config, prefix=f"{prefix}.mlp")

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        query_scale: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual, hidden_states = hidden_states, self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states, query_scale)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


# Positions are [tokens], or [3, tokens] where Qwen's dynamic NTK is on: tokens are the last dimension.
@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": -1, "intermediate_tensors": 0, "inputs_embeds": 0}
)
class DecoderModel(nn.Module):
    """Embedding, layers and final norm, of which a rank of the pipeline has its part."""

    def __init__(self, *, vllm_config: VllmConfig, plan: Plan, prefix: str = ""):
        super().__init__()
        self.query_scale = plan.query_scale
        self.embed_tokens = self.norm = PPMissingLayer()
        if get_pp_group().is_first_rank:
            self.embed_tokens = VocabParallelEmbedding(
                plan.vocab_size, plan.hidden_size, prefix=f"{prefix}.embed_tokens"
            )
        self.start_layer, self.end_layer, self.layers = make_layers(
            plan.num_layers, lambda prefix: DecoderLayer(plan, vllm_config, prefix), prefix=f"{prefix}.layers"
        )
        if get_pp_group().is_last_rank:
            self.norm = RMSNorm(plan.hidden_size, eps=plan.norm_eps)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], plan.hidden_size
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if positions.ndim == 2:
            positions = positions[0]  # the three rows are equal
        if get_pp_group().is_first_rank:
            hidden_states = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
            residual = None
        else:
            hidden_states, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        query_scale = None
        if self.query_scale is not None:
            query_scale = self.query_scale(positions).to(hidden_states.dtype)
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_states, residual = layer(positions, hidden_states, residual, query_scale)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states, "residual": residual})
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class DecoderForCausalLM(nn.Module, SupportsLoRA, SupportsPP, SupportsQuant):
    """What vLLM runs; a family gives its plan, its names, and the weights as the layers here want them.

    Attributes:
        hf_to_vllm_mapper: names of the checkpoint, and so of LoRA adapters -> names here.
        packed_modules_mapping: a layer here -> the modules of which adapters have one each.
        ignored_suffixes: of tensors that the original stored and the configuration determines.
    """

    hf_to_vllm_mapper: WeightsMapper
    packed_modules_mapping: dict[str, list[str]]
    ignored_suffixes: Sequence[str] = ("rotary_emb.inv_freq",)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        plan = self.plan(vllm_config)
        self.model = DecoderModel(vllm_config=vllm_config, plan=plan, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = PPMissingLayer()
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                plan.vocab_size,
                plan.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
        self.logits_processor = LogitsProcessor(plan.vocab_size)
        self._expects_all = vllm_config.load_config.load_format in WHOLE_CHECKPOINT
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def plan(self, vllm_config: VllmConfig) -> Plan:
        raise NotImplementedError

    def prepared(self, weights: Weights) -> Weights:
        """The checkpoint's tensors, under its names, as the layers take them."""
        return weights

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Weights) -> set[str]:
        """The checkpoint's, and later, as in reinforcement learning, what replaces some of them.

        Raises:
            ValueError: the checkpoint has not all of them; vLLM would go on with what is in memory by chance.
        """
        found: Counter[str | None] = Counter()
        loader = AutoWeightsLoader(self, ignore_unexpected_suffixes=list(self.ignored_suffixes))
        loaded = loader.load_weights(self._counted(self.prepared(weights), found), mapper=self.hf_to_vllm_mapper)
        if self._expects_all:
            self._check_all_found(found)
        self._expects_all = False
        return loaded

    def _counted(self, weights: Weights, found: Counter[str | None]) -> Weights:
        for name, weight in weights:
            found[self.hf_to_vllm_mapper.map_name(name)] += 1
            yield name, weight

    def _check_all_found(self, found: Counter[str | None]) -> None:
        parts = Counter(module.strip(".") for module, _ in self.hf_to_vllm_mapper.orig_to_new_stacked.values())
        for name, _ in self.named_parameters():
            module, kind = name.split(".")[-2:]
            if kind in ("weight", "bias") and found[name] < max(1, parts[module]):
                raise ValueError(
                    f"The checkpoint is incomplete: `{name}`, as vLLM calls it, is not or not wholly in its files."
                )
