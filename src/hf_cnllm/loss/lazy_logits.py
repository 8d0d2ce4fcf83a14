"""Logits that are computed when somebody reads them.

A training step needs the loss alone, and [tokens, vocab_size] logits are most of its memory, yet `outputs.logits` is
part of every causal language model's interface: metrics, distillation losses and hooks read it. A lazy tensor has
the logits' shape, dtype, device and place in the autograd graph at once, and their values from the first operation on.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


def lazy_logits(head: nn.Module, hidden_states: Tensor) -> Tensor:
    """`head(hidden_states)` in the autocast state of this call, computed when it is first read.

    Args:
        head: maps (..., hidden_size) to (..., head.out_features), with parameters but no other state.
        hidden_states: (..., hidden_size).

    Reading the values raises RuntimeError after a parameter of the head or the hidden states have been changed in
    place (an optimizer step): they would not be the logits of this forward pass.
    """
    device = hidden_states.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden_states.dtype

    names = [name for name, _ in head.named_parameters()]

    def project(hidden_states: Tensor, *parameters: Tensor) -> Tensor:
        with torch.autocast(device, dtype=dtype if autocast else None, enabled=autocast):
            return torch.func.functional_call(head, dict(zip(names, parameters, strict=False)), hidden_states)

    shape = (*hidden_states.shape[:-1], head.out_features)
    return _LazyHead.apply(project, shape, dtype, hidden_states, *head.parameters())


class _LazyHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, project, shape, dtype, *inputs):
        ctx.project = project
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        versions = [tensor._version for tensor in inputs]
        hidden_states = inputs[0].detach()

        def compute() -> Tensor:
            if versions != [tensor._version for tensor in inputs]:
                raise RuntimeError(
                    "outputs.logits are read after the output head or its input was changed in place. Read them before "
                    "optimizer.step(), or set model.config.loss_chunk_size = None to compute them in the forward pass"
                )
            with torch.no_grad():
                return project(hidden_states)

        return LazyTensor(compute, shape, dtype, hidden_states.device)

    @staticmethod
    def backward(ctx, grad_logits):
        needed = ctx.needs_input_grad[3:]
        if grad_logits is None:  # DistributedDataParallel makes all outputs one node of the graph
            return None, None, None, *(None for _ in needed)
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views of their own: a tied weight is also what the hidden states come from, all the way through the model.
            views = [tensor.view_as(tensor) for tensor in ctx.saved_tensors]
            logits = ctx.project(*views)
        inputs = [view for view, is_needed in zip(views, needed, strict=True) if is_needed]
        gradients = iter(torch.autograd.grad(logits, inputs, grad_logits, create_graph=create_graph))
        return None, None, None, *(next(gradients) if is_needed else None for is_needed in needed)


_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)


class LazyTensor(Tensor):
    """A tensor whose values `compute` returns when the first operation needs them.

    Copies and casts wait too: accelerate casts every output of a mixed-precision model to fp32, and
    DistributedDataParallel may copy it. This class sits below autograd, which sees an ordinary tensor, so the results
    of operations have the right gradients.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    _compute: Callable[[], Tensor]
    _computed: Tensor | None

    @staticmethod
    def __new__(cls, compute: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        lazy = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        lazy._compute, lazy._computed = compute, None
        return lazy

    def result(self) -> Tensor:
        """The values as an ordinary tensor outside the autograd graph, computed once."""
        if self._computed is None:
            self._computed = self._compute()
            del self._compute
        return self._computed

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if operation in _COPIES and kwargs.keys() <= {"dtype"} and args[0]._computed is None:
            return args[0]._copy_later(operation, **kwargs)
        args, kwargs = tree_map_only(cls, cls.result, (args, kwargs))
        return operation(*args, **kwargs)

    def _copy_later(self, operation: Callable[..., Tensor], **kwargs) -> "LazyTensor":
        version = self._version

        def compute() -> Tensor:
            if self._version != version:
                raise RuntimeError(
                    "outputs.logits were changed in place after a copy of them was made; detach() it first"
                )
            return operation(self.result(), **kwargs)

        return LazyTensor(compute, self.shape, kwargs.get("dtype", self.dtype), self.device)

    # What torch does not send through the dispatcher.
    def data_ptr(self) -> int:
        return self.result().data_ptr()

    def tolist(self) -> list:
        return self.result().tolist()

    def __reduce_ex__(self, protocol):
        return self.detach().__reduce_ex__(protocol)
