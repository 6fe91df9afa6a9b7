"""What a part is told."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from vix_kernels.bench.measure import free


@dataclass(frozen=True)
class Plan:
    """dry: tiny sizes in Triton's interpreter. deadline: by time.monotonic(); what comes later is skipped, and says so."""

    dry: bool
    deadline: float

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def wait(self) -> None:
        """For the device; raises again what it cannot recover from, such as an illegal access."""
        if not self.dry:
            torch.cuda.synchronize()

    def free(self) -> None:
        """What the last measurement held."""
        free(self.device)
