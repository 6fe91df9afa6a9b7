"""What a part is told, and how it goes on after a job that ended its process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from vix_kernels.measure import timing
from vix_kernels.measure.operators import free

Job = TypeVar("Job")


@dataclass(frozen=True)
class Plan:
    """What one process of a part does.

    dry: tiny sizes in Triton's interpreter. deadline: by time.monotonic(); what comes later is skipped, and says so.
    first: the job to start with; an earlier process did those before it. eager: no CUDA graph for that job.
    begin: called with the number and the name of each job before it runs. inject: the failure that the probe meets.
    """

    dry: bool
    deadline: float
    first: int = 0
    eager: bool = False
    begin: Callable[[int, str], None] = lambda number, name: None
    inject: str = ""

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def jobs(self, order: Iterable[Job], name: Callable[[Job], str]) -> Iterator[Job]:
        """The jobs that this process has to do. Parts with several jobs lose only the one that ends their process."""
        for number, job in enumerate(order):
            if number >= self.first:
                timing.use_graphs = not (self.eager and number == self.first)
                self.begin(number, name(job))
                yield job

    def wait(self) -> None:
        """For the device; raises again what it cannot recover from, such as an illegal access."""
        if not self.dry:
            torch.cuda.synchronize()

    def free(self) -> None:
        """What the last measurement held."""
        free(self.device)
