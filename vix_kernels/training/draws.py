"""All that is random in training follows from the seed of the run and a place in it: nothing is saved, to go on exactly."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# In front of a place, so that no two uses of one place see the same numbers.
ORDER, IMAGES, TORCH = 1, 2, 4


class Draws:
    """Random numbers for the images of one batch: the same on every device, and however many processes share the batch.

    They are drawn on the CPU, for the whole batch, and cut to the images at `rows`.

    Args:
        place: whole numbers that say which batch of which run this is.
        images: in the whole batch.
        rows: the places in it of this process's images; None for all.
    """

    def __init__(self, *place: int, images: int, rows: Tensor | None = None) -> None:
        self.batch = np.random.default_rng((IMAGES, *place))  # for what is drawn once for all images
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return self.images if self.rows is None else len(self.rows)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """One float32 an image, in [low, high)."""
        return self._cut(self.batch.uniform(low, high, self.images).astype(np.float32))

    def integers(self, low: int, high: int) -> Tensor:
        """One int64 an image, from low to high - 1."""
        return self._cut(self.batch.integers(low, high, self.images))

    def chance(self, probability: float) -> Tensor:
        """One bool an image."""
        return self.uniform() < probability

    def _cut(self, drawn: np.ndarray) -> Tensor:
        values = torch.from_numpy(drawn)
        return values if self.rows is None else values[self.rows]


def sent(drawn: Tensor, device: torch.device) -> Tensor:
    """To where it is needed, without waiting for what a GPU has still to do."""
    if device.type == "cuda" and drawn.device.type == "cpu":
        drawn = drawn.pin_memory()
    return drawn.to(device, non_blocking=True)


def shuffled(*place: int, images: int) -> Tensor:
    """The numbers of all images, in random order."""
    return torch.from_numpy(np.random.default_rng((ORDER, *place)).permutation(images))


def seed_torch(*place: int) -> None:
    """For what torch draws itself, on any device: dropout and stochastic depth."""
    torch.manual_seed(int(np.random.SeedSequence((TORCH, *place)).generate_state(1, np.uint64)[0]) >> 1)
