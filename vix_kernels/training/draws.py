"""Random numbers of a run, derived from its seed and the place in it. An exact resume needs no saved generator state."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Prefixes of a place: different uses of a place see different numbers.
ORDER, IMAGES, TORCH = 1, 2, 4


class Draws:
    """Random numbers for the images of one batch. They do not depend on the device or on the number of processes.

    Each process draws on the CPU for the whole batch, and keeps the numbers of its images.

    Args:
        place: integers that identify the batch, such as seed, epoch and step.
        images: the number of images in the whole batch.
        rows: the positions of this process's images in the batch. None for all.
    """

    def __init__(self, *place: int, images: int, rows: Tensor | None = None) -> None:
        self.batch = np.random.default_rng((IMAGES, *place))  # for one draw for all images
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return self.images if self.rows is None else len(self.rows)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Draw a float32 in [low, high) for each image."""
        return self._cut(self.batch.uniform(low, high, self.images).astype(np.float32))

    def integers(self, low: int, high: int) -> Tensor:
        """Draw an int64 from low to high - 1 for each image."""
        return self._cut(self.batch.integers(low, high, self.images))

    def chance(self, probability: float) -> Tensor:
        """Draw a bool for each image, True with the given probability."""
        return self.uniform() < probability

    def _cut(self, drawn: np.ndarray) -> Tensor:
        values = torch.from_numpy(drawn)
        return values if self.rows is None else values[self.rows]


def sent(drawn: Tensor, device: torch.device) -> Tensor:
    """Copy `drawn` to `device` without waiting for the GPU's queued work."""
    if device.type == "cuda" and drawn.device.type == "cpu":
        drawn = drawn.pin_memory()
    return drawn.to(device, non_blocking=True)


def shuffled(*place: int, images: int) -> Tensor:
    """Return the indices of all images in random order."""
    return torch.from_numpy(np.random.default_rng((ORDER, *place)).permutation(images))


def seed_torch(*place: int) -> None:
    """Seed torch's generators, which dropout and stochastic depth use, on all devices."""
    torch.manual_seed(int(np.random.SeedSequence((TORCH, *place)).generate_state(1, np.uint64)[0]) >> 1)
