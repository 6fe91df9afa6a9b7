"""The table of the compile report: one row per specialization, the limits it must meet, and its regressions.

Every change is compared with the committed table, and reviewers read the diff of the table. It may hold rows of several Triton
versions; a run is compared with the rows of the same version.
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
KEPT_WIDE = 0.9  # least fraction of the committed share of wide accesses; scheduling changes it a little


@dataclass(frozen=True, order=True)
class Row:
    """One specialization. Counts are text of the form "kind:count kind:count"."""

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
    loads: str  # bits per thread : instructions
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
    """Return the kernels whose code or tiles have changed since the rows were compiled."""
    return sorted({f"{row.kernel} {row.arch}" for row in rows if row.source != source_hash(row.kernel, row.arch)})


def violations(rows: Iterable[Row]) -> list[str]:
    """Return what would be slow or would not launch at all, independent of the committed table."""
    found = []
    for row in rows:
        limit = TARGETS[row.arch].shared_memory
        if row.shared > limit:
            found.append(f"{row}: {row.shared} bytes of shared memory, {row.arch} has {limit}")
        if row.tensor_memory > TENSOR_MEMORY:
            found.append(f"{row}: {row.tensor_memory} columns of tensor memory, {row.arch} has {TENSOR_MEMORY}")
        if row.arch.startswith("sm_"):  # AMD is checked for regressions only
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
    """Return what became worse than in the committed table, by use: specializations may change, their uses stay.

    Only cells with rows in both tables are compared. If `complete` is False, uses may be missing.
    """
    now, before = by_use(rows), by_use(committed)
    found: dict[str, None] = {}  # an ordered set: several uses of one row give the same text
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
    """Return (cell, kernel, op and direction, slots) -> its rows."""
    found = defaultdict(list)
    for row in rows:
        for use in row.uses.split("; "):
            op, direction, *slots = use.split(" ")
            for count in slots[0].split(",") if slots else [""]:
                found[row.cell, row.kernel, f"{op} {direction}", count].append(row)
    return found


def worse(now: list[Row], old: list[Row]) -> list[str]:
    """Return what became worse in the rows of one use."""
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
    """Return one line per use and kernel, which names the first cell and counts the others."""
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
    """Rank a matrix instruction by its speed.

    HMMA, of one warp, is the fallback from HGMMA and UTCHMMA. TF32 has half the rate of 16-bit operands. On AMD, float32
    operands have an eighth of it.
    """
    return not kind.startswith("HMMA"), not kind.endswith((".TF32", "_f32"))


def wide_share(rows: Iterable[Row], name: str) -> float:
    """Return the fraction of bytes in wide accesses, if every access executes once."""
    moved = [(int(bits), int(bits) * count) for row in rows for bits, count in parse_counts(getattr(row, name)).items()]
    total = sum(size for _, size in moved)
    return sum(size for bits, size in moved if bits >= WIDE) / total if total else 0.0


# The file


def write_table(path: Path, rows: Iterable[Row]) -> None:
    write_csv(path, map(asdict, sorted(rows, key=order)))


def order(row: Row) -> tuple:
    """Sort key: Triton version (3.6.0 before 3.10.0), then architecture and dtype as listed, then width."""
    version = [int(each) for each in re.findall(r"\d+", row.triton)]
    return version, list(TARGETS).index(row.arch), list(DTYPES).index(row.dtype), row.width, row


def show_table(rows: list[Row]) -> None:
    """Print the rows without the Triton version, which is the same in all rows of a run."""
    print_table([each.name for each in fields(Row)[1:]], (map(str, astuple(row)[1:]) for row in rows))
