"""What the originals share: residual layers, their feed-forward network, and token mixers that serve maps too."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor, nn

pointwise = partial(nn.Conv2d, kernel_size=1)


class Mixer(nn.Module):
    """A token mixer: `mix` takes and returns tokens (batch, tokens, dim).

    A map (batch, dim, height, width) is read row by row. The originals' reshape back from tokens is fixed to 32 x 32 and fails
    on any other map; this one is not.
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
    """`linear` is nn.Linear for tokens or `pointwise` for maps; dropout follows the activation and the second of them."""

    def __init__(self, linear: Callable[[int, int], nn.Module], dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            linear(dim, hidden), nn.GELU(), nn.Dropout(dropout), linear(hidden, dim), nn.Dropout(dropout)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Residuals(nn.Module):
    """x + mixer(x), then x + feed_forward(x), for every pair of them."""

    def __init__(self, pairs: Iterable[tuple[nn.Module, nn.Module]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList(pair) for pair in pairs)

    def forward(self, x: Tensor, *args: Tensor | None) -> Tensor:
        for mixer, feed_forward in self.layers:
            x = mixer(x, *args) + x
            x = feed_forward(x) + x
        return x
