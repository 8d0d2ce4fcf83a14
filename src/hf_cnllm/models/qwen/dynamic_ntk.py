"""Dynamic NTK-aware RoPE: one interpolation factor per sequence, fixed by its prompt.

A prompt of L tokens meets a model trained on S. The rotary base is scaled so that the lowest frequency is interpolated
and the highest is left alone (NTK-aware scaling; Qwen report, arXiv 2309.16609)::

    alpha(L) = max(2^(ceil(log2(L / S)) + 1) - 1, 1)                       1 up to S, 3 up to 2S, 7 up to 4S, ...
    theta_i  = (base * alpha^(d / (d - 2)))^(-2i / d),   i = 0 ... d/2 - 1

**Where alpha lives.** Keys in a cache have been rotated under some alpha, so the same alpha must rotate everything that
is later compared with them. It is therefore decided once, at prefill, and travels *with the cache*: [`carry_inv_freq`].
A cache within the trained length holds nothing and stays what it was. If it grows beyond, alpha is 1 for good, however far
the generation goes, and it is told so: a longer cache that holds nothing was made from bare keys, of which nobody knows.
`generate` fixes alpha from the prompt alone, before any candidate token or prefill chunk; without a cache it hands
`prompt_lengths` to every step. Nothing is kept on the module, so generations can interleave.

Only powers of two matter, so the frequencies of every alpha are a small table, made once.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ..._compat.modeling import is_tracing
from ...attention.mask_values import is_packed
from ...attention.masks import sees
from ..validation import cached_length

DOUBLINGS = 24  # rows of the table after the first: prompts up to 2^24 times the trained length are told apart


def ntk_alpha(length: int, seq_length: int) -> int:
    """alpha of the formula above for a prompt of `length` tokens.

    >>> [ntk_alpha(length, 32) for length in (20, 32, 33, 64, 65, 129)]
    [1, 1, 3, 3, 7, 15]
    """
    return max(2 ** math.ceil(math.log2(length / seq_length) + 1) - 1, 1)


def inverse_frequencies(dim: int, base: float, alphas: Sequence[int]) -> Tensor:
    """theta of the formula above for each alpha, (len(alphas), ceil(dim / 2)) in fp32, for `dim` rotated dimensions."""
    bases = [base if alpha == 1 else base * alpha ** (dim / (dim - 2)) for alpha in alphas]
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    return 1.0 / torch.tensor(bases, dtype=torch.float32)[:, None] ** exponents


class DynamicNtkRotaryEmbedding(nn.Module):
    """Cosines and sines of the half-split RoPE, under each row's own NTK factor.

    Args:
        dim: number of rotated dimensions of a head. An odd one is completed to pairs.
        base: the rotary base.
        seq_length: trained length in tokens; None: not known, and no NTK.
    """

    inv_freq: Tensor

    def __init__(self, dim: int, base: float, seq_length: int | None = None):
        super().__init__()
        self.dim = dim
        self.base = base
        self.seq_length = seq_length
        self.inv_freq = nn.Buffer(self.compute_inv_freq(), persistent=False)

    def compute_inv_freq(self) -> Tensor:
        """(1 or DOUBLINGS + 1, dim / 2): row n is for prompts of at most 2^n S tokens."""
        rows = 1 if self.seq_length is None or self.dim <= 2 else DOUBLINGS + 1
        return inverse_frequencies(self.dim, self.base, [ntk_alpha(2**row, 1) for row in range(rows)])

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        if not self.inv_freq.is_meta:  # model.half() must not round the angles, nor to_empty() leave them undefined
            self.inv_freq = self.compute_inv_freq().to(self.inv_freq.device)
        return self

    @property
    def plain_inv_freq(self) -> Tensor:
        """The inverse frequencies without NTK, (1, 1, dim / 2)."""
        return self.inv_freq[:1, None]

    def inv_freq_for(self, prompt_lengths: Tensor) -> Tensor:
        """(rows, tokens or 1) prompt lengths -> their inverse frequencies, (rows, tokens or 1, dim / 2)."""
        limits = self.seq_length * 2 ** torch.arange(DOUBLINGS, device=prompt_lengths.device)
        return self.inv_freq[(prompt_lengths[..., None] > limits).sum(-1)]

    def select_inv_freq(
        self,
        inputs_embeds: Tensor,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        prompt_lengths: Tensor | int | None = None,
    ) -> Tensor:
        """The inverse frequencies of this call, (rows or 1, tokens or 1, dim / 2), which `cache` carries from now on.

        Those that the cache carries already, or else those of the prompts' lengths. A cache within the trained length, unless
        the caller gives the lengths, carries none.

        Args:
            inputs_embeds: (batch, length, hidden).
            attention_mask, position_ids: what the caller gave, see [`true_lengths`].
            prompt_lengths: (batch,) or one number: tokens in each row's prompt.

        Raises:
            ValueError: the cache is past the trained length and carries nothing, `prompt_lengths` are of another batch, or
                sequences packed by the mask would need several factors in one cache.
        """
        if (carried := getattr(cache, "ntk_inv_freq", None)) is not None:
            return carried
        lengths = self._prompt_lengths(inputs_embeds, attention_mask, position_ids, cache, prompt_lengths)
        inv_freq = self.plain_inv_freq if lengths is None else self.inv_freq_for(lengths)
        past = cached_length(cache)
        reach = inputs_embeds.shape[1] + (past if isinstance(past, int) else 0)
        if cache is not None and (prompt_lengths is not None or reach > self.seq_length):
            carry_inv_freq(cache, inv_freq)
        return inv_freq

    def _prompt_lengths(
        self,
        inputs_embeds: Tensor,
        attention_mask: Any,
        position_ids: Tensor | None,
        cache: Cache | None,
        given: Tensor | int | None,
    ) -> Tensor | None:
        """Tokens in the prompts, (rows or 1, tokens or 1): those `given`, or else this call's if it is a prefill. None: all
        are within the trained length."""
        batch_size, length = inputs_embeds.shape[:2]
        if given is not None:
            lengths = torch.as_tensor(given, device=inputs_embeds.device).reshape(-1, 1)
            if lengths.shape[0] not in (1, batch_size):
                raise ValueError(
                    f"`prompt_lengths` holds {lengths.shape[0]} lengths, but the inputs are {batch_size} sequences. Give "
                    "one for each."
                )
            return lengths
        if isinstance(past := cached_length(cache), int) and past:
            if past > self.seq_length:
                raise ValueError(
                    f"the cache holds {past} tokens, more than `seq_length` ({self.seq_length}), but not the NTK factor of "
                    "their prompts, as one that was made from keys and values alone. Pass the cache itself, or the lengths of "
                    "the prompts as `prompt_lengths`."
                )
            return None
        # A traced graph is to hold for all lengths, so tracing does not ask for this one.
        if (cache is not None or not is_tracing(inputs_embeds)) and length <= self.seq_length:
            return None
        if cache is None:
            return true_lengths(inputs_embeds, attention_mask, position_ids)
        lengths = true_lengths(inputs_embeds, attention_mask)
        if is_packed(attention_mask) and (lengths > self.seq_length).any():
            raise ValueError(
                "`attention_mask` packs sequences longer than `seq_length` into a row, each with an NTK factor of its "
                "own, which a cache cannot carry: pass `use_cache=False`."
            )
        # A static cache counts in a tensor, hence no `if`. Tokens before this call, and nothing carried: their prompt was
        # short, which is as good as length 0 here.
        return lengths.amax(-1, keepdim=True) * (cache.get_seq_length() == 0)

    @torch.no_grad()
    def forward(self, hidden_states: Tensor, position_ids: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        """(batch or 1, length) positions, frequencies of `select_inv_freq` -> cos and sin, (batch or 1, length, dim)."""
        angles = position_ids[..., None].float() * inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)


def true_lengths(inputs_embeds: Tensor, attention_mask: Any = None, position_ids: Tensor | None = None) -> Tensor:
    """Number of real tokens in each row of a prefill: (batch, 1), (1, 1) if all are full, (rows, length), and 0 for
    padding, if packed or while tracing, where that cannot be seen.

    Args:
        inputs_embeds: (batch, length, hidden).
        attention_mask: (batch, length), 0 for padding, perhaps with numbers of packed sequences; or (batch, 1, length, keys), in
            which the query that sees most sees its whole row; or None.
        position_ids: given without a mask, a restart begins a packed document, whose tokens all get its length.

    Raises:
        ValueError: the mask does not tell.
    """
    if is_packed(attention_mask) is not False:
        numbers = attention_mask[:, -inputs_embeds.shape[1] :].to(inputs_embeds.device).long()
        sizes = numbers.new_zeros(numbers.shape[0], attention_mask.shape[1] + 1)
        return sizes.scatter_add_(1, numbers, torch.ones_like(numbers)).gather(1, numbers) * (numbers != 0)
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return (attention_mask != 0).sum(-1, keepdim=True).to(inputs_embeds.device)
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 4:
        return sees(attention_mask)[:, 0].sum(-1).amax(-1, keepdim=True)
    if attention_mask is not None:
        raise ValueError(
            "Dynamic NTK needs the true length of each prompt, which an `attention_mask` of type "
            f"{type(attention_mask).__name__} does not tell. Pass `prompt_lengths`, or a mask of shape (batch, length)."
        )
    if position_ids is None:
        return torch.full((1, 1), inputs_embeds.shape[1], device=inputs_embeds.device)
    starts = torch.diff(position_ids, dim=-1, prepend=position_ids[:, :1] - 1) != 1
    documents = starts.cumsum(-1)
    sizes = torch.zeros_like(documents).scatter_add_(1, documents, torch.ones_like(documents))
    return sizes.gather(1, documents)


class CarriesNtk:
    """What [`carry_inv_freq`] puts in front of a cache's class: inverse frequencies that follow the cache's rows."""

    ntk_inv_freq: Tensor | None = None

    def reorder_cache(self, beam_idx: Tensor):
        super().reorder_cache(beam_idx)
        self._change_rows(lambda rows: rows[beam_idx.to(rows.device)])

    def batch_select_indices(self, indices: Tensor):
        super().batch_select_indices(indices)
        self._change_rows(lambda rows: rows[indices.to(rows.device)])

    def batch_repeat_interleave(self, repeats: int):
        super().batch_repeat_interleave(repeats)
        self._change_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int):
        super().crop(tokens_to_remove)
        if self.get_seq_length() == 0:
            self.ntk_inv_freq = None

    def reset(self):
        super().reset()
        self.ntk_inv_freq = None

    def _change_rows(self, change: Callable[[Tensor], Tensor]):
        if self.ntk_inv_freq is not None and len(self.ntk_inv_freq) > 1:  # a single one is for any number of rows
            self.ntk_inv_freq = change(self.ntk_inv_freq)

    def __reduce__(self):
        plain = object.__new__(type(self).__mro__[2])
        vars(plain).update(vars(self))
        return carry_inv_freq, (plain, self.ntk_inv_freq)


@functools.cache
def _carrying(cache_class: type[Cache]) -> type[Cache]:
    return type(f"Ntk{cache_class.__name__}", (CarriesNtk, cache_class), {})


def carry_inv_freq(cache: Cache, inv_freq: Tensor | None) -> Cache:
    """From now on `cache` holds `inv_freq`, (batch or 1, 1, dim / 2): it becomes a subclass of its own class that moves them
    along with its rows, forgets them on `reset`, and is copied and pickled with them.

    The caller's own object has to change, whatever its class: a plain attribute would stay behind when rows move, and
    the layers, which move them, know of keys and values only.

    Inside a compiled region the class of an object cannot change: there the rows are held, but do not follow. `generate`
    never compiles a step that decides, so this concerns only hand-written loops that compile their prefill.
    """
    if not isinstance(cache, CarriesNtk) and not torch.compiler.is_compiling():
        cache.__class__ = _carrying(type(cache))  # type: ignore[arg-type]  # mypy: classes are not hashable
    cache.ntk_inv_freq = inv_freq
    return cache
