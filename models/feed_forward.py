"""The feed-forward half of a block: x + mlp(norm(x)).

Everything in it is done token by token. On a CPU the tokens therefore pass through all of it in tiles that stay in the
cache, where plain PyTorch writes six maps of all tokens to fresh memory; and nothing but x is kept for backward, which does
the normalisation, the first linear map and the activation once more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vix_kernels.nn.plain import is_plain

TILE_CPU = 512  # tokens a thread: three tiles of a hidden width of 256 fill 1.5 MiB


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int, drop: float, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = activation()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


def feed_forward(x: Tensor, norm: nn.Module, mlp: nn.Module, drop_path: nn.Module, renormalise: bool = False) -> Tensor:
    """x + drop_path(mlp(norm(x))), or, `renormalise`, n + drop_path(mlp(n)) with n = norm(x). x (B, tokens, dim)."""
    if not _serves_tiles(x, mlp, drop_path):
        n = norm(x)
        return (n if renormalise else x) + drop_path(mlp(n))
    weights = mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias
    options = _ACTIVATIONS[type(mlp.act)], torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if is_plain(norm, nn.LayerNorm):
        return _TiledMlp.apply(x, None if renormalise else x, norm.weight, norm.bias, norm.eps, *weights, *options)
    n = norm(x)
    return _TiledMlp.apply(n, None if renormalise else x, None, None, 0.0, *weights, *options)


_ACTIVATIONS = {
    nn.GELU: (F.gelu, torch.ops.aten.gelu_backward),
    nn.Hardswish: (F.hardswish, torch.ops.aten.hardswish_backward),
}


def _serves_tiles(x: Tensor, mlp: nn.Module, drop_path: nn.Module) -> bool:
    """On a CPU, where nothing is random and no module was exchanged or hooked; compilers fuse the plain form themselves."""
    if x.device.type != "cpu" or type(mlp) is not Mlp or type(mlp.act) not in _ACTIVATIONS:
        return False
    if mlp.training and mlp.drop.p > 0 or drop_path.training and drop_path.rate > 0:
        return False
    kinds = (mlp, Mlp), (mlp.fc1, nn.Linear), (mlp.act, type(mlp.act)), (mlp.fc2, nn.Linear)
    return all(is_plain(module, kind) for module, kind in kinds)


class _TiledMlp(torch.autograd.Function):
    """y = residual + W2 act(W1 n + b1) + b2, linear maps in `dtype`, the rest in that of x.

    n is norm(x), or x itself where `gamma` is None. Where `residual` is None, n stands for it.
    """

    @staticmethod
    def forward(ctx, x, residual, gamma, beta, eps, w1, b1, w2, b2, activation, dtype):
        ctx.save_for_backward(x, gamma, beta, w1, b1, w2, b2)
        ctx.options = eps, activation, dtype
        # A residual that is x itself shares its gradient.
        ctx.start = "n" if residual is None else "x" if residual is x else "residual"
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        starts = _tiles(x if residual is None else residual)
        with torch.autocast("cpu", enabled=False):
            v1, c1, v2, c2 = (each.to(dtype) for each in (w1, b1, w2, b2))
            for tile, start, out in zip(_tiles(x), starts, _tiles(y), strict=True):
                n = tile if gamma is None else torch.layer_norm(tile, gamma.shape, gamma, beta, eps)
                a = activation[0](torch.addmm(c1, n.to(dtype), v1.T))
                torch.add(n if residual is None else start, torch.addmm(c2, a, v2.T), out=out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, gamma, beta, w1, b1, w2, b2 = ctx.saved_tensors
        eps, activation, dtype = ctx.options
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        dw1, db1, dw2, db2 = (torch.zeros_like(each) for each in (w1, b1, w2, b2))
        dgamma, dbeta = (None, None) if gamma is None else (torch.zeros_like(gamma), torch.zeros_like(beta))
        with torch.autocast("cpu", enabled=False):
            v1, c1, v2 = (each.to(dtype) for each in (w1, b1, w2))
            for tile, grad, out in zip(_tiles(x), _tiles(dy), _tiles(dx), strict=True):
                n = tile
                if gamma is not None:
                    n, mean, rstd = torch.native_layer_norm(tile, gamma.shape, gamma, beta, eps)
                n, d = n.to(dtype), grad.to(dtype)
                h = torch.addmm(c1, n, v1.T)
                _add_product(dw2, d.T, activation[0](h))
                dh = activation[1](d @ v2, h)
                _add_product(dw1, dh.T, n)
                db2 += grad.sum(0)
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
        return dx, dy if ctx.start == "residual" else None, dgamma, dbeta, None, dw1, db1, dw2, db2, None, None


def _tiles(x: Tensor) -> tuple[Tensor, ...]:
    return x.flatten(0, 1).split(TILE_CPU * torch.get_num_threads())


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
