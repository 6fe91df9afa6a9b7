"""CvN and CvP: three stages, each with a convolution, a norm and residual layers that process feature maps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .blocks import FeedForward, Mixer, PreNorm, Residuals, pointwise


class ChannelNorm(nn.Module):
    """Layer norm over the channels of a feature map. eps is added to the standard deviation instead of the variance.

    If all channels at a position are equal, the gradient there is NaN.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.g, self.b = nn.Parameter(torch.empty(1, dim, 1, 1)), nn.Parameter(torch.empty(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        deviation = x.var(1, unbiased=False, keepdim=True).sqrt()
        return (x - x.mean(1, keepdim=True)) / (deviation + 1e-5) * self.g + self.b


class CvT(nn.Module):
    """The original CvN or CvP, depending on `attention`. Maps images (batch, 3, height, width) to logits (batch, num_classes).

    `attention` is one of the functions in levit.py. Unlike the model in the CvT paper, CvN and CvP have no convolutions for
    queries, keys and values. The published classes accept `s*_proj_kernel` and `s*_kv_proj_stride`, but do not use them, so
    `from_original` drops them. `dropout` is applied in the feed-forward networks.
    """

    def __init__(
        self,
        attention: Callable[[int, int, str], Mixer],
        *,
        num_classes: int,
        s1_emb_dim: int = 64,
        s1_emb_kernel: int = 7,
        s1_emb_stride: int = 4,
        s1_heads: int = 1,
        s1_depth: int = 1,
        s1_mlp_mult: int = 4,
        s2_emb_dim: int = 192,
        s2_emb_kernel: int = 3,
        s2_emb_stride: int = 2,
        s2_heads: int = 3,
        s2_depth: int = 2,
        s2_mlp_mult: int = 4,
        s3_emb_dim: int = 384,
        s3_emb_kernel: int = 3,
        s3_emb_stride: int = 2,
        s3_heads: int = 6,
        s3_depth: int = 10,
        s3_mlp_mult: int = 4,
        dropout: float = 0.0,
        backend: str,
    ) -> None:
        super().__init__()
        stages, channels = [], 3
        for dim, kernel, stride, heads, depth, mlp_mult in (
            (s1_emb_dim, s1_emb_kernel, s1_emb_stride, s1_heads, s1_depth, s1_mlp_mult),
            (s2_emb_dim, s2_emb_kernel, s2_emb_stride, s2_heads, s2_depth, s2_mlp_mult),
            (s3_emb_dim, s3_emb_kernel, s3_emb_stride, s3_heads, s3_depth, s3_mlp_mult),
        ):
            pairs = [
                (
                    PreNorm(ChannelNorm(dim), attention(dim, heads, backend)),
                    PreNorm(ChannelNorm(dim), FeedForward(pointwise, dim, dim * mlp_mult, dropout)),
                )
                for _ in range(depth)
            ]
            embedding = nn.Conv2d(channels, dim, kernel, stride, padding=kernel // 2)
            stages.append(nn.Sequential(embedding, ChannelNorm(dim), Residuals(pairs)))
            channels = dim
        self.layers = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)
