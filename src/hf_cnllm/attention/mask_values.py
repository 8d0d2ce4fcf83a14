"""What an `attention_mask` may hold: its shape and values are checked here, before `masks.py` says who sees whom."""

import torch

from .._compat.modeling import is_tracing


def check_mask(
    attention_mask: object,
    batch: int,
    past: int | torch.Tensor,
    queries: int,
    keys: int | None = None,
    forms: tuple[int, ...] = (2, 4),
) -> bool | None:
    """Refuses a mask of another shape than the inputs have, or of values that no mask has. What `generate` made of one
    passes.

    Args:
        past: number of tokens in the cache. A static cache counts in a tensor, which is not looked at.
        keys: length of what attention functions get, which a mask of 3 or 4 dimensions may have too.

    Returns:
        Whether it is 2-D with the numbers of several sequences; None while tracing, where values cannot be read. That is
        the one question that accelerators are asked (and waited for): the answer tells wrong values by the way.

    Raises:
        ValueError: naming both shapes, or the first value that is wrong.
    """
    if not isinstance(attention_mask, torch.Tensor):
        return False
    shape = list(attention_mask.shape)
    tokens = past + queries if isinstance(past, int) else shape[-1] if shape else queries
    wanted = {2: [batch, tokens], 3: [batch, queries, tokens], 4: [batch, 1, queries, tokens]}
    fits = attention_mask.ndim in forms and (
        shape == wanted[2]
        if attention_mask.ndim == 2
        else shape[0] in (1, batch) and shape[-2] == queries and tokens <= shape[-1] <= (keys or shape[-1])
    )
    if not fits:
        raise ValueError(
            f"`attention_mask` has shape {shape}, but the inputs are {batch} sequences of {tokens} tokens, those in "
            f"`cache` included. Pass a mask of shape {' or '.join(str(wanted[form]) for form in forms)}."
        )
    if attention_mask.ndim == 2:
        return is_packed(attention_mask)
    if attention_mask.ndim == 4 and attention_mask.is_floating_point():
        _check_biases(attention_mask)
    elif queries > 1:
        largest_number(attention_mask, 1)
    return False


def is_packed(attention_mask: object) -> bool | None:
    """Whether a 2-D mask holds the numbers of several sequences; None while tracing, where values cannot be read.

    Raises:
        ValueError: it holds what are no such numbers.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return False
    largest = largest_number(attention_mask, attention_mask.shape[1])
    return None if largest is None else largest > 1


def largest_number(attention_mask: torch.Tensor, most: int) -> int | None:
    """The largest number in a mask of whole numbers from 0 to `most`; None while tracing, where values cannot be read.

    Raises:
        ValueError: it holds others.
    """
    if attention_mask.dtype == torch.bool:
        return 1
    if attention_mask.is_complex():
        raise ValueError(
            f"`attention_mask` is of dtype {attention_mask.dtype}, but must be bool, whole numbers or floats."
        )
    if not is_readable(attention_mask):
        return None
    if not attention_mask.is_floating_point():
        attention_mask = attention_mask.long()  # of unsigned numbers torch knows no smallest
    smallest, largest = (value.item() for value in attention_mask.aminmax())
    whole = not attention_mask.is_floating_point() or bool((attention_mask == attention_mask.trunc()).all())
    if whole and smallest >= 0 and largest <= most:
        return int(largest)
    wrong = ~((attention_mask == attention_mask.trunc()) & (attention_mask >= 0) & (attention_mask <= most))
    packed = f", or, for sequences packed into a row, numbers from 1 to its length ({most})" if most > 1 else ""
    raise ValueError(
        f"`attention_mask` holds {attention_mask[wrong][0].item()}, but must hold 0 for what is not seen and 1 for what "
        f"is{packed}. What is added to scores has shape [batch, 1, queries, keys]."
    )


def _check_biases(biases: torch.Tensor) -> None:
    """Refuses an additive mask that holds NaN or +inf, or that is none, being of 0 and 1."""
    if biases.shape[2] == 1 or not is_readable(biases) or biases.device.type != "cpu":
        return
    smallest, largest = (value.item() for value in biases.aminmax())
    if not largest < torch.inf:
        raise ValueError(f"`attention_mask` holds {largest}, but one of 4 dimensions is added to scores.")
    if (smallest, largest) == (0, 1) and ((biases == 0) | (biases == 1)).all():
        raise ValueError(
            "a 4-D `attention_mask` of floats is added to scores, but this one is of 0 and 1: pass `attention_mask.bool()`."
        )


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether there are values to look at: not while tracing, for `torch.compile` and `torch.export` alike, whose graphs are to
    hold for others too, nor in `torch.func.vmap`, where there are several at once. Everything that checks values asks here."""
    return not (is_tracing(tensor) or tensor.device.type == "meta" or tensor.numel() == 0 or in_transform())


def in_transform() -> bool:
    """Whether a transform of `torch.func` (`grad`, `vmap`, `jvp`, …) runs what is called here."""
    return torch._C._are_functorch_transforms_active()
