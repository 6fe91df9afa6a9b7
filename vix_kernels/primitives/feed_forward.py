"""feed_forward: the second half of a block, for many tokens on a CPU.

    y = residual + shares drop(W2 drop(act(W1 n + b1)) + b2),    n = layer_norm(x)

Everything in it is done token by token. So tokens pass through all of it in tiles that stay in the cache, where plain PyTorch
writes six maps of all tokens to fresh memory; and nothing but x (and what dropout kept) is kept for backward, which does the
normalisation, the first linear map and the activation once more.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import draw_kept, scale_of_kept

TILE_CPU = 512  # tokens a thread: three tiles of a hidden width of 256 fill 1.5 MiB
ACTIVATIONS = {
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "hardswish": (F.hardswish, torch.ops.aten.hardswish_backward),
}


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
    return _FeedForward.apply(x, residual, gamma, beta, eps, *weights, activation, p, shares, dtype)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, gamma, beta, eps, w1, b1, w2, b2, activation, p, shares, dtype):
        rows, scale = x.shape[:-1].numel(), scale_of_kept(p)
        inner, outer = (torch.empty(rows, len(b), dtype=torch.uint8) if p else None for b in (b1, b2))
        ctx.save_for_backward(x, gamma, beta, w1, b1, w2, b2, inner, outer, shares)
        ctx.options = eps, activation, scale, dtype
        # A residual that is x itself shares its gradient.
        ctx.start = "n" if residual is None else "x" if residual is x else "residual"
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        starts = _tiles(x if residual is None else residual)
        with torch.autocast("cpu", enabled=False):
            v1, c1, v2, c2 = (each.to(dtype) for each in (w1, b1, w2 * scale**2, b2 * scale))
            for tile, start, out, some, others, share in zip(
                _tiles(x), starts, _tiles(y), _tiles(inner), _tiles(outer), _tiles(shares), strict=False
            ):
                n = tile if gamma is None else torch.layer_norm(tile, gamma.shape, gamma, beta, eps)
                a = ACTIVATIONS[activation][0](torch.addmm(c1, n.to(dtype), v1.T))
                if p:
                    a *= draw_kept(some, p).to(dtype)
                branch = torch.addmm(c2, a, v2.T)
                if p:
                    branch *= draw_kept(others, p).to(dtype)
                if share is not None:
                    branch = branch * share
                torch.add(n if residual is None else start, branch, out=out)
        return y

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():
            return _differentiable_gradients(ctx, dy)
        x, gamma, beta, w1, b1, w2, b2, inner, outer, shares = ctx.saved_tensors
        eps, activation, scale, dtype = ctx.options
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dw1, db1, dw2, db2 = (torch.zeros_like(each) for each in (w1, b1, w2, b2))
        dgamma, dbeta = (None, None) if gamma is None else (torch.zeros_like(gamma), torch.zeros_like(beta))
        with torch.autocast("cpu", enabled=False):
            v1, c1, v2 = (each.to(dtype) for each in (w1, b1, w2 * scale**2))
            for tile, grad, out, some, others, share in zip(
                _tiles(x), _tiles(dy), _tiles(dx), _tiles(inner), _tiles(outer), _tiles(shares), strict=False
            ):
                n = tile
                if gamma is not None:
                    n, mean, rstd = torch.native_layer_norm(tile, gamma.shape, gamma, beta, eps)
                d = grad if share is None else grad * share
                n, d = n.to(dtype), (d if others is None else others.to(d.dtype).mul_(d)).to(dtype)
                h = torch.addmm(c1, n, v1.T)
                a, da = ACTIVATIONS[activation][0](h), d @ v2
                if some is not None:
                    kept = some.to(dtype)
                    a *= kept
                    da *= kept
                dh = ACTIVATIONS[activation][1](da, h)
                _add_product(dw2, d.T, a)
                _add_product(dw1, dh.T, n)
                db2 += d.sum(0, dtype=db2.dtype)
                db1 += dh.sum(0, dtype=db1.dtype)
                dn = (dh @ v1).to(grad.dtype)
                if ctx.start == "n":
                    dn += grad
                if gamma is not None:
                    dn, dg, db = torch.ops.aten.native_layer_norm_backward(
                        dn, tile, gamma.shape, mean, rstd, gamma, beta, [True, True, True]
                    )
                    dgamma += dg
                    dbeta += db
                if ctx.start == "x":
                    torch.add(dn, grad, out=out)
                else:
                    out.copy_(dn)
        dw2, db2 = dw2.mul_(scale**2), db2.mul_(scale)
        return dx, dy if ctx.start == "residual" else None, dgamma, dbeta, None, dw1, db1, dw2, db2, None, None, None, None


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
    inputs = (x, None, gamma, beta, None, w1, b1, w2, b2)
    wanted = [i for i, each in enumerate(inputs) if each is not None and ctx.needs_input_grad[i]]
    grads = torch.autograd.grad(y, [inputs[i] for i in wanted], dy.to(y.dtype), create_graph=True)
    results: list[Tensor | None] = [None] * 13
    for i, grad in zip(wanted, grads, strict=True):
        results[i] = grad
    results[1] = dy if ctx.start == "residual" else None
    return tuple(results)


def _tiles(x: Tensor | None) -> Iterable[Tensor | None]:
    """Tiles of tokens; without x none for every tile."""
    return repeat(None) if x is None else x.flatten(0, -2).split(TILE_CPU * torch.get_num_threads())


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
