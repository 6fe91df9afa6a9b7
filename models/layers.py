"""Building blocks of the models: stems and transformer blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vix_kernels import Rope

from .drop_path import DropPath
from .feed_forward import Mlp, feed_forward


class PatchStem(nn.Module):
    """A strided convolution that creates one token per patch: (B, in_chans, H, W) -> (B, tokens, embed_dim).

    As in timm, `patch_size` is the (height, width) of a patch, and `grid_size` is the (height, width) of the patch grid.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: tuple[int, int], grid_size: tuple[int, int]) -> None:
        super().__init__()
        self.patch_size, self.grid_size = patch_size, grid_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return to_tokens(self.proj(x))


class ConvStem(nn.Sequential):
    """Three convolutions whose total stride is the patch size: (B, in_chans, H, W) -> (B, tokens, embed_dim).

    The attributes `patch_size` and `grid_size` have the same meaning as in PatchStem.
    """

    def __init__(self, in_chans: int, embed_dim: int, patch_size: tuple[int, int], grid_size: tuple[int, int]) -> None:
        widths = in_chans, -(-embed_dim // 4), -(-embed_dim // 2), embed_dim
        # The reversed order puts factors of 2 last, so for patches of 2 or 4 pixels the first stride is 1 (full resolution).
        strides = zip(*(reversed(_three_strides(size)) for size in patch_size), strict=True)
        super().__init__(*conv_layers(widths, strides, nn.GELU))
        self.patch_size, self.grid_size = patch_size, grid_size

    def forward(self, x: Tensor) -> Tensor:
        return to_tokens(super().forward(x))


def conv_layers(widths: Iterable[int], strides: Iterable[tuple[int, int]], activation: type[nn.Module]) -> list[nn.Module]:
    """Return convolutions, each followed by batch normalization and, except for the last one, an activation."""
    widths = tuple(widths)
    layers: list[nn.Module] = []
    for before, after, stride in zip(widths, widths[1:], strides, strict=False):
        # A kernel of size stride + 2 extends one pixel beyond the stride on each side.
        kernel = stride[0] + 2, stride[1] + 2
        layers += [nn.Conv2d(before, after, kernel, stride, padding=1, bias=False), nn.BatchNorm2d(after), activation()]
    return layers[:-1]


def _three_strides(size: int) -> tuple[int, int, int]:
    """Factor `size` into three strides, starting with factors of 2: 2 = 2*1*1, 8 = 2*2*2, 12 = 2*2*3, 16 = 2*2*4."""
    first = 2 if size % 2 == 0 else 1
    second = 2 if size % 4 == 0 else 1
    return first, second, size // (first * second)


def to_tokens(maps: Tensor) -> Tensor:
    """Reshape maps (B, C, H, W) to tokens (B, H * W, C)."""
    return maps.flatten(2).transpose(1, 2)


def to_maps(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Reshape tokens (B, H * W, C) to maps (B, C, H, W)."""
    return tokens.transpose(1, 2).unflatten(2, grid)


class TokenBatchNorm(nn.BatchNorm1d):
    """Batch normalization of each channel of (B, tokens, C) over all samples and tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).view_as(x)


class Block(nn.Module):
    """A transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        attention: the token mixer, called as `attention(x, rope=rope)`.
        mlp_ratio: ratio of the MLP's hidden width to `dim`.
        drop: dropout rate in the MLP.
        drop_path: stochastic depth rate.
        norm, activation: module classes or factories, called as norm(dim) and activation().
        renormalise: whether the second residual connection starts from the normalized tokens: n + mlp(n) with n = norm(x).
    """

    def __init__(
        self,
        dim: int,
        attention: nn.Module,
        mlp_ratio: float,
        *,
        drop: float = 0.0,
        drop_path: float = 0.0,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        activation: type[nn.Module] = nn.GELU,
        renormalise: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = norm(dim)
        self.attn = attention
        self.drop_path = DropPath(drop_path)
        self.norm2 = norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop, activation)
        self.renormalise = renormalise

    def forward(self, x: Tensor, rope: Rope | None) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), rope=rope))
        return feed_forward(x, self.norm2, self.mlp, self.drop_path, self.renormalise)


def run_blocks(
    blocks: Iterable[nn.Module], x: Tensor, rope: nn.Module | None, checkpointing: bool, outputs: list[Tensor] | None = None
) -> Tensor:
    """Apply all blocks to `x`, and return the result. Each block receives the rotary table of its layer.

    With `checkpointing`, the backward pass recomputes the blocks. If `outputs` is a list, the output of each block is appended
    to it.
    """
    for layer, block in enumerate(blocks):
        table = rope(layer) if rope is not None else None
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, table, use_reentrant=False)
        else:
            x = block(x, table)
        if outputs is not None:
            outputs.append(x)
    return x


def init_linear(linear: nn.Linear) -> None:
    nn.init.trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
