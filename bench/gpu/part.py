"""One part, in this process: `python -m bench.gpu.part timing --seconds 100 --rows timing.jsonl`."""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import nullcontext
from importlib import import_module

from vix_kernels._triton.interpreter import hastened

from .plan import Plan


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--break", dest="broken", action="store_true")
    args = parser.parse_args()
    plan = Plan(args.dry_run, time.monotonic() + args.seconds)
    with open(args.rows, "w") as file, hastened() if args.dry_run else nullcontext():
        for row in import_module(f"bench.gpu.{args.part}").rows(plan):
            print(json.dumps(row), file=file, flush=True)
            if args.broken:
                os.abort()  # as a crash in a driver would


if __name__ == "__main__":
    main()
