"""Compile the kernels that the public ops launch, count the instructions of their machine code, and check the counts.

The committed table has a row for every specialization that was compiled. Only specializations without an up-to-date row are
compiled, so a change to a kernel does not recompile other kernels. The exit status is 1 if a kernel does not compile, spills,
does not fit in shared memory, serializes matrix products, computes logits twice, or exceeds a budget. The limits, budgets and
exceptions are in measure/budgets.py.

--write adds the new rows to the table and drops the rows of changed kernels. It saves the rows of each combination of
architecture, dtype and head width as soon as they are complete, so that the next run can continue an interrupted run.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

import torch
import triton

from .._triton.launch import padded
from .._triton.launch_table import TABLE as LAUNCH_TABLE
from .._triton.targets import TARGETS
from ..commands import DTYPES, Parser, progress, read_csv, within, write_csv
from ..testing import SPECS
from ..testing.problem import REGISTERING
from . import shared_memory
from .budgets import BUDGETS, late, missed, violations
from .compile_cell import Report, run_cell
from .compile_table import Row, is_current, order, show_table, write_table

TABLE = Path(__file__).with_name("compile_report.csv")
Result = TypeVar("Result")
Cell = tuple[str, str, int]  # architecture, dtype and head width
OLDEST_TRITON = "3.6.0"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
# For these architectures, all dtypes and widths are compiled with the newest Triton. For all other architectures, only bf16 and
# a few widths are compiled, to save time.
FULL = ("sm_86", "sm_90")
WIDTHS = (16, 32, 64, 80, 96, 112, 128, 256)
FEW_WIDTHS = (32, 64, 128)


def grid(arch: str, oldest: bool) -> list[Cell]:
    """Return the cells that the committed table covers for one architecture and the oldest or newest supported Triton."""
    if oldest and arch != "sm_90":
        return []
    if arch in FULL and not oldest:
        return [(arch, *cell) for cell in product(DTYPES, WIDTHS)]
    return [(arch, "bf16", width) for width in FEW_WIDTHS]


def chosen(args: argparse.Namespace) -> list[Cell]:
    """Return the cells to report on. Dtypes and widths from the command line replace those that the table covers."""
    found: list[Cell] = []
    for arch in args.arch or ARCHITECTURES:
        cells = grid(arch, triton.__version__ == OLDEST_TRITON)
        dtypes = args.dtype or dict.fromkeys(cell[1] for cell in cells)
        widths = args.width or dict.fromkeys(cell[2] for cell in cells)
        found += product([arch], dtypes, widths)
    return list(dict.fromkeys(found))


def sample(rows: Iterable[Row], count: int) -> list[str]:
    """Return the keys of `count` rows, chosen by hash, so that every run on the same table chooses the same rows."""
    keys = {row.key for row in rows}
    return sorted(keys, key=lambda key: hashlib.sha256(key.encode()).digest())[:count]


def print_summary(report: Report, seconds: float) -> None:
    print(
        f"\n{len(report.rows)} specializations, {report.compiled} compiled by Triton {triton.__version__}, in {seconds:.0f} s"
    )
    for arch in dict.fromkeys(row.arch for row in report.rows):
        rows = [row for row in report.rows if row.arch == arch]
        print(f"    {arch}: {sum(row.spilled > 0 for row in rows)} of {len(rows)} spill")
        spilled, shared, loop = (max(rows, key=attrgetter(name)) for name in ("spilled", "shared", "loop"))
        print(f"        {spilled.spilled} bytes spilled at most, {spilled.kernel} {spilled.where}")
        print(f"        {shared.shared} of {TARGETS[arch].shared_memory} bytes shared at most, {shared.kernel} {shared.where}")
        print(f"        {loop.loop:g} instructions per {loop.unit or 'value'} at most, {loop.kernel} {loop.where}")
    print("launches per call, by this library + by PyTorch")
    for use, (ours, others) in report.launches.items():
        print(f"    {use}: {ours} + {others}")


# The command


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser.of("vix dev compile-report", __doc__)
    parser.add_argument("--arch", nargs="+", choices=TARGETS, help="GPUs to compile for (default: those that the table covers)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="default: bf16, and all for " + " and ".join(FULL))
    parser.add_argument(
        "--width", nargs="+", type=within(8, 256), metavar="D", help="head widths (default: those that the table covers)"
    )
    ops = [name for name, spec in SPECS.items() if spec.compiled or spec.variants]
    parser.add_argument("--op", nargs="+", choices=ops, default=ops, metavar="OP", help=f"{', '.join(ops)} (default: all)")
    parser.add_argument("--jobs", type=within(1, 1024), default=2, help="worker processes (default: 2)")
    parser.add_argument("--write", action="store_true", help="add the new rows to the table, and drop outdated ones")
    parser.add_argument("--all", action="store_true", help="compile all specializations, including those in the table")
    parser.add_argument("--missing", action="store_true", help="count the rows that the table lacks, and compile nothing")
    parser.add_argument(
        "--sample", type=within(0, 10_000), default=0, metavar="N",
        help="recompile N specializations that are in the table, and compare the results (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--shared", action="store_true",
        help="check only the shared memory of every entry of the launch table; --write measures missing entries",
    )  # fmt: skip
    parser.add_argument("--csv", type=Path, default=TABLE, metavar="PATH", help="the table (default: the committed one)")
    args = parser.parse_args(argv)
    args.partial = set(args.op) != set(ops)
    if args.write and args.partial:
        parser.error("argument --op: cannot be combined with --write, which writes the table of all ops")
    if args.csv != TABLE and not (args.write or args.csv.is_file()):
        parser.error(f"argument --csv: there is no file {args.csv}; --write creates it")
    if not args.csv.parent.is_dir():
        parser.error(f"argument --csv: there is no folder {args.csv.parent}")
    try:
        args.committed = read_csv(args.csv, Row) if args.csv.is_file() else []
    except (ValueError, csv.Error) as error:
        parser.error(f"argument --csv: {args.csv} is not a table of this report: {error}")
    return args


@contextmanager
def worker_environment() -> Iterator[None]:
    """Set the environment that worker processes inherit.

    In this environment, kernels are compiled instead of interpreted. Triton's cache starts empty unless TRITON_CACHE_DIR is
    set. PyTorch's profiler logs nothing. Line information stays enabled, although nothing reads it, because otherwise ptxas
    would generate code with different register counts.
    """
    with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ["TRITON_CACHE_DIR"] = os.environ.get("TRITON_CACHE_DIR") or cache
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        yield


def prepare_worker(modules: Iterable[str]) -> None:
    """Import `modules`, which register operators on import. The modules may belong to other packages."""
    torch.set_num_threads(1)
    for name in modules:
        import_module(name)


def by_workers(jobs: int, function: Callable[..., Result], cells: list[tuple]) -> Iterator[Result]:
    """In `jobs` worker processes, call function(*cell) for every cell. Yield the results as they arrive.

    The first three elements of a cell are the architecture, the dtype (or its number of bits) and the head width. Cells with
    the largest head widths start first, to balance the load.
    """
    # Workers are spawned, not forked, because Triton decides at import time whether kernels are interpreted.
    context = multiprocessing.get_context("spawn")
    with worker_environment(), ProcessPoolExecutor(jobs, context, prepare_worker, (REGISTERING,)) as pool:
        running = {pool.submit(function, *cell): cell for cell in sorted(cells, key=lambda cell: -cell[2])}
        for done, each in enumerate(as_completed(running), start=1):
            yield each.result()
            progress("[{}/{}] {} {} width {}".format(done, len(cells), *running[each]))
    progress("")


def shared_memory_table(args: argparse.Namespace) -> int:
    """Measure the shared memory of every entry of the launch table, and compare it with the committed table.

    With --write, measure only the entries that the committed table lacks, and add them. Return the exit status.
    """
    archs = tuple(TARGETS if not args.arch else dict.fromkeys(args.arch))  # without --arch, all targets
    bits = {8 * DTYPES[dtype].itemsize for dtype in args.dtype or DTYPES}
    widths = set(map(padded, args.width)) if args.width else {key[2] for key in LAUNCH_TABLE}
    committed = read_csv(shared_memory.COMMITTED, shared_memory.Row) if shared_memory.COMMITTED.is_file() else []
    same_version = [row for row in committed if row.triton == triton.__version__]
    cells, requested = [], set()
    for arch in archs:  # an entry is measured once per generation of GPUs
        wanted = set(shared_memory.missing(same_version, arch) if args.write else shared_memory.entries(arch)) - requested
        wanted = {entry for entry in wanted if entry.bits in bits and entry.width in widths}
        requested |= wanted
        cells += shared_memory.cells(wanted, arch)
    rows = [row for each in by_workers(args.jobs, shared_memory.measure, cells) for row in each]
    unmeasured = requested - {row.entry for row in rows}
    failures = [f"{entry}: no call launches this entry" for entry in sorted(unmeasured)]
    if args.write:
        served = {entry for arch in TARGETS for entry in shared_memory.entries(arch)}
        current = {(row.triton, row.entry): row for row in committed + rows if row.entry in served}  # new rows replace old ones
        rows = list(current.values())
        write_csv(shared_memory.COMMITTED, map(asdict, sorted(rows)))
        print(f"wrote {shared_memory.COMMITTED}")
    else:
        failures += [f"{row}: differs from {shared_memory.COMMITTED.name}" for row in sorted(set(rows) - set(committed))]
    failures += [text for arch in archs for text in shared_memory.excesses(rows, arch)]
    return verdict(failures, f"shared memory of {len(rows)} entries: ")


def verdict(failures: list[str], of: str = "") -> int:
    for text in failures:
        print(f"FAILED {text}", file=sys.stderr)
    print(of + ("FAILED" if failures else "passed"))
    return 1 if failures else 0


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.shared:
        return shared_memory_table(args)
    start = time.perf_counter()
    cells = chosen(args)
    table = [row for row in args.committed if is_current(row)] if args.write else args.committed
    in_slice = [row for row in table if row.triton == triton.__version__ and row.cell[1:] in cells]
    again = None if args.missing else [row.key for row in in_slice] if args.all else sample(in_slice, args.sample)
    report = Report()
    for each in by_workers(args.jobs, run_cell, [(*cell, tuple(args.op), args.csv, again) for cell in cells]):
        report.add(each)
        if args.write and each.rows and not each.errors:
            done = each.rows[0].cell
            table = [row for row in table if row.cell != done] + each.rows
            write_table(
                args.csv, table
            )  # after each cell, so that an interrupted run loses only the cells that it was compiling
        if args.missing and each.missing:
            print(f"{each.missing} rows are missing: {' '.join(map(str, each.cell))}")
    if args.missing:
        print(f"{report.missing} of {report.missing + len(report.rows)} rows are missing for Triton {triton.__version__}")
        return verdict(report.errors)
    report.rows.sort(key=order)
    show_table(report.rows)
    print_summary(report, time.perf_counter() - start)
    declared, exceeded = (a + b for a, b in zip(missed(report.rows, BUDGETS), late(report.times), strict=True))
    for text in declared:
        print(f"missed: {text}")
    failures = report.errors + violations(report.rows) + exceeded
    if args.write:
        print(f"wrote {args.csv}")
    else:
        failures += report.changed
    if not report.rows:
        failures.append(f"nothing to compile: {', '.join(args.op)} has no calls at these widths and dtypes")
    return verdict(failures)
