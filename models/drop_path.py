"""Stochastic depth."""

from __future__ import annotations

from torch import Tensor, nn


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): drop a sample's branch with probability `rate`, and scale up the kept branches."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        factors = self.factors(x)
        return x if factors is None else x * factors

    def factors(self, x: Tensor) -> Tensor | None:
        """Return a tensor (batch, 1, ...) with the factor for each sample's branch, or None if all factors are 1."""
        if not self.training or self.rate == 0:
            return None
        keep = 1 - self.rate
        mask = x.new_empty(x.shape[0], *(1,) * (x.ndim - 1)).bernoulli_(keep)
        return mask / keep if keep else mask

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


def drop_path_rates(rate: float, depth: int) -> list[float]:
    """Return one rate per layer, increasing linearly from 0 to `rate`."""
    return [rate * layer / max(1, depth - 1) for layer in range(depth)]
