"""What a process of a part receives, and how it runs its jobs one after the other."""

from __future__ import annotations

import functools
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vix_kernels.measure import timing
from vix_kernels.measure.operators import Row, failed, free, skipped


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
    begin: Callable[[int, str], None] | None = None
    inject: str = ""

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def finish(self, command: Iterable[str], **how: Any) -> tuple[int | None, str]:
        """The exit status of a command, None where the deadline ends it, and all that it has printed."""
        with tempfile.TemporaryFile("w+", errors="replace") as log:
            try:
                seconds = max(0.0, self.deadline - time.monotonic())
                code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=seconds, **how).returncode
            except subprocess.TimeoutExpired:
                code = None
            log.seek(0)
            text = log.read()
        print(text)
        return code, text


class Job(NamedTuple):
    """One measurement of a part: what it measures, which its rows repeat, and how."""

    what: Row
    run: Callable[[], Iterable[Row]]


def by_job(jobs: Callable[[Plan], Iterable[Job]]) -> Callable[[Plan], Iterator[Row]]:
    """The rows of the jobs of a part. A job that fails or comes too late gets a row that says so.

    A part whose process ends loses only the job that ended it: the next process starts with the next job.
    """

    @functools.wraps(jobs)
    def rows(plan: Plan) -> Iterator[Row]:
        for number, (what, run) in enumerate(jobs(plan)):
            if number < plan.first:
                continue
            timing.use_graphs = not (plan.eager and number == plan.first)
            if plan.begin:
                plan.begin(number, " ".join(map(str, what.values())))
            if plan.late:
                yield skipped("out of time", **what)
                continue
            try:
                yield from (what | row for row in run())
            except Exception as error:
                yield failed(error, **what)
                if not plan.dry:
                    torch.cuda.synchronize()  # raises again what the device cannot recover from, such as an illegal access
            free(plan.device)

    return rows
