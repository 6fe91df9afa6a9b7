"""Compile the kernels of one cell of the compile report, and describe their machine code.

A cell is a combination of an architecture, a dtype and a head width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

import triton

from .._triton.targets import TARGETS
from ..commands import read_csv
from ..testing import SPECS
from . import machine_code, ttgir
from .budgets import PREDICTED
from .compile_table import Row, count_text
from .counting import LANES, PIPES, Section, analyze
from .observed import Launch, Use, brief, observe_cell
from .roofline import GPUS
from .ttgir import evaluate

SAMPLES = 256  # maximum number of programs per launch for which trip counts of loops are evaluated
STEP = 7919  # distance between the indices of these programs; a prime number, so that ids vary in all dimensions of the grid


@dataclass
class Report:
    """Results of the compile report for one or more cells.

    Attributes:
        cell: the architecture, dtype and head width, if the report covers one cell.
        rows: a row for every launched specialization that was compiled in this run or is in the table (see compile_table.py).
        compiled: number of specializations that were compiled in this run.
        missing: number of launched specializations that the table lacks. It is counted only if nothing is compiled.
        launches: maps "op direction" to the number of launches by this library and the number of launches by PyTorch. If
            several calls have the same op and direction, the call with the most launches by this library is used.
        errors: a message for each call or compilation that failed.
        times: maps the name of a budget in budgets.PREDICTED to the predicted time on the H100 in seconds.
        changed: a message for each specialization that was compiled again and differs from the table.
    """

    cell: tuple[str, str, int] | None = None
    rows: list[Row] = field(default_factory=list)
    compiled: int = 0
    missing: int = 0
    launches: dict[str, tuple[int, int]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    times: dict[str, float] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        self.rows += other.rows
        self.compiled += other.compiled
        self.missing += other.missing
        self.errors += other.errors
        self.changed += other.changed
        self.times |= other.times
        for use, counts in other.launches.items():
            self.launches[use] = max(self.launches.get(use, counts), counts)


def run_cell(arch: str, dtype: str, width: int, ops: tuple[str, ...], table: Path, again: Collection[str] | None) -> Report:
    """Return the report of one cell. Compile the specializations that `table` lacks, and those whose keys are in `again`.

    If `again` is None, nothing is compiled.
    """
    cell = observe_cell(arch, dtype, width, ops)
    known = {row.key: row for row in read_csv(table, Row)} if table.is_file() else {}
    wanted = [key for key in cell.launches if key not in known or key in (again or ())]
    report = Report((arch, dtype, width), launches=cell.counts, errors=cell.errors)
    if again is None:
        report.missing = len(wanted)
        wanted = []
    rows: dict[str, Row] = {key: known[key] for key in cell.launches if key in known and key not in wanted}
    for row in compile_launches(arch, [cell.launches[key][0] for key in wanted], report.errors):
        rows[row.key] = row
        report.compiled += 1
    for key, row in rows.items():
        same = [row for row in (known.get(key), row) if row is not None]
        if len({replace(each, dtype="", width=0, uses="", whole=0.0) for each in same}) > 1:
            report.changed.append(f"{row.kernel} {arch} {dtype} width {width}: the recompiled kernel differs from the table")
        row = replace(row, dtype=dtype, width=width, uses=uses_text(cell.uses[key]))
        report.rows.append(replace(row, whole=rounded(whole(row, cell.launches[key]))))
    if again is not None and not report.errors:
        report.times = predicted_times(arch, dtype, width, rows)
    return report


def predicted_times(arch: str, dtype: str, width: int, known: Mapping[str, Row]) -> dict[str, float]:
    """Return a dict from the names of budgets in PREDICTED to predicted times in seconds (inf if a trip count is unknown).

    Budgets for other architectures, dtypes and widths are omitted.
    """
    from .launch_times import call_times  # imported here, because launch_times imports this module

    gpu = next(gpu for gpu in GPUS if gpu.name == "H100")
    found = {}
    for budget in PREDICTED:
        if (arch, dtype, width) == (gpu.arch, budget.dtype, budget.case.width):
            times = list(call_times(SPECS[budget.op], budget.case, dtype, gpu, known))
            chosen = [each for name, each in times if name in budget.directions and each.kernel.startswith(budget.kernels)]
            found[budget.name] = sum(each.seconds if each.complete else inf for each in chosen)
    return found


def uses_text(uses: Iterable[Use]) -> str:
    slots: dict[str, set[int]] = defaultdict(set)
    for use in uses:
        slots[str(use)].add(use.slots)
    return "; ".join(f"{use} {','.join(map(str, sorted(counts)))}" if any(counts) else use for use, counts in slots.items())


def whole(row: Row, launches: Iterable[Launch]) -> float:
    """Return the number of instructions of all programs in the largest launch, per (token, slot) pair.

    For kernels without main loops, or without arguments N and M, return the number per element of the largest tensor.
    """
    if not row.sections:
        return 0.0
    largest = max(launches, key=lambda launch: (launch.pairs, launch.elements))
    useful = (row.unit and largest.pairs) or largest.elements
    return work(row.parts, largest)[0] * LANES * row.warps / max(1, useful)


def work(parts: Iterable[Section], launch: Launch) -> list[float]:
    """Return the load of each pipe in PIPES: the counts of one warp (see Counts), summed over all programs.

    The sum is extrapolated from a sample of programs. If the trip count of a loop is unknown, one iteration is assumed.
    """
    parts = tuple(parts)
    total = [0.0] * len(PIPES)
    sampled = [at * STEP % launch.programs for at in range(min(launch.programs, SAMPLES))]
    for program in sampled:
        values = launch.scalars | program_ids(program, launch.grid)
        for part in parts:
            times = max(0, evaluate(part.trips.replace("?", "1"), values))
            total = [have + times * count for have, count in zip(total, astuple(part.counts), strict=True)]
    return [each * launch.programs / max(1, len(sampled)) for each in total]


def program_ids(program: int, grid: tuple[int, ...]) -> dict[str, int]:
    values = {}
    for axis, size in zip("xyz", (*grid, 1, 1), strict=False):
        values |= {f"pid_{axis}": program % size, f"grid_{axis}": size}
        program //= size
    return values


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def compile_launches(arch: str, launches: Iterable[Launch], errors: list[str]) -> Iterator[Row]:
    """Compile the kernel of each launch and yield its row. For each failure, append a message to `errors`.

    The columns `dtype`, `width`, `uses` and `whole` are left empty or 0.
    """
    compiled = []
    for launch in launches:
        try:
            compiled.append((launch, launch.compile()))
        except Exception as error:  # an error in one kernel must not hide errors in the others
            errors.append(f"{launch.kernel} {arch}: {brief(error)}")
    resources = machine_code.read(TARGETS[arch].gpu, [binary.asm for _, binary in compiled])
    for (launch, binary), used in zip(compiled, resources, strict=True):
        yield make_row(arch, launch, binary, used)


def resident_programs(arch: str, warps: int, *resources: int) -> int:
    """Return how many programs fit on a multiprocessor. `resources` are arguments of Target.occupancy."""
    target = TARGETS[arch]
    return -(-target.occupancy(warps, *resources) * target.warps // (100 * warps))  # undo rounding down to a percentage


def make_row(arch: str, launch: Launch, binary: Any, used: machine_code.Resources) -> Row:
    meta = binary.metadata
    memory = meta.shared, getattr(meta, "tmem_size", 0) or 0
    names = {
        name.removeprefix("BLOCK_"): size for name, size in launch.constexprs.items() if name.startswith(("BLOCK_", "TILES"))
    }
    row = Row(
        triton=triton.__version__, arch=arch, dtype="", width=0, kernel=launch.kernel, blocks=count_text(names),
        warps=meta.num_warps, stages=meta.num_stages, registers=used.registers, spilled=used.spilled, shared=memory[0],
        tensor_memory=memory[1], programs=resident_programs(arch, meta.num_warps, used.registers, *memory),
        unit="", loop=0.0, whole=0.0, exps=0.0, waits=0, products=0, multiply_adds=0.0, cycles="", bound="",
        matrix=count_text(used.matrix), loads=count_text(used.loads), stores=count_text(used.stores),
        uses="", sections="", source=launch.source, key=launch.key,
    )  # fmt: skip
    if not used.code:  # AMD, for which instructions are not counted
        return row
    found = analyze(used.code, ttgir.read(binary.asm["ttgir"]), meta.num_warps, arch)
    return replace(
        row, unit=found.unit, loop=rounded(found.instructions), exps=rounded(found.exponentials), waits=found.waits,
        products=found.products, multiply_adds=rounded(found.multiply_adds),
        cycles=count_text({name: 1000 * count for name, count in found.cycles.items()}),
        bound=max(found.cycles, key=found.cycles.get) if found.cycles else "",
        sections="; ".join(map(str, found.sections)),
    )  # fmt: skip
