"""Operations on tensors that torch lacks."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute


def interpolate(x: Tensor, xp: Tensor, fp: Tensor) -> Tensor:
    """x any shape in [0, 1]; xp increasing (n,), fp (n,) -> values at x, in x's dtype."""
    x64 = x.double().clamp(0, 1)
    i = torch.searchsorted(xp, x64.contiguous()).clamp(1, len(xp) - 1)
    share = (x64 - xp[i - 1]) / (xp[i] - xp[i - 1])
    return (fp[i - 1] + share * (fp[i] - fp[i - 1])).to(x.dtype)


def sum_by_rows(f: Callable[..., Tensor], rows: int, *tensors: Tensor) -> Tensor:
    """f(*tensors), a sum over rows, from `rows` of them at a time, recomputed in the backward pass; 0: all at once."""
    if not rows or rows >= len(tensors[0]):
        return f(*tensors)
    parts = zip(*(x.split(rows) for x in tensors), strict=True)
    return torch.stack([recompute(f, *part, use_reentrant=False) for part in parts]).sum()


@functools.cache
def flex_attention() -> Any:
    """Fused attention whose scores a function changes, compiled once; only worth it on a GPU."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
