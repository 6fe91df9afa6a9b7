"""Modules that the original models share: residual layers, the feed-forward network, and the base class of token mixers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor, nn

pointwise = partial(nn.Conv2d, kernel_size=1)


class Mixer(nn.Module):
    """Base class of token mixers. `mix` maps tokens (batch, tokens, dim) to tokens of the same shape.

    `forward` also accepts feature maps (batch, dim, height, width), which it flattens row by row. The original models always
    reshape the tokens to 32 x 32 and fail for other sizes, whereas this class supports any size.
    """

    def mix(self, x: Tensor, table: Tensor | None) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        if x.dim() == 3:
            return self.mix(x, table)
        return self.mix(x.flatten(2).mT, table).mT.reshape(x.shape)


class PreNorm(nn.Module):
    def __init__(self, norm: nn.Module, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = norm, fn

    def forward(self, x: Tensor, *args: Tensor | None) -> Tensor:
        return self.fn(self.norm(x), *args)


class FeedForward(nn.Module):
    """A feed-forward network. `linear` is nn.Linear for tokens or `pointwise` for feature maps.

    Dropout is applied after the activation and after the second linear layer.
    """

    def __init__(self, linear: Callable[[int, int], nn.Module], dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), linear(hidden, dim), nn.Dropout(dropout)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Residuals(nn.Module):
    """Residual layers: x + mixer(x), then x + feed_forward(x), for every pair (mixer, feed_forward)."""

    def __init__(self, pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)

    def forward(self, x: Tensor, *args: Tensor | None) -> Tensor:
        for mixer, feed_forward in self.layers:
            x = mixer(x, *args) + x
            x = feed_forward(x) + x
        return x
