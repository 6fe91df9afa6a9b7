"""The second half of a transformer block, one tile of tokens at a time (see primitives/feed_forward.py for the equation)."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import draw_kept

TOKENS_PER_THREAD = 512  # tokens per tile and thread; with 256 hidden channels, three float32 tiles take 1.5 MiB per thread
ACTIVATIONS = {
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "hardswish": (F.hardswish, torch.ops.aten.hardswish_backward),
}
Norm = tuple[Tensor | None, Tensor | None, float]  # weight, bias and eps; if weight is None, there is no layer norm
Weights = tuple[Tensor, Tensor, Tensor, Tensor]
Kept = tuple[Tensor | None, Tensor | None]  # dropout masks, uint8 (tokens, hidden) and (tokens, C), or None without dropout


def feed_forward_forward(
    x: Tensor, residual: Tensor | None, norm: Norm, weights: Weights, activation: str, p: float, scale: float, kept: Kept,
    factors: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return y, and write the dropout masks to `kept`. If residual is None, n (x after the layer norm) is the residual.

    `scale` is kept_scale(p), the factor by which kept elements are multiplied.
    """
    (gamma, beta, eps), (w1, b1, w2, b2), (inner, outer) = norm, weights, kept
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    starts = _tiles(x if residual is None else residual)
    with torch.autocast("cpu", enabled=False):
        v1, c1, v2, c2 = (each.to(dtype) for each in (w1, b1, w2 * scale**2, b2 * scale))
        for tile, start, out, inner_kept, outer_kept, factor in zip(
            _tiles(x), starts, _tiles(y), _tiles(inner), _tiles(outer), _tiles(factors), strict=False
        ):
            n = tile if gamma is None else torch.layer_norm(tile, gamma.shape, gamma, beta, eps)
            a = ACTIVATIONS[activation][0](torch.addmm(c1, n.to(dtype), v1.T))
            if p:
                a *= draw_kept(inner_kept, p).to(dtype)
            branch = torch.addmm(c2, a, v2.T)
            if p:
                branch *= draw_kept(outer_kept, p).to(dtype)
            if factor is not None:
                branch = branch * factor
            torch.add(n if residual is None else start, branch, out=out)
    return y


def feed_forward_backward(
    dy: Tensor, x: Tensor, start: str, norm: Norm, weights: Weights, activation: str, scale: float, kept: Kept,
    factors: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Return dx, dgamma, dbeta, dw1, db1, dw2 and db2.

    `start` is the residual that was added: "n" (x after the layer norm), "x", or "residual" (a separate tensor).
    """
    (gamma, beta, eps), (w1, b1, w2, b2), (inner, outer) = norm, weights, kept
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dw1, db1, dw2, db2 = (torch.zeros_like(each) for each in (w1, b1, w2, b2))
    dgamma, dbeta = (None, None) if gamma is None else (torch.zeros_like(gamma), torch.zeros_like(beta))
    with torch.autocast("cpu", enabled=False):
        v1, c1, v2 = (each.to(dtype) for each in (w1, b1, w2 * scale**2))
        for tile, grad, out, inner_kept, outer_kept, factor in zip(
            _tiles(x), _tiles(dy), _tiles(dx), _tiles(inner), _tiles(outer), _tiles(factors), strict=False
        ):
            n = tile
            if gamma is not None:
                n, mean, rstd = torch.native_layer_norm(tile, gamma.shape, gamma, beta, eps)
            d = grad if factor is None else grad * factor
            n, d = n.to(dtype), (d if outer_kept is None else outer_kept.to(d.dtype).mul_(d)).to(dtype)
            h = torch.addmm(c1, n, v1.T)
            a, da = ACTIVATIONS[activation][0](h), d @ v2
            if inner_kept is not None:
                inner_kept = inner_kept.to(dtype)
                a *= inner_kept
                da *= inner_kept
            dh = ACTIVATIONS[activation][1](da, h)
            _add_product(dw2, d.T, a)
            _add_product(dw1, dh.T, n)
            db2 += d.sum(0, dtype=db2.dtype)
            db1 += dh.sum(0, dtype=db1.dtype)
            dn = (dh @ v1).to(grad.dtype)
            if start == "n":
                dn += grad
            if gamma is not None:
                dn, dg, db = torch.ops.aten.native_layer_norm_backward(
                    dn, tile, gamma.shape, mean, rstd, gamma, beta, [True, True, True]
                )
                dgamma += dg
                dbeta += db
            if start == "x":
                torch.add(dn, grad, out=out)
            else:
                out.copy_(dn)
    dw2, db2 = dw2.mul_(scale**2), db2.mul_(scale)
    return dx, dgamma, dbeta, dw1, db1, dw2, db2


def _tiles(x: Tensor | None) -> Iterable[Tensor | None]:
    """Split the tokens of x into tiles. If x is None, yield None indefinitely."""
    return repeat(None) if x is None else x.flatten(0, -2).split(TOKENS_PER_THREAD * torch.get_num_threads())


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
