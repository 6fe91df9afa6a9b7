"""One part, in this process: `python -m bench.gpu.part timing --seconds 100 --rows timing.jsonl`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from contextlib import nullcontext
from importlib import import_module

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


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("part")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--inject", default="")
    args = parser.parse_args()
    with open(args.rows, "a") as file:
        print(file=file)  # a process before this one may have left half a line

        def write(record: dict) -> None:
            print(json.dumps(record), file=file, flush=True)

        def begin(number: int, name: str) -> None:
            write(dict(job=number, name=name))
            if args.inject and number == AT and args.first < AT:
                inject(args.inject)

        plan = Plan(args.dry_run, time.monotonic() + args.seconds, args.first, args.eager, begin, args.inject)
        try:
            with hastened() if args.dry_run else nullcontext():
                for row in import_module(f"bench.gpu.{args.part}").rows(plan):
                    write(row)
        except Spoiled as error:
            print(error, flush=True)
            return SPOILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
