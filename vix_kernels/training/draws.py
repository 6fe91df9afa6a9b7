"""Random numbers for a run.

They are derived from the seed and the current position in the run, such as the epoch and the step. Therefore, a run can be
resumed exactly without a saved generator state.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Each generator is seeded with one of these prefixes and `place`, so that generators with the same `place` differ.
ORDER, IMAGES, TORCH = 1, 2, 4


class Draws:
    """Random numbers for the images of one batch. They do not depend on the device or on the number of processes.

    Each process draws the numbers for the whole batch on the CPU, and keeps the numbers for its images.

    Args:
        place: integers that identify the batch, such as the seed, the epoch and the step.
        images: the number of images in the whole batch.
        rows: the positions of this process's images in the batch, or None if this process has all images.
    """

    def __init__(self, *place: int, images: int, rows: Tensor | None = None) -> None:
        self.batch = np.random.default_rng((IMAGES, *place))  # also used directly, for numbers that all images share
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return self.images if self.rows is None else len(self.rows)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Draw a float32 number in [`low`, `high`) for each image."""
        below = np.nextafter(np.float32(high), np.float32(low))  # rounding to float32 can give `high`
        return self._cut(np.minimum(self.batch.uniform(low, high, self.images).astype(np.float32), below))

    def integers(self, low: int, high: int) -> Tensor:
        """Draw an int64 integer from `low` to `high` - 1 for each image."""
        return self._cut(self.batch.integers(low, high, self.images))

    def chance(self, probability: float) -> Tensor:
        """Draw a bool for each image, True with the given probability."""
        return self.uniform() < probability

    def _cut(self, drawn: np.ndarray) -> Tensor:
        values = torch.from_numpy(drawn)
        return values if self.rows is None else values[self.rows]


def sent(drawn: Tensor, device: torch.device) -> Tensor:
    """Return `drawn` on `device`. The copy does not wait for queued work on the GPU."""
    if device.type == "cuda" and drawn.device.type == "cpu":
        drawn = drawn.pin_memory()
    return drawn.to(device, non_blocking=True)


def shuffled(*place: int, images: int) -> Tensor:
    """Return the indices of all images, int64 (images,), in a random order that depends only on `place` and `images`."""
    return torch.from_numpy(np.random.default_rng((ORDER, *place)).permutation(images))


def seed_torch(*place: int) -> None:
    """Seed torch's generators on all devices, for dropout and stochastic depth. The seed depends only on `place`."""
    torch.manual_seed(int(np.random.SeedSequence((TORCH, *place)).generate_state(1, np.uint64)[0]) >> 1)
