"""The table of the compile report: one row a specialisation, the limits on it, and what became worse.

The committed table is the state that a change is compared with, and its diff is what a reviewer reads. It may hold rows
of several Triton versions: a run is compared with those of its own.
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
    occupancy: int  # per cent
    matrix: str
    loads: str  # bits a thread : instructions
    stores: str
    uses: str  # "op direction slots,slots; ..."
    source: str = ""  # hash of the kernel and of its tiles

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


# What is wrong with it


def outdated(rows: Iterable[Row]) -> list[str]:
    """The kernels whose code or tiles are not those that the rows were made from."""
    return sorted({f"{row.kernel} {row.arch}" for row in rows if row.source != source_hash(row.kernel, row.arch)})


def violations(rows: Iterable[Row]) -> list[str]:
    """What would be slow or would not launch at all, whatever was committed."""
    found = []
    for row in rows:
        limit = TARGETS[row.arch].shared_memory
        if row.shared > limit:
            found.append(f"{row}: {row.shared} bytes of shared memory, {row.arch} has {limit}")
        if row.tensor_memory > TENSOR_MEMORY:
            found.append(f"{row}: {row.tensor_memory} columns of tensor memory, {row.arch} has {TENSOR_MEMORY}")
        if row.arch.startswith("sm_"):  # on AMD the rest is only kept from becoming worse
            found += nvidia_violations(row)
    return found


def nvidia_violations(row: Row) -> list[str]:
    found = []
    allowed = 0 if row.width <= 128 else 64
    if row.spilled > allowed:
        found.append(f"{row}: spills {row.spilled} bytes a thread, {allowed} allowed")
    if row.dtype == "fp32" or "prepare" in row.kernel:
        return found
    moves = row.kernel.startswith(("aggregate", "broadcast"))
    if moves and row.arch == "sm_90" and row.width <= (128 if "forward" in row.kernel else 64):
        if {count.split(":")[0] for count in row.matrix.split()} != {"HGMMA"}:
            found.append(f"{row}: expected warp-group products (HGMMA) only, got {row.matrix or 'none'}")
    if row.width in (32, 64) and not (f"{WIDE}:" in row.loads and f"{WIDE}:" in row.stores):
        found.append(f"{row}: expected {WIDE}-bit loads and stores, got loads {row.loads} and stores {row.stores}")
    return found


def regressions(rows: Iterable[Row], committed: Iterable[Row], complete: bool = True) -> list[str]:
    """What became worse since the committed table, use by use: a specialisation may come and go, its use stays.

    Only cells that have rows on both sides are compared; uses may be missing in rows that are not `complete`.
    """
    now, before = by_use(rows), by_use(committed)
    found: dict[str, None] = {}  # a set in order: several uses of one row say the same
    for key in now:
        if key in before:
            found.update((f"{now[key][0]}: {text}", None) for text in worse(now[key], before[key]))
    cells = {key[0] for key in now} & {key[0] for key in before}
    vanished, appeared = (
        [key for key in some if key not in others and key[0] in cells] for some, others in ((before, now), (now, before))
    )
    new = launched(appeared, "launches, new to the table,")
    return list(found) + (launched(vanished, "no longer launches") + new if complete else [])


def by_use(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    """(cell, kernel, op and direction, slots) -> its rows."""
    found = defaultdict(list)
    for row in rows:
        for use in row.uses.split("; "):
            op, direction, *slots = use.split(" ")
            for count in slots[0].split(",") if slots else [""]:
                found[row.cell, row.kernel, f"{op} {direction}", count].append(row)
    return found


def worse(now: list[Row], old: list[Row]) -> list[str]:
    """What became worse in the rows of one use."""
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
    """One line for a use and a kernel, however many cells it concerns."""
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
    """HMMA, of one warp, is what a product falls back to from HGMMA and UTCHMMA; tf32 has half the speed of 16 bits.

    On AMD float32 operands have an eighth of it.
    """
    return not kind.startswith("HMMA"), not kind.endswith((".TF32", "_f32"))


def wide_share(rows: Iterable[Row], name: str) -> float:
    """Of the bytes that one execution of each access moves, the share in wide accesses."""
    moved = [(int(bits), int(bits) * count) for row in rows for bits, count in parse_counts(getattr(row, name)).items()]
    total = sum(size for _, size in moved)
    return sum(size for bits, size in moved if bits >= WIDE) / total if total else 0.0


# The file


def write_table(path: Path, rows: Iterable[Row]) -> None:
    write_csv(path, map(asdict, sorted(rows, key=order)))


def order(row: Row) -> tuple:
    """As architectures and dtypes are listed; Triton 3.6.0 before 3.10.0."""
    version = [int(each) for each in re.findall(r"\d+", row.triton)]
    return version, list(TARGETS).index(row.arch), list(DTYPES).index(row.dtype), row.width, row


def show_table(rows: list[Row]) -> None:
    """Without the version of Triton, which is the same in all rows of a run."""
    print_table([each.name for each in fields(Row)[1:]], (map(str, astuple(row)[1:]) for row in rows))
