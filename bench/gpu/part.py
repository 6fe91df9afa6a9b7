"""The process that runs a part of bench/on_gpu.sh: its plan, its jobs, and the records it sends to the main process."""

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
from vix_kernels.measure.interpreter import fast_interpreter
from vix_kernels.measure.operators import Row, failed, free, skipped
from vix_kernels.measure.timing import Spoiled

SPOILED = 75  # exit status of a process in which `Spoiled` was raised; run.py then starts a new process
AT = 1  # an injected failure occurs in the second job, after the first one has sent rows


@dataclass(frozen=True)
class Plan:
    """The work that one process does for a part.

    Attributes:
        dry: whether to use tiny sizes in Triton's interpreter.
        deadline: a value of time.monotonic(). Jobs that have not started by then are skipped, and their rows say so.
        first: number of the first job to run. Earlier jobs ran in a previous process.
        eager: whether to run the first job without a CUDA graph.
        begin: function that is called with the number and name of each job before the job runs.
        inject: the failure to simulate, or "" to simulate none.
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
        """Run a command and return its exit status and output. The status is None if the command was killed at the deadline."""
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
    """One measurement in a part. `run` returns its rows. `what` identifies the measurement, and is added to each row."""

    what: Row
    run: Callable[[], Iterable[Row]]


def by_job(jobs: Callable[[Plan], Iterable[Job]]) -> Callable[[Plan], Iterator[Row]]:
    """Turn a function that yields jobs into the `rows` function of a part. Failed and skipped jobs also yield a row.

    If a job crashes the process, only the results of that job are lost, because a new process continues with the next job.
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
                    torch.cuda.synchronize()  # raises again if the device cannot recover, for example after an illegal access
            free(plan.device)

    return rows


# The process


def inject(failure: str) -> None:
    """Simulate a failure of a GPU run, so that a dry run can test how failures are handled."""
    print(f"injected: {failure}", file=sys.stderr, flush=True)
    if failure == "crash":  # a driver error may abort the process
        os.abort()
    elif failure == "kill":  # the system kills the process when memory runs out
        os.kill(os.getpid(), signal.SIGKILL)
    elif failure == "capture":
        raise Spoiled("injected: the capture failed")
    elif failure == "hang":
        time.sleep(3600)
    raise RuntimeError(f"injected: {failure}")


def end_with_parent() -> None:
    """Wait for the parent to end, then kill this process group, so that no processes remain after a run is killed."""
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)


def serve(part: str, plan: Plan, records: Connection, log: Path) -> None:
    """Run a part in this process and send its rows to run.py. Before each job, send the number and name of the job."""
    os.setsid()  # start a process group, so that run.py can kill this process and its subprocesses together
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
        with fast_interpreter() if plan.dry else nullcontext():
            for row in import_module(f"bench.gpu.{part}").rows(replace(plan, begin=begin)):
                records.send(row)
    except Spoiled as error:
        print(error, flush=True)
        sys.exit(SPOILED)
