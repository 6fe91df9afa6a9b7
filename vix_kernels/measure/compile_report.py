"""Compile the kernels that the public ops launch, and compare the results with the committed table.

The exit status is 1 if a kernel spills, exceeds a limit or is worse than in the committed table. --write updates this table.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import triton

from .._triton.launch import padded
from .._triton.launch_table import TABLE as LAUNCH_TABLE
from .._triton.targets import TARGETS
from ..commands import DTYPES, Parser, read_csv, within, write_csv
from ..testing import SPECS, Case, OpSpec, draw
from ..testing.problem import REGISTERING
from . import offline, shared_memory
from .compile_table import Row, count_text, order, regressions, show_table, violations, write_table
from .sources import source_hash

TABLE = Path(__file__).with_name("compile_report.csv")
Result = TypeVar("Result")
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
WIDTHS = (32, 64, 80, 128, 256)
# Dtypes and head widths at which the variants of an operator, for example with RoPE, are also compiled.
VARIANTS = {(torch.bfloat16, 32), (torch.bfloat16, 64)}
BATCH, HEADS, TOKENS = 2, 4, 1024
NO_KERNEL = re.compile("empty|_unsafe_view")  # allocations, and a view that is not marked as a view


@dataclass
class Report:
    rows: list[Row] = field(default_factory=list)
    launches: dict[str, tuple[int, int]] = field(default_factory=dict)  # "op direction" -> largest (our launches, torch's)
    errors: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        self.rows += other.rows
        self.errors += other.errors
        for use, counts in other.launches.items():
            self.launches[use] = max(self.launches.get(use, counts), counts)


# Compilation


def calls(spec: OpSpec, width: int, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    """Yield the calls of an operator that are compiled, as pairs: the name in the table, and a case with the sizes."""
    for case in spec.compiled + (spec.variants if (dtype, width) in VARIANTS else ()):
        named = spec.name.removesuffix("_attention") + case.name
        yield named, replace(case, batch=BATCH, heads=HEADS, tokens=TOKENS, width=width)


def compile_cell(arch: str, dtype: str, width: int, ops: tuple[str, ...]) -> Report:
    """Compile the forward and backward passes of `ops` for one cell: an architecture, a dtype and a head width."""
    report = Report()
    binaries: list[Any] = []
    uses: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))  # specialization -> use -> slot counts
    for name, (table_name, case) in ((op, call) for op in ops for call in calls(SPECS[op], width, DTYPES[dtype])):
        problem = draw(SPECS[name], case, DTYPES[dtype], "cpu")
        for direction in ("forward", "backward"):
            use = f"{table_name} {direction}"
            where = f"{arch} {dtype} width {width}, {use}" + f", {case.features} slots" * bool(case.features)
            try:
                with offline.capture(arch) as launched, torch.autograd.profiler.profile() as profile:
                    if direction == "forward":
                        outputs = problem(backend="triton")
                    else:
                        problem.gradients(outputs)
            except Exception as error:  # an error in one call must not hide errors in the others
                report.errors.append(f"{where}: {brief(error)}")
                break
            if not launched:
                report.errors.append(f"{where}: no kernel was launched")
            roots = [event for event in profile.function_events if event.cpu_parent is None]
            launches = len(launched), sum(map(torch_launches, roots))
            report.launches[use] = max(report.launches.get(use, launches), launches)
            binaries += launched
            for each in launched:
                uses[each.hash][use].add(case.features)
    for launch in offline.describe(arch, binaries):
        used = (
            f"{use} {','.join(map(str, sorted(counts)))}" if any(counts) else use for use, counts in uses[launch.key].items()
        )
        report.rows.append(make_row(launch, dtype, width, "; ".join(used)))
    return report


def torch_launches(event) -> int:
    """Return the number of kernels that a profiled torch operator would launch on a GPU.

    Allocations and views launch none. A composite operator launches the kernels of the operators that it calls. Any other
    operator launches one.
    """
    space, _, name = event.name.partition("::")
    overloads = []
    if space == "aten" and hasattr(torch.ops.aten, name):
        operator = getattr(torch.ops.aten, name)
        overloads = [getattr(operator, each) for each in operator.overloads()]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    registered = [each for each in overloads if torch._C._dispatch_has_kernel(each.name())]
    if all(has_kernel(each.name(), "CompositeImplicitAutograd") for each in registered):  # also true if `registered` is empty
        return sum(torch_launches(child) for child in event.cpu_children)
    return int(not any(each.is_view for each in overloads) and not NO_KERNEL.search(name))


def make_row(launch: offline.CompiledLaunch, dtype: str, width: int, uses: str) -> Row:
    used = launch.resources
    return Row(
        triton=triton.__version__,
        arch=launch.target,
        dtype=dtype,
        width=width,
        kernel=launch.kernel,
        blocks=count_text({name[6:]: size for name, size in launch.constexprs.items() if name.startswith("BLOCK_")}),
        warps=launch.warps,
        stages=launch.stages,
        registers=used.registers,
        spilled=used.spilled,
        shared=launch.shared,
        tensor_memory=launch.tensor_memory,
        occupancy=launch.occupancy,
        matrix=count_text(used.matrix),
        loads=count_text(used.loads),
        stores=count_text(used.stores),
        uses=uses,
        source=source_hash(launch.kernel, launch.target),
    )


def brief(error: Exception) -> str:
    while error.__cause__ is not None:  # Triton wraps the original error in errors that quote the source
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1].strip()}"


def print_summary(report: Report, seconds: float) -> None:
    print(f"\n{len(report.rows)} specializations by Triton {triton.__version__} in {seconds:.0f} s")
    for arch in dict.fromkeys(row.arch for row in report.rows):
        rows = [row for row in report.rows if row.arch == arch]
        print(f"    {arch}: {sum(row.spilled > 0 for row in rows)} of {len(rows)} spill")
        spilled, shared = (max(rows, key=attrgetter(name)) for name in ("spilled", "shared"))
        slowest = min(rows, key=attrgetter("occupancy"))
        print(f"        {spilled.spilled} bytes spilled at most, {spilled.kernel} {spilled.where}")
        print(f"        {shared.shared} of {TARGETS[arch].shared_memory} bytes shared at most, {shared.kernel} {shared.where}")
        print(f"        {slowest.occupancy} % occupancy at least, {slowest.kernel} {slowest.where}")
    print("launches per call, this library's + torch's")
    for use, (ours, others) in report.launches.items():
        print(f"    {use}: {ours} + {others}")


# The command


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser.of("vix dev compile-report", __doc__)
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=ARCHITECTURES, help="GPUs to compile for")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=tuple(DTYPES))
    parser.add_argument("--width", nargs="+", type=within(8, 256), default=WIDTHS, metavar="D", help="head widths")
    ops = [name for name, spec in SPECS.items() if spec.compiled or spec.variants]
    parser.add_argument("--op", nargs="+", choices=ops, default=ops, metavar="OP", help=f"{', '.join(ops)} (default: all)")
    parser.add_argument("--jobs", type=within(1, 1024), default=2, help="worker processes (default: 2)")
    parser.add_argument("--write", action="store_true", help="replace the rows of the compiled kernels in the committed table")
    parser.add_argument(
        "--shared", action="store_true",
        help="check only the shared memory of every entry of the launch table; --write measures missing entries",
    )  # fmt: skip
    parser.add_argument("--csv", type=Path, default=TABLE, metavar="PATH", help="table to compare with or to write")
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

    In this environment, kernels are compiled instead of interpreted. Triton's cache starts empty unless the user chose a cache
    folder. The profiler prints nothing. Line information stays enabled although nothing reads it, because ptxas would otherwise
    generate code with different register counts.
    """
    with tempfile.TemporaryDirectory() as cache, patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ["TRITON_CACHE_DIR"] = os.environ.get("TRITON_CACHE_DIR") or cache
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        yield


def prepare_worker(modules: Iterable[str]) -> None:
    """Import `modules`, which register specifications on import. The modules may belong to other packages."""
    torch.set_num_threads(1)
    for name in modules:
        import_module(name)


def by_workers(jobs: int, function: Callable[..., Result], cells: list[tuple]) -> Iterator[Result]:
    """Yield the result of function(*cell) for every cell, in the order in which the results arrive.

    Cells with the largest head widths start first, to balance the load.
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
    """Measure the shared memory of every entry of the launch table and compare it with the committed table.

    With --write, measure only the entries that the committed table lacks, and add them.
    """
    archs = tuple(TARGETS if args.arch == ARCHITECTURES else dict.fromkeys(args.arch))  # without --arch, all targets
    bits = {8 * DTYPES[dtype].itemsize for dtype in args.dtype}
    widths = set(map(padded, args.width)) | {key[2] for key in LAUNCH_TABLE if args.width == WIDTHS}
    committed = read_csv(shared_memory.COMMITTED, shared_memory.Row) if shared_memory.COMMITTED.is_file() else []
    same_version = [row for row in committed if row.triton == triton.__version__]
    cells, requested = [], set()
    for arch in archs:  # GPUs of one generation share entries
        wanted = set(shared_memory.missing(same_version, arch) if args.write else shared_memory.entries(arch)) - requested
        wanted = {entry for entry in wanted if entry.bits in bits and entry.width in widths}
        requested |= wanted
        cells += shared_memory.cells(wanted, arch)
    rows = [row for each in by_workers(args.jobs, shared_memory.measure, cells) for row in each]
    unmeasured = requested - {row.entry for row in rows}
    failures = [f"{entry}: no call launches it" for entry in sorted(unmeasured)]
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


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.shared:
        return shared_memory_table(args)
    start = time.perf_counter()
    cells = [(*cell, tuple(args.op)) for cell in product(args.arch, args.dtype, args.width)]
    report = Report()
    for each in by_workers(args.jobs, compile_cell, list(dict.fromkeys(cells))):
        report.add(each)
    report.rows.sort(key=order)
    show_table(report.rows)
    print_summary(report, time.perf_counter() - start)

    worse = regressions(report.rows, args.committed, complete=not args.partial)
    failures = report.errors + violations(report.rows)
    if not report.rows:
        failures.append(f"nothing to compile: {', '.join(args.op)} has no calls at these widths and dtypes")
    if args.write and not report.errors:
        compiled = {(triton.__version__, *cell[:3]) for cell in cells}
        kept = [row for row in args.committed if row.cell not in compiled]
        write_table(args.csv, kept + report.rows)
        print(f"wrote {args.csv}")
    else:
        failures += worse
        cells = dict.fromkeys(row.cell for row in report.rows)
        if unknown := [cell for cell in cells if cell not in {row.cell for row in args.committed}]:
            first = " ".join(map(str, unknown[0]))
            print(f"nothing to compare with in {args.csv}: {len(unknown)} of {len(cells)} cells, first Triton {first}")
    for text in worse if args.write else ():
        print(f"accepted: {text}")
    return verdict(failures)
