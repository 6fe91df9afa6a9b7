"""The feed-forward half of a block: x + mlp(norm(x))."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vix_kernels.nn.dropout import Dropout
from vix_kernels.nn.plain import is_plain
from vix_kernels.primitives import feed_forward as primitive

from .drop_path import DropPath

# Minimum number of hidden activations (16 MiB in float32) for which `primitives.feed_forward` is used. Fewer activations fit
# in the cache, so plain PyTorch, which recomputes nothing, is faster.
MANY_CPU = 2**22


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden_dim: int, drop: float, activation: type[nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = activation()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


def feed_forward(x: Tensor, norm: nn.Module, mlp: nn.Module, drop_path: nn.Module, renormalise: bool = False) -> Tensor:
    """Return x + drop_path(mlp(norm(x))) for x (B, tokens, dim).

    With `renormalise`, return n + drop_path(mlp(n)), where n = norm(x).
    """
    if not _use_tiles(x, mlp, drop_path):
        n = norm(x)
        return (n if renormalise else x) + drop_path(mlp(n))
    weights = mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    factors = drop_path.factors(x)
    factors = None if factors is None else factors.expand(*x.shape[:-1], 1)
    n, layer_norm = (x, (norm.weight, norm.bias, norm.eps)) if is_plain(norm, nn.LayerNorm) else (norm(x), None)
    return primitive.feed_forward(
        n, None if renormalise else x, layer_norm, weights, activation=_ACTIVATIONS[type(mlp.act)],
        p=mlp.drop.p if mlp.drop.active else 0.0, factors=factors, dtype=dtype,
    )  # fmt: skip


_ACTIVATIONS = {nn.GELU: "gelu", nn.Hardswish: "hardswish"}


def _use_tiles(x: Tensor, mlp: nn.Module, drop_path: nn.Module) -> bool:
    """Return whether to use `primitives.feed_forward`, which processes tiles of tokens.

    It is used on a CPU for at least MANY_CPU hidden activations, if the activation function is GELU or hardswish. It is not
    used if `drop_path`, `mlp` or a layer of `mlp` was replaced or has hooks. Compiled code does not use it, because compilers
    can fuse the plain PyTorch operations. torch.jit traces and torch.func transforms do not use it either.
    """
    if x.device.type != "cpu" or type(mlp) is not Mlp or type(mlp.act) not in _ACTIVATIONS:
        return False
    kinds = (mlp, Mlp), (mlp.fc1, nn.Linear), (mlp.act, type(mlp.act)), (mlp.fc2, nn.Linear), (mlp.drop, Dropout)
    if not all(is_plain(module, kind) for module, kind in (*kinds, (drop_path, DropPath))):
        return False
    return x.shape[:-1].numel() * mlp.fc1.out_features >= MANY_CPU
