"""LeViT (arXiv:2104.01136) and its variants LeViN and LeViP from Vision Xformers.

    image -> convolutions -> stages * [depth * [x + attention(norm(x)), x + mlp(norm(x))]] -> norm -> mean -> head

Between two stages, a convolution halves the height and width of the token map. All three models have a convolutional stem,
batch normalization and hardswish. Instead of a position embedding, LeViT has a learned attention bias, and LeViN and LeViP have
rotary embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor, nn

from vix_kernels import Rope

from .arguments import check_flags, check_mlp_ratio, check_rates, pair, per_stage
from .backbone import grid_of
from .drop_path import drop_path_rates
from .layers import Block, TokenBatchNorm, conv_layers
from .mixers import Mixer, Place
from .stages import Pyramid, Stage, shrinking


class LeViT(Pyramid):
    """A LeViT (arXiv:2104.01136), a vision transformer whose token map shrinks from stage to stage.

    `forward` maps images (B, in_chans, *img_size) to logits (B, num_classes).

    Changes from the original Vision Xformers models, which have no normalization:

    - Batch norm and hardswish are used, as in the LeViT paper.
    - Softmax attention has the attention bias of the paper. `create_model` gives LeViN and LeViP rotary embeddings, because
      their mixers compute no logits to which a bias could be added.
    - Each stage after the first shrinks the token map, and can change the number of channels.
    - The token map can have any size.
    - `num_heads` takes effect. The original LeViN always uses 4 heads.

    Args:
        mixer: a function that creates the token mixer of a layer; see models/mixers.py.
        patch_size: total stride of the stem. The stem has one convolution with stride 2 for each factor of 2, and at least
            three convolutions in total.
        embed_dim, depth, num_heads: one integer per stage, or a single integer for all stages.
        stages: number of stages. Each stage after the first halves the height and width of the token map.
        mlp_ratio: ratio of the MLP's hidden width to the width of the tokens.
        position: position encoding of each stage, in addition to the attention bias: "learned" | "rope_1d" | "rope_axial" |
            "rope_mixed" | "none".
        drop_path_rate: stochastic depth rate of the last layer. The rates increase linearly from 0 in the first layer.

    For the other arguments, see VisionTransformer.
    """

    def __init__(
        self,
        mixer: Mixer,
        *,
        img_size: int | tuple[int, int] = 64,
        patch_size: int | tuple[int, int] = 2,
        in_chans: int = 3,
        num_classes: int = 200,
        stages: int = 1,
        embed_dim: int | tuple[int, ...] = 128,
        depth: int | tuple[int, ...] = 4,
        num_heads: int | tuple[int, ...] = 4,
        mlp_ratio: float = 2.0,
        qkv_bias: bool = False,
        position: str = "none",
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(img_size=img_size, in_chans=in_chans, drop_rate=drop_rate)
        check_flags(qkv_bias=qkv_bias)
        check_rates(proj_drop_rate=proj_drop_rate, drop_path_rate=drop_path_rate)
        if not isinstance(stages, int) or stages < 1:
            raise ValueError(f"stages: expected an integer >= 1, got {stages!r}")
        widths, depths, heads = per_stage(stages, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        for width in widths:
            check_mlp_ratio(mlp_ratio, width)
        self.embed_dim = widths[-1]
        self.patch_size = pair("patch_size", patch_size)
        first = grid_of(self.img_size, patch_size)
        grids = first, *shrinking(first, (2,) * (stages - 1))
        rates = drop_path_rates(drop_path_rate, sum(depths))

        self.stages = nn.ModuleList()
        for number, (grid, width, count, layer) in enumerate(
            zip(grids, widths, heads, accumulate(depths, initial=0), strict=False)
        ):
            options = dict(num_heads=count, qkv_bias=qkv_bias, proj_drop=proj_drop_rate, backend=backend)

            def block(place: Place, width: int = width, options: dict = options) -> nn.Module:
                return _Block(width, mixer, options, place, mlp_ratio, proj_drop_rate, rates[place.layer])

            embed = _stem(in_chans, width, self.patch_size) if number == 0 else _halving(widths[number - 1], width)
            self.stages.append(
                Stage(
                    embed, nn.Identity(), block, grid=grid, dim=width, num_heads=count, depth=depths[number],
                    first_layer=layer, position=position,
                )
            )  # fmt: skip
        self.norm = TokenBatchNorm(widths[-1])
        self.finish(widths[-1], num_classes, global_pool)


def _stem(in_chans: int, embed_dim: int, patch_size: tuple[int, int]) -> nn.Module:
    """Return a convolutional stem.

    As in the LeViT paper, strides of 2 come first, and each convolution after the first doubles the width.
    """
    strides = [_strides(size) for size in patch_size]
    length = max(map(len, strides))
    strides = [row + [1] * (length - len(row)) for row in strides]
    widths = [in_chans, *(-(-embed_dim // 2**back) for back in range(length - 1, -1, -1))]
    return nn.Sequential(*conv_layers(widths, zip(*strides, strict=True), nn.Hardswish))


def _strides(size: int) -> list[int]:
    """Factor `size` into at least three strides, starting with factors of 2: 2 = 2*1*1, 6 = 2*3*1, 16 = 2*2*2*2."""
    twos = (size & -size).bit_length() - 1
    row = [2] * twos + [size >> twos] * (size >> twos > 1)
    return row + [1] * (3 - len(row))


def _halving(before: int, after: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after))


class _Block(Block):
    """A block with batch norm, hardswish and, if the mixer has attention weights, a learned attention bias."""

    def __init__(
        self, dim: int, mixer: Mixer, options: dict, place: Place, mlp_ratio: float, drop: float, drop_path: float
    ) -> None:
        attention = mixer(dim, place, **options)
        if getattr(attention, "has_weights", False):
            attention = _BiasedAttention(attention, place.grid)
        super().__init__(
            dim, attention, mlp_ratio, drop=drop, drop_path=drop_path, norm=TokenBatchNorm, activation=nn.Hardswish
        )


class _BiasedAttention(nn.Module):
    """softmax(scale q k^T + b) v. The bias b is learned for each head and each distance (rows, columns) from query to key."""

    def __init__(self, attention: nn.Module, grid: tuple[int, int]) -> None:
        super().__init__()
        self.attention, self.grid = attention, grid
        self.attention_bias = nn.Parameter(torch.zeros(attention.num_heads, math.prod(grid)))
        self.register_buffer("distance", self._distance(None), persistent=False)

    def _distance(self, device: torch.device | None) -> Tensor:
        """Return a (tokens, tokens) tensor with the bias index of each pair of tokens."""
        rows, columns = torch.meshgrid(*(torch.arange(side, device=device) for side in self.grid), indexing="ij")
        rows, columns = ((x.flatten()[:, None] - x.flatten()).abs() for x in (rows, columns))
        return rows * self.grid[1] + columns

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _BiasedAttention:
        super()._apply(fn, recurse)
        self.distance = self._distance(self.distance.device)  # to_empty() allocates this buffer without values
        return self

    def forward(self, x: Tensor, rope: Rope | None = None) -> Tensor:
        bias = self.attention_bias[:, self.distance].to(x.dtype)
        return self.attention(x, attn_mask=bias, rope=rope)
