"""A decorator for backward functions that cannot be differentiated again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def once_differentiable(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Decorate `backward(ctx, saved, *gradients)` so that differentiating its results raises an error.

    `saved` is ctx.saved_tensors. PyTorch's decorator of the same name raises an error only if an incoming gradient has
    requires_grad=True. However, the results also depend on the saved tensors. With PyTorch's decorator, the derivative of g in
    `g, = grad(op(x).sum(), x, create_graph=True)` would silently be lost.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *gradients: Tensor | None) -> Gradients:
        saved = ctx.saved_tensors  # read only once, because checkpointing does not allow a second access
        with torch.no_grad():
            results = backward(ctx, saved, *gradients)
        # In compiled code, the compiler itself raises an error if results are differentiated again.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return results
        sources = [x for x in (*saved, *gradients) if x is not None and x.requires_grad]
        if not sources:
            return results
        refused = iter(_Refuse.apply(len(sources), *sources, *(x for x in results if isinstance(x, Tensor))))
        return tuple(next(refused) if isinstance(x, Tensor) else x for x in results)

    return wrapper


class _Refuse(torch.autograd.Function):
    """Returns `tensors[count:]`. Differentiating the results raises an error.

    For autograd, the results depend on all tensors.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        raise RuntimeError(
            "vix_kernels: this gradient cannot be differentiated again; backend='reference' supports second derivatives"
        )
