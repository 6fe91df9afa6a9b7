"""Features of tokens in linear attention: a feature map, applied to the rotated and projected tokens.

The backward pass recomputes the features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Rotary
from .tiles import Group, Rotation, Scratch, Tile, expand_slots, flat, wide, window


class Features:
    """Computes the features of tokens, and backpropagates through the features.

    Each forward or backward pass creates an instance.
    """

    def __init__(self, slots: Tensor | None, x: Tensor, rotary: Rotary | None, feature_map: str) -> None:
        self.like = x.new_empty(0, dtype=wide(x[:0]).dtype)
        self.slots = None if slots is None else expand_slots(slots, x)
        self.num_slots = x.shape[3] if slots is None else slots.shape[2]
        self.rope = Rotation(rotary, self.like.dtype)
        self.elu = feature_map == "elu"
        self.square, self.other, self.third, self.room = (Scratch(self.like) for _ in range(4))

    def empty(self, *shape: int) -> Tensor:
        return self.like.new_empty(shape)

    def slot_sums(self, x: Tensor) -> Tensor:
        """Return a zero tensor (B, H, D, M) for the transposed gradient of the slots."""
        return self.empty(*x.shape[:2], x.shape[3], self.num_slots).zero_()

    def logits(self, x: Tensor, group: Group) -> Tensor:
        if self.slots is None:
            return x
        return torch.bmm(x, flat(self.slots, group).mT, out=self.square(*x.shape[:2], self.num_slots))

    def __call__(self, logits: Tensor) -> Tensor:
        """Return phi(logits). The result is in the buffer `third`."""
        if self.elu:
            return self._exp(logits).add_(logits.clamp(min=0))
        return torch.clamp(logits, min=0, out=self.third(*logits.shape))

    def times_slope(self, dlogits: Tensor, logits: Tensor) -> Tensor:
        """Multiply dlogits by phi'(logits), in place."""
        return dlogits.mul_(self._exp(logits) if self.elu else logits > 0)

    def _exp(self, logits: Tensor) -> Tensor:
        """Return exp(min(logits, 0)), the derivative of elu(x) + 1 at the logits."""
        torch.clamp(logits, max=0, out=self.third(*logits.shape))
        return self.third.apply(torch.exp)

    def to_tokens(self, dlogits: Tensor, dx: Tensor, tile: Tile) -> Tensor:
        """Return the gradient of the tokens of a tile. The result may be a view of dx."""
        if self.slots is None:
            return dlogits
        return torch.bmm(dlogits, flat(self.slots, tile[:2]), out=window(dx, tile, self.room))
