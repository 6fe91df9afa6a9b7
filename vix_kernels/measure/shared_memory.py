"""The committed table of the shared memory that each entry of the launch table needs.

`vix dev compile-report --shared` checks the table (shared_memory.csv). Triton allocates shared memory before it generates
machine code. Each compilation stops after the allocation, so it takes a third of the time of a full compilation. Every entry
can therefore be measured in all its variants: RoPE in both layouts, random features with gradients, landmarks, masks, and the
residual convolution. A row contains the maximum over the variants.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby, product
from operator import attrgetter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from .. import conditions
from .._triton import launch_table
from .._triton.launch import kernel_name
from .._triton.targets import TARGETS
from ..testing import SPECS, Case, Problem, draw
from . import offline
from .sources import code_hash, table_name
from .tune import DTYPES, lookups

COMMITTED = Path(__file__).with_name("shared_memory.csv")
BATCH, HEADS, TOKENS = 2, 4, 1024
SIZE = attrgetter("bits", "width")
# Maps an architecture to the one that is measured instead. Triton chooses the same layouts and pipelines for both.
GENERATION = {"sm_80": "sm_86", "sm_89": "sm_86"}


@dataclass(frozen=True, order=True)
class Row:
    """The largest number of bytes of shared memory that an entry of the launch table needs on one generation of GPUs.

    `tile` contains the fields of a Tile as text. `source` is the hash of the kernel and the functions it calls.
    """

    triton: str
    generation: str
    kernel: str
    bits: int
    width: int
    tile: str
    source: str
    shared: int

    @property
    def entry(self) -> Row:
        """A copy of this row with `triton` and `shared` left blank. It identifies the entry that was measured."""
        return replace(self, triton="", shared=0)


def entries(arch: str) -> set[Row]:
    """Return all entries that a launch on `arch` can look up, with `triton` and `shared` left blank."""
    generation = GENERATION.get(arch, arch)
    return {
        Row("", generation, *key, " ".join(map(str, tile)), code_hash(key[0]), 0)
        for key, tile in launch_table.entries(arch).items()
    }


def missing(rows: Iterable[Row], arch: str) -> list[Row]:
    """Return the launch table entries of `arch` that lack a row for at least one Triton version in `rows`."""
    measured = {(row.triton, row.entry) for row in rows}
    versions = {version for version, _ in measured} or {triton.__version__}
    return sorted(entry for entry in entries(arch) if any((version, entry) not in measured for version in versions))


def excesses(rows: Iterable[Row], arch: str) -> list[str]:
    """Return a message for each row that applies to `arch` and needs more shared memory than `arch` has."""
    served, limit = entries(arch), TARGETS[arch].shared_memory
    return [
        f"{row.kernel} {row.bits} bits width {row.width} with tile {row.tile}: {row.shared} bytes of shared memory by Triton "
        f"{row.triton}, {arch} has {limit}"
        for row in sorted(rows)
        if row.shared > limit and row.entry in served
    ]


# Compilation


def problems(bits: int, width: int) -> Iterator[Problem]:
    """Yield problems whose forward and backward passes launch every kernel in all variants.

    For some kernels, the launch table has separate entries for gradients of slots (such as random features), for many slots,
    and for float16. The problems also cover these entries.
    """
    variants = dict(), dict(rope="half", masked=True, feature_map="elu"), dict(rope="interleaved")
    case = Case("", BATCH, HEADS, TOKENS, width=width, features=min(width, 128), taps=33, learned=True)
    for spec, options in product(SPECS.values(), variants):
        yield draw(spec, spec.fit(replace(case, **options)), DTYPES[bits], "cpu")
        if bits == 16 and "linear" in spec.name:
            yield draw(spec, spec.fit(replace(case, **options)), torch.float16, "cpu")
    for name, features, options in product(("performer_attention", "linformer_attention"), (128, 256), variants):
        spec = SPECS[name]
        yield draw(spec, spec.fit(replace(case, features=features, learned=False, **options)), DTYPES[bits], "cpu")


class Allocated(Exception):
    """Raised to stop a compilation. The exception's argument is the number of bytes of shared memory that were allocated."""


@contextmanager
def allocation_only() -> Iterator[None]:
    """Inside the `with` block, the compilation of a kernel raises Allocated instead of generating machine code."""
    from triton._C.libtriton import ir, nvidia, passes
    from triton.backends.amd.compiler import HIPBackend
    from triton.backends.nvidia.compiler import CUDABackend, get_ptx_version_from_options

    def cuda(self: Any, module: Any, metadata: dict, options: Any, capability: int) -> None:
        version = get_ptx_version_from_options(options, self.target.arch)
        manager = ir.pass_manager(module.context)
        passes.convert.add_scf_to_cf(manager)
        passes.gluon.add_inliner(manager)
        nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, capability, version)
        manager.run(module, "allocate_shared_memory")
        raise Allocated(module.get_int_attr("ttg.shared"))

    # On AMD, the step after the allocation is replaced, because the passes before the allocation depend on the Triton version.
    def hip(module: Any, metadata: dict, options: Any) -> None:
        raise Allocated(metadata["shared"])

    with (
        patch.object(CUDABackend, "make_llir", cuda),
        patch.object(HIPBackend, "make_amdgcn", staticmethod(hip)),
        patch.object(
            triton.knobs.compilation, "always_compile", True
        ),  # Triton would not allocate shared memory for a kernel in its cache
    ):
        yield


def measure(arch: str, bits: int, width: int, wanted: Iterable[Row]) -> list[Row]:
    """Measure how much shared memory the entries in `wanted` need, and return their rows.

    All entries must have these `bits` and `width`. Entries that no launch uses are omitted.
    """
    by_key = {(each.kernel, each.bits, each.width): each for each in wanted}
    most: dict[Row, int] = {}
    seen = set()

    def observe(kernel: Any, grid: tuple[int, ...], args: tuple, meta: dict[str, Any]) -> None:
        name = table_name(kernel.__name__)
        key = next((each for each in reversed(asked) if kernel_name(each[0]) == name), None)
        entry = by_key.get(key)
        dtypes = tuple(str(each.dtype) for each in args if isinstance(each, Tensor))
        variant = entry, kernel.__name__, dtypes, tuple(sorted((name, str(value)) for name, value in meta.items()))
        if entry is None or variant in seen:
            return
        seen.add(variant)
        try:
            kernel.warmup(*args, grid=grid, **meta)
        except Allocated as allocated:
            most[entry] = max(most.get(entry, 0), allocated.args[0])

    with offline.capture(arch), allocation_only(), lookups() as asked, conditions.under(observer=observe):
        for problem in problems(bits, width):
            problem.gradients(problem(backend="triton"))
    return [replace(entry, triton=triton.__version__, shared=shared) for entry, shared in most.items()]


def cells(wanted: Iterable[Row], arch: str) -> Iterator[tuple[str, int, int, list[Row]]]:
    """Group `wanted` by bits and width, and yield the arguments of `measure` for each group."""
    for size, group in groupby(sorted(wanted, key=SIZE), SIZE):
        yield arch, *size, list(group)
