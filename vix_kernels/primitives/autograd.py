"""First derivatives only: the backward of every `torch.autograd.Function` of this library."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def once_differentiable(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Decorate `backward(ctx, saved, *gradients)`, `saved` being ctx.saved_tensors, so that its results refuse a derivative.

    torch's decorator of this name refuses only where an incoming gradient requires a derivative. But gradients depend on what
    was saved, too: of `g, = grad(op(x).sum(), x, create_graph=True)` it loses the derivative silently.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *gradients: Tensor | None) -> Gradients:
        saved = ctx.saved_tensors  # once: checkpointing does not allow a second look
        with torch.no_grad():
            results = backward(ctx, saved, *gradients)
        # In compiled code the compiler itself refuses.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return results
        sources = [x for x in (*saved, *gradients) if x is not None and x.requires_grad]
        if not sources:
            return results
        refused = iter(_Refuse.apply(len(sources), *sources, *(x for x in results if isinstance(x, Tensor))))
        return tuple(next(refused) if isinstance(x, Tensor) else x for x in results)

    return wrapper


class _Refuse(torch.autograd.Function):
    """Its results are its inputs behind the first `count`, and depend on all of them as far as autograd can tell."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Gradients:
        raise RuntimeError(
            "vix_kernels: this gradient cannot be differentiated again; backend='reference' supports second derivatives"
        )
