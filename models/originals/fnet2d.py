"""FNet2D: Fourier transforms of feature maps over channels, rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .blocks import FeedForward, pointwise


class FourierBlock(nn.Module):
    """x + feed_forward(batch_norm(Re(F(x)))), with the Fourier transform F over three axes.

    Every backend computes the transform in plain PyTorch, because fourier_mixing supports only two axes.
    """

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.ff = nn.Sequential(nn.BatchNorm2d(dim), FeedForward(pointwise, dim, hidden, dropout))

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(torch.fft.fft(torch.fft.fft2(x), dim=1).real) + x


class FNet2D(nn.Module):
    """The FNet2D of the vision_xformer package. Maps images (batch, 3, height, width) to logits.

    Two convolutions without an activation between them create a feature map. All blocks process this map instead of a sequence
    of tokens. The transform is not normalized. `dropout` is applied in the feed-forward networks.
    """

    def __init__(self, *, num_classes: int, dim: int, depth: int, mlp_dim: int, dropout: float = 0.0, backend: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FourierBlock(dim, mlp_dim, dropout) for _ in range(depth))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(dim, num_classes))
        self.conv = nn.Sequential(nn.Conv2d(3, dim // 2, 3, padding=1), nn.Conv2d(dim // 2, dim, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for layer in self.layers:
            x = layer(x)
        return self.pool(x)


class EarlierFNet2D(FNet2D):
    """The FNet2D of the VisionXformer repository, with mlp_dim = final_dim * mlp_mult. `image_size` has no effect."""

    def __init__(
        self, *, num_classes: int, depth: int, image_size: int, final_dim: int, dropout: float, mlp_mult: int, backend: str
    ) -> None:
        mlp_dim = final_dim * mlp_mult
        super().__init__(num_classes=num_classes, dim=final_dim, depth=depth, mlp_dim=mlp_dim, dropout=dropout, backend=backend)
