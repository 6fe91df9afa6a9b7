"""A part of a run: what its process receives, how it runs its jobs one after the other, and what it sends."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch

from vix_kernels.measure import timing
from vix_kernels.measure.interpreter import hastened
from vix_kernels.measure.operators import Row, failed, free, skipped
from vix_kernels.measure.timing import Spoiled

SPOILED = 75  # exit status: this process can measure no more, a new one can
AT = 1  # the job that an injected failure meets: the second, so that there is something to lose


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


# The process


def inject(failure: str) -> None:
    """What a GPU run can meet, for the dry run."""
    print(f"injected: {failure}", file=sys.stderr, flush=True)
    if failure == "crash":  # as in a driver
        os.abort()
    elif failure == "kill":  # as for lack of memory
        os.kill(os.getpid(), signal.SIGKILL)
    elif failure == "capture":
        raise Spoiled("injected: the capture failed")
    elif failure == "hang":
        time.sleep(3600)
    raise RuntimeError(f"injected: {failure}")


def end_with_parent() -> None:
    """A run that is killed leaves no process behind."""
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)


def serve(part: str, plan: Plan, records: Connection, log: Path) -> None:
    """Send the rows of a part, and the number and the name of each of its jobs before it runs."""
    os.setsid()  # so that it can be killed together with the processes it starts
    os.chdir(log.parents[1])
    Thread(target=end_with_parent, daemon=True).start()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)

    def begin(number: int, name: str) -> None:
        records.send((number, name))
        if plan.inject and number == AT and plan.first < AT:
            inject(plan.inject)

    try:
        with hastened() if plan.dry else nullcontext():
            for row in import_module(f"bench.gpu.{part}").rows(replace(plan, begin=begin)):
                records.send(row)
    except Spoiled as error:
        print(error, flush=True)
        sys.exit(SPOILED)
