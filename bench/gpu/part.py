"""One part, in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread

from vix_kernels.measure.interpreter import hastened
from vix_kernels.measure.timing import Spoiled

from .plan import Plan

SPOILED = 75  # exit status: this process can measure no more, a new one can
AT = 1  # the job that an injected failure meets: the second, so that there is something to lose


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
