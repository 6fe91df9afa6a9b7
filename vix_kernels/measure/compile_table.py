"""The table of the compile report: one row per kernel specialization, and the checks for violated limits and regressions.

`vix dev compile-report` compares its results with the committed table, and reviewers read the diff of that table. The table can
contain rows for several Triton versions. A run is compared with the rows for the installed version.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

from .._triton.targets import TARGETS, TENSOR_MEMORY
from ..commands import DTYPES, print_table, write_csv
from .sources import source_hash

WIDE = 128  # bits; the widest access of a thread before sm_100
# Smallest allowed ratio of the new share of wide accesses to the committed share. It is below 1 because instruction scheduling
# changes the share a little.
KEPT_WIDE = 0.9


@dataclass(frozen=True, order=True)
class Row:
    """One kernel specialization. Counts are stored as text of the form "kind:count kind:count"."""

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
    occupancy: int  # percent
    matrix: str
    loads: str  # bits per thread:number of instructions
    stores: str
    uses: str  # "op direction slots,slots; ..."
    source: str = ""  # hash of the kernel and its tiles

    def __str__(self) -> str:
        return f"{self.kernel} {self.where} ({self.blocks}; {self.uses})"

    @property
    def where(self) -> str:
        return f"{self.arch} {self.dtype} width {self.width}"

    @property
    def cell(self) -> tuple[str, str, str, int]:
        return self.triton, self.arch, self.dtype, self.width


def count_text(counts: Mapping[str | int, int]) -> str:
    return " ".join(f"{kind}:{count}" for kind, count in counts.items())


def parse_counts(text: str) -> dict[str, int]:
    return {kind: int(count) for kind, _, count in (each.partition(":") for each in text.split())}


# Violations and regressions


def outdated(rows: Iterable[Row]) -> list[str]:
    """Return the kernels whose code or tiles have changed since the rows were written."""
    return sorted({f"{row.kernel} {row.arch}" for row in rows if row.source != source_hash(row.kernel, row.arch)})


def violations(rows: Iterable[Row]) -> list[str]:
    """Return a message for each limit that a row violates. A kernel that violates a limit is slow or cannot be launched.

    The result does not depend on the committed table.
    """
    found = []
    for row in rows:
        limit = TARGETS[row.arch].shared_memory
        if row.shared > limit:
            found.append(f"{row}: {row.shared} bytes of shared memory, {row.arch} has {limit}")
        if row.tensor_memory > TENSOR_MEMORY:
            found.append(f"{row}: {row.tensor_memory} columns of tensor memory, {row.arch} has {TENSOR_MEMORY}")
        if row.arch.startswith("sm_"):  # rows for AMD are checked only for regressions
            found += nvidia_violations(row)
    return found


def nvidia_violations(row: Row) -> list[str]:
    found = []
    allowed = 0 if row.width <= 128 else 64
    if row.spilled > allowed:
        found.append(f"{row}: spills {row.spilled} bytes per thread, {allowed} allowed")
    if row.dtype == "fp32" or "prepare" in row.kernel:
        return found
    is_pass = row.kernel.startswith(("aggregate", "broadcast"))
    if is_pass and row.arch == "sm_90" and row.width <= (128 if "forward" in row.kernel else 64):
        if {count.split(":")[0] for count in row.matrix.split()} != {"HGMMA"}:
            found.append(f"{row}: expected warp-group products (HGMMA) only, got {row.matrix or 'none'}")
    if row.width in (32, 64) and not (f"{WIDE}:" in row.loads and f"{WIDE}:" in row.stores):
        found.append(f"{row}: expected {WIDE}-bit loads and stores, got loads {row.loads} and stores {row.stores}")
    return found


def regressions(rows: Iterable[Row], committed: Iterable[Row], complete: bool = True) -> list[str]:
    """Return a message for each value that is worse than in the committed table.

    Rows are compared by use (kernel, op, direction and number of slots), because a code change can alter the specializations
    but usually leaves their uses unchanged. Only cells (Triton version, architecture, dtype and head width) with rows in both
    tables are compared. If `complete` is False, missing and new uses are not reported.
    """
    now, before = by_use(rows), by_use(committed)
    found: dict[str, None] = {}  # an ordered set, because several uses of one row have the same message
    for key in now:
        if key in before:
            found.update((f"{now[key][0]}: {text}", None) for text in worse(now[key], before[key]))
    cells = {key[0] for key in now} & {key[0] for key in before}
    vanished, appeared = (
        [key for key in these if key not in others and key[0] in cells] for these, others in ((before, now), (now, before))
    )
    new = launched(appeared, "launches, new to the table,")
    return list(found) + (launched(vanished, "no longer launches") + new if complete else [])


def by_use(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    """Return the rows by use: (cell, kernel, op and direction, number of slots) -> rows."""
    found = defaultdict(list)
    for row in rows:
        for use in row.uses.split("; "):
            op, direction, *slots = use.split(" ")
            for count in slots[0].split(",") if slots else [""]:
                found[row.cell, row.kernel, f"{op} {direction}", count].append(row)
    return found


def worse(now: list[Row], old: list[Row]) -> list[str]:
    """Compare the new rows of one use with the old ones. Return a message for each value that is worse."""
    found = []
    spilled, had = max(each.spilled for each in now), max(each.spilled for each in old)
    if spilled > had:
        found.append(f"spills {spilled} bytes, was {had}")
    kinds, had_kinds = matrix_kinds(now), matrix_kinds(old)
    ranks, had_ranks = sorted(map(matrix_rank, kinds)), sorted(map(matrix_rank, had_kinds))
    if had_ranks and (not ranks or ranks[0] < had_ranks[0] or ranks[-1] < had_ranks[-1]):
        found.append(f"multiplies by {' '.join(kinds) or 'no matrix instruction'}, was {' '.join(had_kinds)}")
    for name in ("loads", "stores"):
        share, was = wide_share(now, name), wide_share(old, name)
        if share < KEPT_WIDE * was:
            found.append(f"{share:.0%} of the bytes of its {name} are in {WIDE}-bit accesses, was {was:.0%}")
    return found


def launched(keys: Iterable[tuple], verb: str) -> list[str]:
    """Return one line per use and kernel. The line contains the first cell and the number of other cells."""
    cells = defaultdict(list)
    for cell, kernel, use, slots in keys:
        cells[use, kernel].append(f"{cell[1]} {cell[2]} width {cell[3]}" + f", {slots} slots" * bool(slots))
    return [
        f"{use} {verb} {kernel}: {where[0]}" + f" and {len(where) - 1} more" * (len(where) > 1)
        for (use, kernel), where in cells.items()
    ]


def matrix_kinds(rows: Iterable[Row]) -> list[str]:
    return sorted({kind for row in rows for kind in parse_counts(row.matrix)})


def matrix_rank(kind: str) -> tuple[bool, bool]:
    """Return the rank of a matrix instruction by speed. Faster instructions have a higher rank.

    HMMA, which a single warp executes, is the fallback for HGMMA and UTCHMMA. Products of TF32 operands have half the rate of
    products of 16-bit operands. On AMD, products of float32 operands have an eighth of the 16-bit rate.
    """
    return not kind.startswith("HMMA"), not kind.endswith((".TF32", "_f32"))


def wide_share(rows: Iterable[Row], name: str) -> float:
    """Return the fraction of all bytes that wide accesses move, assuming that every access is executed once."""
    moved = [(int(bits), int(bits) * count) for row in rows for bits, count in parse_counts(getattr(row, name)).items()]
    total = sum(size for _, size in moved)
    return sum(size for bits, size in moved if bits >= WIDE) / total if total else 0.0


# The file


def write_table(path: Path, rows: Iterable[Row]) -> None:
    write_csv(path, map(asdict, sorted(rows, key=order)))


def order(row: Row) -> tuple:
    """Return the sort key of a row.

    Rows are sorted by Triton version (3.6.0 before 3.10.0), then by architecture and dtype in the order of TARGETS and DTYPES,
    then by head width.
    """
    version = [int(each) for each in re.findall(r"\d+", row.triton)]
    return version, list(TARGETS).index(row.arch), list(DTYPES).index(row.dtype), row.width, row


def show_table(rows: list[Row]) -> None:
    """Print the rows without the Triton version, which is the same in all rows of a run."""
    print_table([each.name for each in fields(Row)[1:]], (map(str, astuple(row)[1:]) for row in rows))
