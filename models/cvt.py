"""The convolutional vision transformer (CvT, arXiv:2103.15808), and its variants CvN and CvP from Vision Xformers.

image -> stages * [convolution -> norm -> depth * [x + attention(convolution(norm(x))), x + mlp(norm(x))]]
      -> norm -> mean -> head
"""

from __future__ import annotations

from itertools import accumulate

from torch import Tensor, nn

from vix_kernels import Rope

from .arguments import check_flags, check_mlp_ratio, check_rates, per_stage
from .drop_path import drop_path_rates
from .layers import Block, to_maps, to_tokens
from .mixers import Mixer, Place
from .stages import Pyramid, Stage, shrinking


class CvT(Pyramid):
    """A convolutional vision transformer (CvT, arXiv:2103.15808), whose token map can shrink from stage to stage.

    `forward` maps images (B, in_chans, *img_size) to logits (B, num_classes).

    Changes from the original Vision Xformers models:

    - The model has the convolutional projection of the CvT paper, which the original models omit.
    - Layer norms add eps inside the square root, so the gradient is finite if all channels are equal.
    - The token map can have any size.
    - `num_heads` takes effect. The original CvN always uses 4 heads.

    q, k and v share one 3 x 3 depthwise convolution, whereas the paper has a separate convolution for each of them. The shared
    convolution works with every mixer, including mixers without queries. As in the paper, it provides position information, so
    no position embedding is needed.

    Args:
        mixer: a function that creates the token mixer of a layer; see models/mixers.py.
        embed_kernel, embed_stride: kernel sizes (odd) and strides of the convolutions that create the tokens of the stages.
        embed_dim, depth, num_heads: one integer per stage, or a single integer for all stages.
        position: position encoding in each stage: "learned" | "rope_1d" | "rope_axial" | "rope_mixed" | "none".
        drop_path_rate: stochastic depth rate of the last layer. The rates increase linearly from 0 in the first layer.

    For the other arguments, see VisionTransformer.
    """

    def __init__(
        self,
        mixer: Mixer,
        *,
        img_size: int | tuple[int, int] = 64,
        in_chans: int = 3,
        num_classes: int = 200,
        embed_kernel: tuple[int, ...] = (3, 3, 3),
        embed_stride: tuple[int, ...] = (2, 1, 1),
        embed_dim: int | tuple[int, ...] = 128,
        depth: int | tuple[int, ...] = (1, 1, 2),
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
        if not isinstance(embed_stride, tuple | list) or not embed_stride:
            raise ValueError(f"embed_stride: expected one integer per stage, got {embed_stride!r}")
        kernels, strides, widths, depths, heads = per_stage(
            len(embed_stride), embed_kernel=embed_kernel, embed_stride=embed_stride, embed_dim=embed_dim, depth=depth,
            num_heads=num_heads,
        )  # fmt: skip
        if not all(kernel % 2 for kernel in kernels):
            raise ValueError(f"embed_kernel: expected odd numbers, got {embed_kernel!r}")
        for width in widths:
            check_mlp_ratio(mlp_ratio, width)
        self.embed_dim = widths[-1]
        rates = drop_path_rates(drop_path_rate, sum(depths))

        self.stages = nn.ModuleList()
        rows = zip(
            (in_chans, *widths), widths, kernels, strides, shrinking(self.img_size, strides), heads, depths,
            accumulate(depths, initial=0), strict=False,
        )  # fmt: skip
        for before, width, kernel, stride, grid, count, layers, first_layer in rows:
            options = dict(num_heads=count, qkv_bias=qkv_bias, proj_drop=proj_drop_rate, backend=backend)

            def block(place: Place, width: int = width, options: dict = options) -> nn.Module:
                attention = ConvProjection(mixer(width, place, **options), width, place.grid)
                return Block(width, attention, mlp_ratio, drop=proj_drop_rate, drop_path=rates[place.layer])

            embed = nn.Conv2d(before, width, kernel, stride, padding=kernel // 2)
            self.stages.append(
                Stage(
                    embed, nn.LayerNorm(width), block, grid=grid, dim=width, num_heads=count, depth=layers,
                    first_layer=first_layer, position=position,
                )
            )  # fmt: skip
        self.norm = nn.LayerNorm(widths[-1])
        self.finish(widths[-1], num_classes, global_pool)


class ConvProjection(nn.Module):
    """A depthwise convolution of the token map, followed by batch normalization and a mixer."""

    def __init__(self, attention: nn.Module, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.norm = nn.BatchNorm2d(dim)
        self.attention = attention

    def forward(self, x: Tensor, rope: Rope | None = None) -> Tensor:
        return self.attention(to_tokens(self.norm(self.conv(to_maps(x, self.grid)))), rope=rope)
