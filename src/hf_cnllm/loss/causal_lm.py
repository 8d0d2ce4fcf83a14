"""Causal language-model loss with Baichuan 2's max-z term, on logits or fused with the output head.

For the logits ``z`` of one position, its target ``y`` and the largest logit ``m = max_v z_v``::

    loss = mean over counted labels of (logsumexp_v z_v - z_y)  +  weight * mean over all positions of m^2

The second term is the *max-z loss* of the Baichuan 2 report (arXiv 2309.10305, section 2.6), which holds the logits
down: it stabilizes training and makes sampling less sensitive to the repetition penalty. It counts every shifted
position, also those whose label is ignored, padding too. A part of a batch (`num_items_in_batch`) knows neither the
positions nor the padding of the other parts: there it counts the positions whose labels count.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .norm_head import FP16_REACH, fit_into_fp16, inverse_row_norms, normalize_rows

DEFAULT_CHUNK_SIZE = 512
"""Tokens whose logits are held at a time: a quarter of a gigabyte in fp32 at a vocabulary of 125,696."""

ROWS_AT_A_TIME = 8192
"""Vocabulary rows that one step of the weight gradient works on, so that its temporaries stay small."""


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    z_loss_weight: float = 0.0,
    label_smoothing: float = 0.0,
    **kwargs,
) -> Tensor:
    """Cross entropy plus max-z, in the calling convention of transformers' `ForCausalLMLoss`.

    A model uses it as its `loss_function` (`self.loss_function = causal_lm_loss`) and leaves `loss_type` at
    `"ForCausalLM"` (or a name that `LOSS_MAPPING` sends to `ForCausalLMLoss`): that is what tells `Trainer` to count
    labels after the shift.

    Args:
        logits: (batch, length, vocab_size). Half precision is computed in fp32.
        labels: (batch, length) token ids, `ignore_index` where nothing is to be learned; shifted here.
        vocab_size: the size of the last dimension of `logits`.
        num_items_in_batch: number of counted labels in the whole accumulated batch. Cross entropy is then summed and
            divided by it, and so is m^2, summed over the counted positions: the losses of micro-batches and processes
            add up to that of the one big batch, however it is cut and padded.
        shift_labels: (batch, length) labels that are already aligned with `logits`; replaces `labels`, and every
            position then counts as a shifted position.
        z_loss_weight: weight of the max-z term; 0 leaves plain cross entropy.
        label_smoothing: refused unless 0; `TrainingArguments(label_smoothing_factor=...)` works on the logits instead.

    Returns:
        A scalar. Without a counted label in the batch it is NaN, as transformers' losses are, and the gradients are 0;
        without one in a part of a batch it is 0.
    """
    _refuse_label_smoothing(label_smoothing)
    if logits.shape[-1] != vocab_size:
        raise ValueError(f"logits have {logits.shape[-1]} entries per position, but vocab_size is {vocab_size}")
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()

    if shift_labels is None:
        # The last position predicts nothing: a label that is not counted costs less than a sliced copy of the logits.
        targets = nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
        positions = targets.numel() - targets.numel() // max(targets.shape[-1], 1)
    else:
        targets = shift_labels
        positions = targets.numel()
    targets = targets.to(logits.device)
    counted = (targets != ignore_index).sum()

    loss = nn.functional.cross_entropy(
        logits.reshape(-1, vocab_size), targets.reshape(-1), ignore_index=ignore_index, reduction="sum"
    )
    if z_loss_weight:
        squares = logits.max(dim=-1).values.square()
        if num_items_in_batch is None:
            squares = squares[..., :-1] if shift_labels is None else squares
            loss = loss + squares.sum() * counted * (z_loss_weight / max(positions, 1))
        else:
            loss = loss + z_loss_weight * squares.where(targets != ignore_index, 0).sum()
    return _average(loss, counted, num_items_in_batch)


def reference_causal_lm_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    *,
    normalize: bool = False,
    bias: Tensor | None = None,
    **kwargs,
) -> Tensor:
    """The naive `chunked_causal_lm_loss`: all logits at once, gradients by autograd."""
    logits = nn.functional.linear(hidden_states, normalize_rows(weight) if normalize else weight, bias)
    return causal_lm_loss(logits, labels, weight.shape[0], **kwargs)


def chunked_causal_lm_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    *,
    normalize: bool = False,
    bias: Tensor | None = None,
    z_loss_weight: float = 0.0,
    num_items_in_batch: Tensor | int | None = None,
    shift_labels: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    **kwargs,
) -> Tensor:
    """`causal_lm_loss(head(hidden_states), ...)` without the logits of more than `chunk_size` tokens at a time.

    Forward walks over the tokens once, and takes the gradients with respect to the hidden states, the weight and the
    bias on the way (the idea of Liger-Kernel's fused linear cross entropy, arXiv 2410.10989), each only if it is asked
    for. Tokens whose label is ignored cost nothing, unless max-z counts them. Under autocast the matmuls run in its dtype;
    the weight's gradient is summed in fp32. A compiled graph gets the naive form: the compiler fuses on its own terms.

    Args:
        hidden_states: (batch, length, hidden_size).
        weight: (vocab_size, hidden_size), the head's stored weight, of the dtype of `hidden_states`.
        labels: as for `causal_lm_loss`, like `num_items_in_batch`, `shift_labels`, `ignore_index`, `z_loss_weight`.
        normalize: the head is a NormHead: `weight` is the raw weight, and its rows are scaled to length 1.
        bias: (vocab_size,), not scaled.
        chunk_size: tokens per chunk.

    Returns:
        A scalar. It can be differentiated once: a backward pass with `create_graph=True` is refused.
    """
    _refuse_label_smoothing(label_smoothing)
    if chunk_size is None or chunk_size < 1:
        raise ValueError(f"chunk_size (`loss_chunk_size` in the model's config) must be at least 1, not {chunk_size}")
    if torch.compiler.is_compiling():
        return reference_causal_lm_loss(
            hidden_states,
            weight,
            labels,
            normalize=normalize,
            bias=bias,
            z_loss_weight=z_loss_weight,
            num_items_in_batch=num_items_in_batch,
            shift_labels=shift_labels,
            ignore_index=ignore_index,
        )
    if shift_labels is None:
        hidden_states, targets = hidden_states[..., :-1, :], labels[..., 1:]
    else:
        targets = shift_labels
    if hidden_states.shape[:-1] != targets.shape:
        raise ValueError(
            f"labels of shape {tuple(targets.shape)} do not fit hidden_states {tuple(hidden_states.shape)}"
        )
    if weight.dim() != 2 or weight.shape[1] != hidden_states.shape[-1]:
        raise ValueError(f"a weight {tuple(weight.shape)} does not fit hidden_states {tuple(hidden_states.shape)}")

    device = hidden_states.device.type
    autocast = torch.is_autocast_enabled(device)
    if not autocast and weight.dtype != hidden_states.dtype:
        raise ValueError(f"hidden_states are {hidden_states.dtype}, but the head's weight is {weight.dtype}")

    targets = targets.reshape(-1).to(hidden_states.device)
    counted = (targets != ignore_index).sum()
    chunks = _Chunks(
        size=chunk_size,
        dtype=torch.get_autocast_dtype(device) if autocast else hidden_states.dtype,
        normalize=normalize,
        max_z=z_loss_weight,
        max_z_of_all=num_items_in_batch is None,
        ignore_index=ignore_index,
        needed=tuple(
            torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden_states, weight, bias)
        ),
    )
    loss = _ChunkedLoss.apply(hidden_states.reshape(-1, hidden_states.shape[-1]), weight, bias, targets, chunks)
    return _average(loss, counted, num_items_in_batch)


def _refuse_label_smoothing(label_smoothing: float) -> None:
    if label_smoothing:
        raise ValueError(
            f"label_smoothing={label_smoothing} is not part of this loss; leave it at 0, or use "
            "TrainingArguments(label_smoothing_factor=...), which computes it from the logits"
        )


def _average(loss_sum: Tensor, counted: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
    if num_items_in_batch is None:
        num_items_in_batch = counted
    total = torch.as_tensor(num_items_in_batch, device=loss_sum.device)
    # Chosen after the division: gradients through a division by 0 would be NaN too.
    return (loss_sum / total.clamp(min=1)).where(total > 0, torch.nan)


class _ChunkedLoss(torch.autograd.Function):
    """(tokens, hidden), (vocab, hidden), (vocab,) or None, (tokens,), _Chunks -> the loss summed over counted tokens.

    The gradients are taken in forward, for an incoming gradient of 1, and handed over in backward: nothing of the
    size of the weight is held twice. Should backward run again (`retain_graph=True`), they are taken anew.
    """

    @staticmethod
    def forward(ctx, hidden_states, weight, bias, targets, chunks):
        ctx.chunks = chunks
        ctx.save_for_backward(hidden_states, weight, bias, targets)
        with torch.autocast(hidden_states.device.type, enabled=False):
            loss, ctx.gradients = chunks.loss_and_gradients(hidden_states, weight, bias, targets)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "The chunked loss can be differentiated only once, but backward runs with create_graph=True; "
                "set model.config.loss_chunk_size = None to compute the loss from the logits"
            )
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            with torch.autocast(grad_loss.device.type, enabled=False):
                _, gradients = ctx.chunks.loss_and_gradients(*ctx.saved_tensors)
        gradients = (
            gradient if gradient is None else gradient.mul_(grad_loss).to(tensor.dtype)
            for gradient, tensor in zip(gradients, ctx.saved_tensors[:3], strict=True)
        )
        return *gradients, None, None


@dataclass(frozen=True)
class _Chunks:
    """How the loss is cut up and computed. Sums over tokens i, with logits z_iv = h_i . u_v + b_v, u_v = w_v r_v::

        L = sum_i [counted] (logsumexp_v z_iv - z_iy)  +  c sum_i max_v z_iv^2
        g_iv = dL/dz_iv = [counted] (softmax(z_i)_v - [v = y_i])  +  2 c max_v z_iv [v = argmax z_i]
        dL/dh_i = sum_v g_iv u_v,    dL/du_v = sum_i g_iv h_i,    dL/db_v = sum_i g_iv
        dL/dw_v = r_v dL/du_v - r_v^3 (w_v . dL/du_v) w_v         r_v = 1 / |w_v| for a NormHead, else u = w

    The second sum is over all tokens, with c = max_z * counted / tokens, or over the counted ones, with c = max_z.
    Nothing is divided by the number of tokens otherwise, so that half precision does not lose small gradients before the
    incoming gradient (a loss scale, perhaps) reaches them.
    """

    size: int
    dtype: torch.dtype  # of the matmuls
    normalize: bool
    max_z: float
    max_z_of_all: bool
    ignore_index: int
    needed: tuple[bool, ...]  # of hidden states, weight and bias: whose gradients

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Chunks of about equal size: one of a few tokens would take as long to add to the weight's gradient."""
        return rows.tensor_split(-(-len(rows) // self.size)) if len(rows) else ()

    def loss_and_gradients(
        self, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor
    ) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
        needs_hidden, needs_weight, needs_bias = self.needed
        exact = torch.promote_types(hidden_states.dtype, torch.float32)
        inputs, matrix = hidden_states.to(self.dtype), weight.to(self.dtype)
        row_scale = inverse_row_norms(weight) if self.normalize else None
        grad_hidden = torch.zeros_like(hidden_states) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if needs_bias else None

        is_counted = targets != self.ignore_index
        counted = is_counted.nonzero().squeeze(1)
        max_z = self.max_z * (len(counted) / max(len(targets), 1) if self.max_z_of_all else 1)
        ignored = (~is_counted).nonzero().squeeze(1) if max_z and self.max_z_of_all else counted[:0]

        work = _Workspace(min(self.size, max(len(counted), len(ignored))), matrix, row_scale, bias, exact)
        loss = torch.zeros((), dtype=exact, device=weight.device)
        for rows in self._split(counted):
            tokens, labels = inputs[rows], targets[rows, None]
            logits = work.logits(tokens)
            # Finding where the largest is takes a CPU five times as long as finding it.
            largest, argmax = logits.max(dim=-1, keepdim=True) if max_z else (logits.amax(dim=-1, keepdim=True), None)
            below_largest = logits.gather(1, labels) - largest
            exponentials = logits.sub_(largest).exp_()
            total = exponentials.sum(dim=-1, keepdim=True)
            loss += (total.log() - below_largest + max_z * largest.square()).sum()
            if not any(self.needed):
                continue
            grad_logits = exponentials.div_(total)
            grad_logits.scatter_add_(1, labels, -torch.ones_like(largest))
            if max_z:
                grad_logits.scatter_add_(1, argmax, 2 * max_z * largest)
            if needs_bias:
                grad_bias += grad_logits.sum(dim=0)
            if needs_weight:
                work.add_product(grad_weight, work.rounded(grad_logits).t(), tokens)
            if needs_hidden:
                grad_hidden[rows] = work.times_matrix_(grad_logits).to(hidden_states.dtype)

        for rows in self._split(ignored):
            largest, argmax = work.logits(inputs[rows]).max(dim=-1)
            loss += max_z * largest.square().sum()
            grad_largest = 2 * max_z * largest
            if needs_bias:
                grad_bias.index_add_(0, argmax, grad_largest)
            if needs_weight:
                grad_weight.index_add_(0, argmax, grad_largest[:, None] * inputs[rows])
            if needs_hidden:
                grad_largest = grad_largest if row_scale is None else grad_largest * row_scale[argmax]
                grad_hidden[rows] = (grad_largest[:, None] * matrix[argmax]).to(hidden_states.dtype)

        del work
        if needs_weight:
            if row_scale is not None:
                _through_row_norms_(grad_weight, weight, row_scale)
            # fp16 would overflow before the incoming gradient scales it down.
            grad_weight = grad_weight if weight.dtype == torch.float16 else grad_weight.to(weight.dtype)
        return loss, (grad_hidden, grad_weight, grad_bias)


class _Workspace:
    """The chunk's logits, allocated once for all chunks: in the matmuls' dtype and, if that is another, in full."""

    def __init__(self, tokens: int, matrix: Tensor, row_scale: Tensor | None, bias: Tensor | None, exact: torch.dtype):
        self.matrix, self.row_scale, self.bias = matrix, row_scale, bias
        self.products = matrix.new_empty(tokens, matrix.shape[0])
        self.exact = self.products if matrix.dtype == exact else torch.empty_like(self.products, dtype=exact)

    def logits(self, tokens: Tensor) -> Tensor:
        logits, factors = self.exact[: len(tokens)], None
        if self.row_scale is not None and tokens.dtype == torch.float16:
            factors = fit_into_fp16(tokens, self.row_scale)
            tokens = tokens * factors
        product = torch.mm(tokens, self.matrix.t(), out=self.products[: len(tokens)])
        if product.dtype != logits.dtype:
            logits.copy_(product)
        if self.row_scale is not None:
            logits.mul_(self.row_scale)
        if factors is not None:
            logits.div_(factors)
        if self.bias is not None:
            logits.add_(self.bias)
        return logits

    def rounded(self, grad_logits: Tensor) -> Tensor:
        """`grad_logits` in the matmuls' dtype."""
        if grad_logits.dtype == self.products.dtype:
            return grad_logits
        return self.products[: len(grad_logits)].copy_(grad_logits)

    def times_matrix_(self, grad_logits: Tensor) -> Tensor:
        """`grad_logits @ u`, for which they are overwritten."""
        if self.row_scale is None:
            return self.rounded(grad_logits) @ self.matrix
        grad_logits.mul_(self.row_scale)
        if self.products.dtype != torch.float16:
            return self.rounded(grad_logits) @ self.matrix
        # The scale of the rows would lose small gradients.
        largest = self.row_scale.min().reciprocal().clamp(1, FP16_REACH)
        return (self.rounded(grad_logits.mul_(largest)) @ self.matrix).float() / largest

    def add_product(self, result: Tensor, left: Tensor, right: Tensor) -> None:
        """`result += left @ right`, added in the precision of `result`."""
        if left.dtype == result.dtype:
            result.addmm_(left, right)
            return
        for rows in _blocks(len(result)):
            # Additions of mixed dtypes make a converted copy first: this one is small, and copying is the fast half.
            result[rows] += (left[rows] @ right).to(result.dtype)


def _blocks(rows: int) -> Iterator[slice]:
    return (slice(start, start + ROWS_AT_A_TIME) for start in range(0, rows, ROWS_AT_A_TIME))


def _through_row_norms_(gradient: Tensor, weight: Tensor, row_scale: Tensor) -> None:
    """Turns the gradient of the normalized rows u = r w into that of the raw rows w, in place."""
    for rows in _blocks(len(gradient)):
        raw, scale, block = weight[rows].to(gradient.dtype), row_scale[rows, None], gradient[rows]
        along = (raw * block).sum(dim=-1, keepdim=True)
        block.mul_(scale).addcmul_(raw, scale**3 * along, value=-1)
