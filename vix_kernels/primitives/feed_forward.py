"""feed_forward: the second half of a block, for many tokens on a CPU.

    y = residual + shares drop(W2 drop(act(W1 n + b1)) + b2),    n = layer_norm(x)

Everything in it is done token by token. So tokens pass through all of it in tiles that stay in the cache, where plain PyTorch
writes six maps of all tokens to fresh memory; and nothing but x (and what dropout kept) is kept for backward, which does the
normalisation, the first linear map and the activation once more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch.dropout import scale_of_kept
from .._torch.feed_forward import ACTIVATIONS, feed_forward_backward, feed_forward_forward


def feed_forward(
    x: Tensor,
    residual: Tensor | None,
    norm: tuple[Tensor, Tensor, float] | None,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    activation: str,
    p: float = 0.0,
    shares: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """The equation, with linear maps in `dtype` and the rest in that of x.

    Args:
        x: (..., C), on the CPU.
        residual: like x; None: n stands for it.
        norm: weight, bias and eps of the layer norm; None: n is x itself.
        weights: W1 (hidden, C), b1, W2 (C, hidden) and b2.
        activation: "gelu" or "hardswish".
        p: of dropout. What it keeps is scaled by scaling the weights behind it.
        shares: (..., 1), a factor of each token's branch.

    Returns:
        y like x. Differentiable in x, residual, norm and weights, twice too.
    """
    gamma, beta, eps = (None, None, 0.0) if norm is None else norm
    return _FeedForward.apply(x, residual, gamma, beta, *weights, shares, (eps, activation, p, dtype))


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, gamma, beta, w1, b1, w2, b2, shares, options):
        eps, activation, p, dtype = options
        rows, scale = x.shape[:-1].numel(), scale_of_kept(p)
        inner, outer = (torch.empty(rows, len(b), dtype=torch.uint8) if p else None for b in (b1, b2))
        ctx.save_for_backward(x, gamma, beta, w1, b1, w2, b2, inner, outer, shares)
        ctx.options = eps, activation, scale, dtype
        # A residual that is x itself shares its gradient.
        ctx.start = "n" if residual is None else "x" if residual is x else "residual"
        return feed_forward_forward(
            x, residual, (gamma, beta, eps), (w1, b1, w2, b2), activation, p, scale, (inner, outer), shares, dtype
        )  # fmt: skip

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():
            return _differentiable_gradients(ctx, dy)
        x, gamma, beta, w1, b1, w2, b2, inner, outer, shares = ctx.saved_tensors
        eps, activation, scale, dtype = ctx.options
        dx, dgamma, dbeta, *dweights = feed_forward_backward(
            dy, x, ctx.start, (gamma, beta, eps), (w1, b1, w2, b2), activation, scale, (inner, outer), shares, dtype
        )  # fmt: skip
        return dx, dy if ctx.start == "residual" else None, dgamma, dbeta, *dweights, None, None


def _differentiable_gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    """What backward of _FeedForward returns, by autograd from the plain form: for second derivatives."""
    x, gamma, beta, w1, b1, w2, b2, inner, outer, shares = ctx.saved_tensors
    eps, activation, scale, dtype = ctx.options
    with torch.autocast("cpu", enabled=False):
        n = x if gamma is None else torch.layer_norm(x, gamma.shape, gamma, beta, eps)
        a = ACTIVATIONS[activation][0](F.linear(n.to(dtype), w1.to(dtype), b1.to(dtype)))
        if inner is not None:
            a = a * inner.view(a.shape).to(dtype) * scale
        branch = F.linear(a, w2.to(dtype), b2.to(dtype))
        if outer is not None:
            branch = branch * outer.view(branch.shape).to(dtype) * scale
        if shares is not None:
            branch = branch * shares
        y = {"n": n, "x": x, "residual": 0}[ctx.start] + branch
    inputs = (x, None, gamma, beta, w1, b1, w2, b2)
    wanted = [i for i, each in enumerate(inputs) if each is not None and ctx.needs_input_grad[i]]
    grads = torch.autograd.grad(y, [inputs[i] for i in wanted], dy.to(y.dtype), create_graph=True)
    results: list[Tensor | None] = [None] * 10
    for i, grad in zip(wanted, grads, strict=True):
        results[i] = grad
    results[1] = dy if ctx.start == "residual" else None
    return tuple(results)
