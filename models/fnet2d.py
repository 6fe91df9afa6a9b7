"""FNet in two dimensions, from Vision Xformers.

    image -> convolutions -> depth * [x + mlp(norm(F(x)))] -> norm -> mean -> head

F is the real part of the discrete Fourier transform over rows, columns and channels.
"""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor, nn

from .arguments import check_choice, check_counts, check_mlp_ratio, check_rates, pair
from .backbone import Backbone, grid_of
from .drop_path import DropPath, drop_path_rates
from .feed_forward import Mlp
from .layers import ConvStem, TokenBatchNorm, run_blocks


class FNet2D(Backbone):
    """An FNet (arXiv:2105.03824) that applies a Fourier transform over the rows, columns and channels of the token map.

    `forward` maps images (B, in_chans, *img_size) to logits (B, num_classes).

    Changes from the original Vision Xformers models:

    - The transform is scaled to preserve the magnitude of the tokens. Without scaling, the tokens would become hundreds of
      times larger.
    - The stem has normalization and activations between its convolutions.
    - Tokens are normalized before pooling.

    Args:
        backend: "auto" | "torch" | "reference". All backends use torch.fft, because there is no kernel for this transform.

    For the other arguments, see VisionTransformer. The model has no attention and no class token. It does not need a position
    embedding, because the transform depends on the positions.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 32,
        patch_size: int | tuple[int, int] = 1,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 128,
        depth: int = 5,
        mlp_ratio: float = 2.0,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        backend: str = "auto",
    ) -> None:
        # "triton" raises an error, because the model would not run any kernel.
        check_choice(("auto", "torch", "reference"), backend=backend)
        super().__init__(img_size=img_size, in_chans=in_chans, drop_rate=drop_rate)
        check_counts(embed_dim=embed_dim, depth=depth)
        check_rates(proj_drop_rate=proj_drop_rate, drop_path_rate=drop_path_rate)
        check_mlp_ratio(mlp_ratio, embed_dim)
        self.embed_dim = embed_dim
        self.patch_size = pair("patch_size", patch_size)
        self.grid = grid_of(self.img_size, patch_size)
        self.patch_embed = ConvStem(in_chans, embed_dim, self.patch_size, self.grid)
        self.blocks = nn.ModuleList(
            FourierBlock(embed_dim, self.grid, mlp_ratio, proj_drop_rate, rate)
            for rate in drop_path_rates(drop_path_rate, depth)
        )
        self.norm = TokenBatchNorm(embed_dim)
        self.finish(embed_dim, num_classes, global_pool)

    def token_maps(self) -> dict[str, tuple[tuple[int, int], int]]:
        return {"": (self.grid, 0)}

    def forward_trunk(self, x: Tensor, levels: int | None = None, outputs: list[Tensor] | None = None) -> Tensor:
        return run_blocks(islice(self.blocks, levels), self.patch_embed(x), None, self.grad_checkpointing, outputs)


class FourierBlock(nn.Module):
    """x + mlp(norm(F(x))), where F applies `real_transform` to the token map."""

    def __init__(self, dim: int, grid: tuple[int, int], mlp_ratio: float, drop: float, drop_path: float) -> None:
        super().__init__()
        self.grid = grid
        self.norm = TokenBatchNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rope: None) -> Tensor:
        transform = real_transform if torch.jit.is_tracing() else _RealTransform.apply
        mixed = transform(x.unflatten(1, self.grid)).flatten(1, 2)
        return x + self.drop_path(self.mlp(self.norm(mixed)))


class _RealTransform(torch.autograd.Function):
    """Apply `real_transform`, a linear map with a symmetric matrix. The backward pass applies the same map to the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return real_transform(x)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        return _RealTransform.apply(dy)


def real_transform(x: Tensor) -> Tensor:
    """Return the real part of the Fourier transform of maps (B, H, W, C) over (H, W, C), scaled by 1 / sqrt(H W C).

    The FFT for real inputs computes only about half of the output channels. The other channels follow from
    y[-h, -w, -c] = y[h, w, c].
    """
    width = x.shape[-1]
    half = torch.fft.rfftn(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, dim=(1, 2, 3), norm="ortho").real
    rest = half[..., 1 : width - width // 2].flip(1, 2, 3).roll((1, 1), (1, 2))
    return torch.cat([half, rest], -1).to(x.dtype)
