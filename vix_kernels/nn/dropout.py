"""Dropout with a faster implementation for CPUs."""

from __future__ import annotations

from torch import Tensor, nn

from ..primitives.dropout import dropout
from .plain import is_plain


class Dropout(nn.Dropout):
    """nn.Dropout with a faster implementation for CPUs.

    On a CPU, `p` is rounded to a multiple of 2^-16, and the mask uses one byte per element.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or self.inplace or not self.active or not is_plain(self, Dropout):
            return super().forward(x)
        return dropout(x, self.p)

    @property
    def active(self) -> bool:
        return self.training and self.p > 0
