"""LeViN and LeViP: LeViT without normalization layers, with Nystrom (LeViN) or Performer (LeViP) attention on feature maps."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .blocks import FeedForward, Mixer, Residuals, pointwise
from .mixers import NystromAttention, PerformerAttention


def nystrom(dim: int, heads: int, backend: str) -> Mixer:
    """Create an attention layer of LeViN or CvN. `heads` is ignored; there are always 4 heads of width 32."""
    return NystromAttention(dim, heads=4, dim_head=32, backend=backend)


def performer(dim: int, heads: int, backend: str) -> Mixer:
    """Create an attention layer of LeViP or CvP. The head width is always 32."""
    return PerformerAttention(dim, heads=heads, dim_head=32)


class LeViT(nn.Module):
    """The original LeViN or LeViP, depending on `attention`. Maps images (batch, 3, height, width) to logits.

    If num_distill_classes is set, the model returns (logits, logits of the distillation head). The original models accept
    `dim_key`, `dim_value` and `image_size`, but do not use them, so `from_original` drops them. Only one stage is supported, as
    in the published models. In the original code, additional stages neither downsample the feature map nor change its number
    of channels. `dropout` is applied in the feed-forward networks.
    """

    def __init__(
        self,
        attention: Callable[[int, int, str], Mixer],
        *,
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_mult: int,
        stages: int = 3,
        dropout: float = 0.0,
        num_distill_classes: int | None = None,
        backend: str,
    ) -> None:
        super().__init__()
        if stages != 1:
            raise ValueError(f"stages: expected 1, as published, got {stages}")
        self.conv_embedding = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, dim, 3, padding=1)
        )
        pairs = (
            (attention(dim, heads, backend), FeedForward(pointwise, dim, dim * mlp_mult, dropout)) for _ in range(depth)
        )  # fmt: skip
        self.backbone = nn.Sequential(Residuals(pairs))
        self.distill_head = None if num_distill_classes is None else nn.Linear(dim, num_distill_classes)
        self.mlp_head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.backbone(self.conv_embedding(x)).mean((2, 3))
        return self.mlp_head(x) if self.distill_head is None else (self.mlp_head(x), self.distill_head(x))
