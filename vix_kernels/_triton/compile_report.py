"""`vix compile-report`: compile what the public ops launch, for GPUs that are not there, and hold it to limits.

One row of the table is one specialisation of one kernel. The committed table is the state that a change is compared
with; --write refreshes it, and its diff is what a reviewer reads. It may hold rows of several Triton versions: a run
is compared with those of its own.
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
from dataclasses import astuple, dataclass, field, fields
from functools import partial
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from . import offline

TABLE = Path(__file__).with_name("compile_report.csv")
ARCHITECTURES = ("sm_80", "sm_86", "sm_90", "sm_100")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
WIDTHS = (32, 64, 80, 128, 256)
FEATURES = (16, 110, 266)
ROPE = {(torch.bfloat16, 32), (torch.bfloat16, 64)}  # dtypes and widths that are rotated as well
BATCH, HEADS, TOKENS = 2, 4, 1024

NO_KERNEL = re.compile("empty|_unsafe_view")  # allocations, and a view that does not say so
WIDE = 128  # bits, the widest access of a thread before sm_100
KEPT_WIDE = 0.9  # of the share of bytes that the committed row moves by wide accesses; scheduling moves it a little


@dataclass(frozen=True, order=True)
class Row:
    """One specialisation. Counts are written "kind:count kind:count", so that the table stays text."""

    triton: str
    arch: str
    dtype: str
    width: int
    kernel: str
    blocks: str
    warps: int
    stages: int
    registers: int
    spilled: int
    shared: int
    tensor_memory: int
    matrix: str
    loads: str  # bits a thread : instructions
    stores: str
    uses: str  # "op direction features,features; ..."

    def __str__(self) -> str:
        return f"{self.kernel} {self.arch} {self.dtype} width {self.width} ({self.blocks}; {self.uses})"


@dataclass
class Report:
    rows: list[Row] = field(default_factory=list)
    launches: dict[str, tuple[int, int]] = field(default_factory=dict)  # "op direction" -> most (ours, torch's)
    errors: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        self.rows += other.rows
        self.errors += other.errors
        for use, counts in other.launches.items():
            self.launches[use] = max(self.launches.get(use, counts), counts)


# What is compiled


@dataclass
class Call:
    """An ordinary public call, with CPU tensors; forward comes before backward."""

    op: str
    features: int  # 0 where there are none
    function: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: list[Tensor]

    def forward(self) -> None:
        result = self.function(*self.inputs)
        self.outputs = result if isinstance(result, tuple) else (result,)

    def backward(self) -> None:
        torch.autograd.grad(self.outputs, self.inputs, [torch.empty_like(each) for each in self.outputs])


def calls(width: int, dtype: torch.dtype, features: Iterable[int]) -> Iterator[Call]:
    import vix_kernels as vix

    qkv = [torch.empty(BATCH, HEADS, TOKENS, width, dtype=dtype, requires_grad=True) for _ in range(3)]
    rope = vix.rope_1d(TOKENS, width) if (dtype, width) in ROPE else None
    for count in features:
        performer = partial(vix.performer_attention, projection=torch.empty(count, width), backend="triton")
        yield Call("performer", count, performer, qkv)
        if rope is not None:
            yield Call("performer+rope", count, partial(performer, rope=rope), qkv)
    if rope is not None:
        yield Call("apply_rope", 0, partial(vix.apply_rope, rope=rope, backend="triton"), qkv[:2])


def compile_cell(arch: str, dtype: str, width: int, features: tuple[int, ...]) -> Report:
    """One cell of the grid: every op, forward and backward, for one architecture, dtype and width."""
    report = Report()
    binaries: list[Any] = []
    uses: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))  # specialisation -> use -> features
    for call in calls(width, DTYPES[dtype], features):
        for step in (call.forward, call.backward):
            use = f"{call.op} {step.__name__}"
            where = f"{arch} {dtype} width {width}, {use}" + f", {call.features} features" * bool(call.features)
            try:
                with offline.capture(arch) as launched, torch.autograd.profiler.profile() as profile:
                    step()
            except Exception as error:  # one call that fails must not hide the others
                report.errors.append(f"{where}: {brief(error)}")
                break
            if not launched:
                report.errors.append(f"{where}: no kernel was launched")
            roots = [event for event in profile.function_events if event.cpu_parent is None]
            launches = len(launched), sum(map(torch_launches, roots))
            report.launches[use] = max(report.launches.get(use, launches), launches)
            binaries += launched
            for key in {each.hash for each in launched}:
                uses[key][use].append(call.features)
    for launch in offline.describe(arch, binaries):
        used = (
            f"{use} {','.join(map(str, sorted(counts)))}" if any(counts) else use for use, counts in uses[launch.key].items()
        )
        report.rows.append(make_row(launch, dtype, width, "; ".join(used)))
    return report


def torch_launches(event) -> int:
    """Kernels that this operator would launch on a GPU: one, unless it allocates, views or is composed of others."""
    space, _, name = event.name.partition("::")
    overloads = []
    if space == "aten" and hasattr(torch.ops.aten, name):
        operator = getattr(torch.ops.aten, name)
        overloads = [getattr(operator, each) for each in operator.overloads()]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    registered = [each for each in overloads if torch._C._dispatch_has_kernel(each.name())]
    if all(has_kernel(each.name(), "CompositeImplicitAutograd") for each in registered):  # or not an operator
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
        matrix=count_text(used.matrix),
        loads=count_text(used.loads),
        stores=count_text(used.stores),
        uses=uses,
    )


def count_text(counts: dict) -> str:
    return " ".join(f"{kind}:{count}" for kind, count in counts.items())


def parse_counts(text: str) -> dict[str, int]:
    return {kind: int(count) for kind, _, count in (each.partition(":") for each in text.split())}


def brief(error: Exception) -> str:
    while error.__cause__ is not None:  # Triton quotes the kernel's source from the outside in; the reason is innermost
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1].strip()}"


# What is wrong with it


def violations(rows: Iterable[Row]) -> list[str]:
    """What would be slow or would not launch at all, whatever was committed."""
    found = []
    for row in rows:
        allowed = 0 if row.width <= 128 else 64
        if row.spilled > allowed:
            found.append(f"{row}: spills {row.spilled} bytes a thread, {allowed} allowed")
        limit = offline.TARGETS[row.arch].shared_memory
        if row.shared > limit:
            found.append(f"{row}: {row.shared} bytes of shared memory, {row.arch} has {limit}")
        if row.tensor_memory > offline.TENSOR_MEMORY:
            found.append(f"{row}: {row.tensor_memory} columns of tensor memory, a block has {offline.TENSOR_MEMORY}")
        if row.dtype == "fp32" or "prepare" in row.kernel:
            continue
        moves = row.kernel.startswith(("aggregate", "broadcast"))
        if moves and row.arch == "sm_90" and row.width <= (128 if "forward" in row.kernel else 64):
            if {count.split(":")[0] for count in row.matrix.split()} != {"HGMMA"}:
                found.append(f"{row}: expected warp-group products (HGMMA) only, got {row.matrix or 'none'}")
        if row.width in (32, 64) and not (f"{WIDE}:" in row.loads and f"{WIDE}:" in row.stores):
            found.append(f"{row}: expected {WIDE}-bit loads and stores, got loads {row.loads} and stores {row.stores}")
    return found


def regressions(rows: Iterable[Row], committed: Iterable[Row]) -> list[str]:
    """What became worse since the committed table, use by use: a specialisation may come and go, its use stays."""
    before = by_use(committed)
    found: dict[str, None] = {}  # a set in order: several uses of one row say the same
    for key, now in by_use(rows).items():
        if key not in before:
            continue
        old = before[key]
        worse = []
        spilled, had = max(each.spilled for each in now), max(each.spilled for each in old)
        if spilled > had:
            worse.append(f"spills {spilled} bytes, was {had}")
        kinds, had_kinds = matrix_kinds(now), matrix_kinds(old)
        ranks, had_ranks = sorted(map(matrix_rank, kinds)), sorted(map(matrix_rank, had_kinds))
        if had_ranks and (not ranks or ranks[0] < had_ranks[0] or ranks[-1] < had_ranks[-1]):
            worse.append(f"multiplies by {' '.join(kinds) or 'no matrix instruction'}, was {' '.join(had_kinds)}")
        for name in ("loads", "stores"):
            share, was = wide_share(now, name), wide_share(old, name)
            if share < KEPT_WIDE * was:
                worse.append(f"{share:.0%} of the bytes of its {name} are in {WIDE}-bit accesses, was {was:.0%}")
        found.update((f"{now[0]}: {text}", None) for text in worse)
    return list(found)


def by_use(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    """(arch, dtype, width, kernel, op and direction, features) -> its rows."""
    found = defaultdict(list)
    for row in rows:
        for use in row.uses.split("; "):
            op, direction, *features = use.split(" ")
            for count in features[0].split(",") if features else [""]:
                found[row.triton, row.arch, row.dtype, row.width, row.kernel, op, direction, count].append(row)
    return found


def matrix_kinds(rows: Iterable[Row]) -> list[str]:
    return sorted({kind for row in rows for kind in parse_counts(row.matrix)})


def matrix_rank(kind: str) -> tuple[bool, bool]:
    """HMMA, of one warp, is what a product falls back to from HGMMA and UTCHMMA; tf32 has half the speed."""
    return not kind.startswith("HMMA"), not kind.endswith(".TF32")


def wide_share(rows: Iterable[Row], name: str) -> float:
    """Of the bytes that one execution of each access moves, the share in wide accesses."""
    moved = [(int(bits), int(bits) * count) for row in rows for bits, count in parse_counts(getattr(row, name)).items()]
    total = sum(size for _, size in moved)
    return sum(size for bits, size in moved if bits >= WIDE) / total if total else 0.0


# The table


def read_table(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        header, *lines = csv.reader(file)
    if header != [each.name for each in fields(Row)]:
        raise ValueError(f"unexpected columns {', '.join(header)}")
    convert = [int if each.type == "int" else str for each in fields(Row)]
    return [Row(*(kind(cell) for kind, cell in zip(convert, line, strict=True))) for line in lines]


def write_table(path: Path, rows: Iterable[Row]) -> None:
    rows = sorted(rows, key=order)  # first: a row that it cannot place must not cost the old table
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(each.name for each in fields(Row))
        writer.writerows(map(astuple, rows))


def order(row: Row) -> tuple:
    """Numbers in names count as numbers: sm_80 before sm_100, 3.6.0 before 3.10.0."""
    numbers = tuple(int(each) for each in re.findall(r"\d+", f"{row.triton} {row.arch}"))
    return (numbers, list(DTYPES).index(row.dtype), row.width, row)


def print_table(rows: list[Row]) -> None:
    names = [each.name for each in fields(Row) if each.name != "triton"]
    lines = [names, *([str(getattr(row, name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_summary(report: Report, seconds: float) -> None:
    print(f"\n{len(report.rows)} specialisations by Triton {triton.__version__} in {seconds:.0f} s")
    for arch in dict.fromkeys(row.arch for row in report.rows):
        rows = [row for row in report.rows if row.arch == arch]
        print(f"    {arch}: {sum(row.spilled > 0 for row in rows)} of {len(rows)} spill")
        for name, limit in (("spilled", ""), ("shared", f" of {offline.TARGETS[arch].shared_memory}")):
            row = max(rows, key=attrgetter(name))
            where = f"{row.kernel} {row.dtype} width {row.width}"
            print(f"        {getattr(row, name)}{limit} bytes {name} at most, {where}")
    print("launches of one call, this library's + torch's")
    for use, (ours, others) in report.launches.items():
        print(f"    {use}: {ours} + {others}")


# The command


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vix compile-report",
        description="Compile the launches of the public ops; exit 1 on a spill, an excess or a regression.",
    )
    parser.add_argument("--arch", nargs="+", choices=offline.TARGETS, default=ARCHITECTURES, help="GPUs to compile for")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=tuple(DTYPES))
    parser.add_argument("--width", nargs="+", type=within(8, 256), default=WIDTHS, metavar="D", help="head widths")
    parser.add_argument("--features", nargs="+", type=within(1, 65536), default=FEATURES, metavar="M")
    parser.add_argument("--jobs", type=within(1, 1024), default=2, help="worker processes (default: 2)")
    parser.add_argument("--write", action="store_true", help="refresh the committed table for what was compiled")
    parser.add_argument("--csv", type=Path, default=TABLE, metavar="PATH", help="the table to compare with or to write")
    args = parser.parse_args(argv)
    if args.write and set(args.features) != set(FEATURES):
        parser.error("argument --features: a table is written with its full set of features; leave --features out")
    if args.csv != TABLE and not (args.write or args.csv.is_file()):
        parser.error(f"argument --csv: there is no file {args.csv}; --write makes one")
    if not args.csv.parent.is_dir():
        parser.error(f"argument --csv: there is no folder {args.csv.parent}")
    try:
        args.committed = read_table(args.csv) if args.csv.is_file() else []
    except (ValueError, csv.Error) as error:
        parser.error(f"argument --csv: {args.csv} is not a table of this report: {error}")
    return args


def within(least: int, most: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected an integer from {least} to {most}, got {text!r}")
        return value

    return integer


@contextmanager
def worker_environment() -> Iterator[None]:
    """What the workers inherit: kernels that compile, an empty cache unless the user chose one, a silent profiler."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as cache:
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ["TRITON_CACHE_DIR"] = os.environ.get("TRITON_CACHE_DIR") or cache
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # a tenth of the time, and nothing here reads them
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def compile_grid(cells: list[tuple], jobs: int) -> Report:
    report, done = Report(), 0
    # Spawned, not forked: whether a kernel is interpreted is settled when triton is imported.
    context = multiprocessing.get_context("spawn")
    with worker_environment(), ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        # The widest take longest; first, they do not keep one worker busy alone at the end.
        running = {pool.submit(compile_cell, *cell): cell for cell in sorted(cells, key=lambda cell: -cell[2])}
        for each in as_completed(running):
            report.add(each.result())
            done += 1
            arch, dtype, width, _ = running[each]
            progress(f"[{done}/{len(cells)}] {arch} {dtype} width {width}, {len(report.rows)} specialisations")
    progress("")
    report.rows.sort(key=order)
    return report


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    args = parse(argv)
    start = time.perf_counter()
    cells = [(*cell, tuple(args.features)) for cell in product(args.arch, args.dtype, args.width)]
    report = compile_grid(list(dict.fromkeys(cells)), args.jobs)
    print_table(report.rows)
    print_summary(report, time.perf_counter() - start)

    worse = regressions(report.rows, args.committed)
    failures = report.errors + violations(report.rows)
    if args.write and not report.errors:
        compiled = {(triton.__version__, *cell[:3]) for cell in cells}
        kept = [row for row in args.committed if (row.triton, row.arch, row.dtype, row.width) not in compiled]
        write_table(args.csv, kept + report.rows)
        print(f"wrote {args.csv}")
    else:
        failures += worse
        if not any(row.triton == triton.__version__ for row in args.committed):
            print(f"nothing to compare with: {args.csv} has no rows of Triton {triton.__version__}")
    for text in worse if args.write else ():
        print(f"accepted: {text}")
    for text in failures:
        print(f"FAILED {text}", file=sys.stderr)
    print("FAILED" if failures else "passed")
    return 1 if failures else 0
