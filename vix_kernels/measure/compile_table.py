"""The table of the compile report: one row per kernel specialization, architecture, dtype and head width.

The table can contain rows for several Triton versions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

from .._triton.targets import TARGETS
from ..commands import DTYPES, figure, print_table, write_csv
from .counting import Section
from .sources import hash_of

HIDDEN = ("triton", "sections", "source", "key")  # columns that are not printed


@dataclass(frozen=True, order=True)
class Row:
    """One kernel specialization. Columns with several counts contain text of the form "kind:count kind:count".

    Attributes:
        blocks: sizes of the tiles.
        programs: number of programs that are resident on a multiprocessor at the same time.
        unit: "logit", "value" or "" (see counting.Analysis). Some columns contain numbers per unit.
        loop: instructions of all lanes in the main loops, per unit.
        whole: instructions of all programs in the largest observed launch, per (token, slot) pair. Slots are, for example,
            landmarks or random features. Padding does not count as tokens or slots. For kernels without main loops or without
            arguments N and M, the number is per element of the largest tensor.
        exps: exponentials in the main loops, per unit.
        waits: instructions in the main loops that wait for matrix products.
        products: number of matrix products in the main loops, counted in TTGIR, Triton's GPU intermediate representation.
        multiply_adds: multiply-adds in the main loops, per unit.
        cycles: cycles for which the main loops occupy each pipe of a multiprocessor, per 1,000 logits or values.
        bound: the pipe with the most cycles.
        matrix: number of matrix instructions of each kind in the kernel's machine code.
        loads, stores: instructions that access global memory, as "bits per thread:number of instructions".
        uses: the calls that launch the kernel, such as "performer forward 110,266; feature forward 110" (numbers of slots).
        sections: see counting.Section.
        source: hash of the code of the kernel (see sources.py).
        key: hash of everything that determines the machine code (see observed.py).
    """

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
    programs: int
    unit: str
    loop: float
    whole: float
    exps: float
    waits: int
    products: int
    multiply_adds: float
    cycles: str
    bound: str
    matrix: str
    loads: str
    stores: str
    uses: str
    sections: str
    source: str = ""
    key: str = ""

    def __str__(self) -> str:
        return f"{self.kernel} {self.where} ({self.blocks}; {self.uses})"

    @property
    def where(self) -> str:
        return f"{self.arch} {self.dtype} width {self.width}"

    @property
    def cell(self) -> tuple[str, str, str, int]:
        return self.triton, self.arch, self.dtype, self.width

    @property
    def resident_warps(self) -> int:
        return self.programs * self.warps

    @property
    def parts(self) -> tuple[Section, ...]:
        return tuple(map(Section.parse, self.sections.split("; "))) if self.sections else ()

    def used_by(self, use: str, slots: int = 0) -> bool:
        """Return whether the call `use`, such as "performer forward", launches the kernel with `slots` slots (0: any)."""
        found = dict(each.rsplit(" ", 1) if each[-1].isdigit() else (each, "0") for each in self.uses.split("; "))
        return use in found and (not slots or str(slots) in found[use].split(","))


def count_text(counts: Mapping[str | int, float]) -> str:
    return " ".join(f"{kind}:{figure(count)}" for kind, count in counts.items())


def parse_counts(text: str) -> dict[str, float]:
    return {kind: float(count) for kind, _, count in (each.partition(":") for each in text.split())}


def outdated(rows: Iterable[Row]) -> list[str]:
    """Return "kernel arch" for each kernel whose code has changed since its row was written, or that no longer exists."""
    return sorted({f"{row.kernel} {row.arch}" for row in rows if not is_current(row)})


def is_current(row: Row) -> bool:
    try:
        return row.source == hash_of(row.kernel)
    except KeyError:
        return False


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
    """Print the rows without the columns in HIDDEN."""
    shown = [at for at, each in enumerate(fields(Row)) if each.name not in HIDDEN]
    names = [each.name for each in fields(Row)]
    print_table([names[at] for at in shown], ([figure(astuple(row)[at]) for at in shown] for row in rows))
