"""feed_forward: the second half of a transformer block, for many tokens on a CPU.

    y = residual + factors drop(W2 drop(act(W1 n + b1)) + b2),    n = layer_norm(x)

Tokens are independent of each other, so each tile of tokens goes through all steps while it is in the cache. Plain PyTorch
would write every intermediate tensor for all tokens to memory. In addition to the parameters, only x, the dropout masks and the
factors are saved for the backward pass. The backward pass recomputes the normalization, the first linear layer and the
activation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch.dropout import kept_scale
from .._torch.feed_forward import ACTIVATIONS, feed_forward_backward, feed_forward_forward


def feed_forward(
    x: Tensor,
    residual: Tensor | None,
    norm: tuple[Tensor, Tensor, float] | None,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    activation: str,
    p: float = 0.0,
    factors: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """Apply a layer norm and an MLP to x, and add the residual. The layer norm and the sum are computed in x's dtype.

    Args:
        x: (..., C), on the CPU.
        residual: a tensor with the shape of x. If None, the output n of the layer norm is the residual.
        norm: weight, bias and eps of the layer norm. If None, there is no layer norm, so n = x.
        weights: W1 (hidden, C), b1, W2 (C, hidden) and b2.
        activation: "gelu" or "hardswish".
        p: dropout probability, after the activation and after the second linear layer.
        factors: (..., 1), one factor per token for the output of the MLP. If None, the factors are 1.
        dtype: dtype of the linear layers, the activation and the dropout.

    Returns:
        y, with the shape and dtype of x. Twice differentiable in x, residual, norm and weights.
    """
    gamma, beta, eps = (None, None, 0.0) if norm is None else norm
    return _FeedForward.apply(x, residual, gamma, beta, *weights, factors, (eps, activation, p, dtype))


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, gamma, beta, w1, b1, w2, b2, factors, options):
        eps, activation, p, dtype = options
        rows, scale = x.shape[:-1].numel(), kept_scale(p)
        inner, outer = (torch.empty(rows, len(b), dtype=torch.uint8) if p else None for b in (b1, b2))
        ctx.save_for_backward(x, gamma, beta, w1, b1, w2, b2, inner, outer, factors)
        ctx.options = eps, activation, scale, dtype
        # If residual is x, the gradient of residual is part of dx.
        ctx.start = "n" if residual is None else "x" if residual is x else "residual"
        return feed_forward_forward(
            x, residual, (gamma, beta, eps), (w1, b1, w2, b2), activation, p, scale, (inner, outer), factors, dtype
        )  # fmt: skip

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():
            return _differentiable_gradients(ctx, dy)
        x, gamma, beta, w1, b1, w2, b2, inner, outer, factors = ctx.saved_tensors
        eps, activation, scale, dtype = ctx.options
        dx, dgamma, dbeta, *dweights = feed_forward_backward(
            dy, x, ctx.start, (gamma, beta, eps), (w1, b1, w2, b2), activation, scale, (inner, outer), factors, dtype
        )  # fmt: skip
        return dx, dy if ctx.start == "residual" else None, dgamma, dbeta, *dweights, None, None


def _differentiable_gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Compute the results of _FeedForward.backward with autograd, so that they can be differentiated again."""
    x, gamma, beta, w1, b1, w2, b2, inner, outer, factors = ctx.saved_tensors
    eps, activation, scale, dtype = ctx.options
    with torch.autocast("cpu", enabled=False):
        n = x if gamma is None else torch.layer_norm(x, gamma.shape, gamma, beta, eps)
        a = ACTIVATIONS[activation][0](F.linear(n.to(dtype), w1.to(dtype), b1.to(dtype)))
        if inner is not None:
            a = a * inner.view(a.shape).to(dtype) * scale
        branch = F.linear(a, w2.to(dtype), b2.to(dtype))
        if outer is not None:
            branch = branch * outer.view(branch.shape).to(dtype) * scale
        if factors is not None:
            branch = branch * factors
        y = {"n": n, "x": x, "residual": 0}[ctx.start] + branch
    inputs = (x, None, gamma, beta, w1, b1, w2, b2)
    wanted = [i for i, each in enumerate(inputs) if each is not None and ctx.needs_input_grad[i]]
    grads = torch.autograd.grad(y, [inputs[i] for i in wanted], dy.to(y.dtype), create_graph=True)
    results: list[Tensor | None] = [None] * 10
    for i, grad in zip(wanted, grads, strict=True):
        results[i] = grad
    results[1] = dy if ctx.start == "residual" else None
    return tuple(results)
