"""Record the kernel launches of a call without compiling kernels.

Each recorded launch includes a hash of everything that determines the kernel's machine code.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.driver import driver
from triton.runtime.interpreter import InterpretedFunction

from .. import conditions
from ..commands import DTYPES
from ..primitives.registry import operators
from ..testing import SPECS, Case, OpSpec, draw
from .offline import driver_of
from .sources import kernel_hash, short_hash

BATCH, HEADS, TOKENS = 2, 4, 1024
# Cases A (width 32) and B (width 64) of the budgets in budgets.py: a batch of images, and a few long sequences.
LARGE = {
    32: Case("", batch=128, heads=4, tokens=1024, width=32, features=110),
    64: Case("", batch=4, heads=8, tokens=4096, width=64, features=256),
}
NO_KERNEL = re.compile("empty|_unsafe_view")  # allocations, and a view that is not marked as a view


@dataclass
class Launch:
    """One launch of a kernel.

    Attributes:
        kernel: name of the kernel.
        key: hash of everything that determines the machine code. Launches with equal keys run the same code.
        source: hash of the code of the kernel, and of the device functions and constants that the kernel uses.
        grid: number of programs in each dimension.
        scalars: maps the names of the integer arguments to their values.
        constexprs: maps the names of the integer constexprs to their values.
        bytes: total size of the distinct tensors among the arguments. Expanded dimensions count as size 1.
        elements: number of elements of the largest of these tensors.
        heads: batch size times number of heads, or 1 if no argument has at least four dimensions.
        compile: function that compiles the kernel and returns Triton's CompiledKernel.
    """

    kernel: str
    key: str
    source: str
    grid: tuple[int, ...]
    scalars: dict[str, int]
    constexprs: dict[str, int]
    bytes: int
    elements: int
    heads: int
    compile: Callable[[], Any] = field(repr=False)

    @property
    def programs(self) -> int:
        return prod(self.grid)

    @property
    def pairs(self) -> int:
        """Number of (token, slot) pairs in all samples and heads, or 0 if the kernel has no arguments N and M."""
        return self.heads * self.scalars.get("N", 0) * self.scalars.get("M", 0)


@contextmanager
def observed(arch: str) -> Iterator[list[Launch]]:
    """Yield a list that collects the kernel launches of the `with` block. The kernels are neither compiled nor run."""
    launches: list[Launch] = []

    def observe(kernel: Any, grid: tuple[int, ...], args: tuple, meta: dict[str, Any]) -> None:
        if isinstance(kernel, InterpretedFunction):
            raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET before importing triton")
        launches.append(describe(arch, kernel, grid, args, meta))

    with driver_of(arch), conditions.under(observer=observe):
        yield launches


def describe(arch: str, kernel: Any, grid: tuple[int, ...], args: tuple, meta: dict[str, Any]) -> Launch:
    *_, bind = kernel.device_caches[driver.active.get_current_device()]
    values, specialization, options = bind(*args, **meta)
    source = kernel_hash(kernel)
    text = " ".join(map(str, (arch, triton.__version__, source, specialization, sorted(options.items()))))
    tensors = {id(x): x for x in values.values() if isinstance(x, Tensor)}
    numbers = {name: value for name, value in values.items() if isinstance(value, int)}
    constexprs = {param.name for param in kernel.params if param.is_constexpr}

    def compiled() -> Any:
        with driver_of(arch):
            return kernel.warmup(*args, grid=grid, **meta)

    return Launch(
        kernel.__name__,
        short_hash(text),
        source,
        grid,
        {name: int(value) for name, value in numbers.items() if name not in constexprs},
        {name: int(value) for name, value in numbers.items() if name in constexprs},
        sum(stored(x) for x in tensors.values()),
        max((x.numel() for x in tensors.values()), default=0),
        max((prod(x.shape[:2]) for x in tensors.values() if x.dim() >= 4), default=1),
        compiled,
    )


def stored(x: Tensor) -> int:
    """Return how many bytes a launch transfers if it reads or writes `x` once. Expanded dimensions count as size 1."""
    sizes = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return x.element_size() * prod(sizes)


class OnMeta(TorchDispatchMode):
    """Calls the implementation of each operator of this library on meta tensors, instead of its fake kernel.

    `launches` counts the kernels that PyTorch itself would launch on a GPU. Allocations and views launch none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function.namespace == "vix_kernels":
            with self:  # PyTorch's kernels inside an operator also count
                return operators[function._schema.name.split("::")[1]].implementation(*args)
        if not function.is_view and not NO_KERNEL.search(function._schema.name):
            self.launches += 1
        return function(*args, **(kwargs or {}))


# Calls


@dataclass(frozen=True)
class Use:
    """The forward or backward pass of an operator in the compile report.

    `op` is the operator with its variant, `direction` is "forward" or "backward", and `slots` is the number of slots.
    """

    op: str
    direction: str
    slots: int

    def __str__(self) -> str:
        return f"{self.op} {self.direction}"


def calls(spec: OpSpec, width: int, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    """Yield (name, case) for each call that the compile report makes to the operator described by `spec`."""
    cases = list(spec.compiled + spec.variants)
    for case in spec.compiled[:1]:
        if any(each.masked for each in spec.cases):
            cases.append(replace(case, name=f"{case.name}+mask", masked=True))
        if spec.attends and any(each.rope == "half" for each in spec.cases):
            cases.append(replace(case, name=f"{case.name}+halves", rope="half"))
    name = spec.name.removesuffix("_attention")
    for case in cases:
        yield name + case.name, replace(case, batch=BATCH, heads=HEADS, tokens=TOKENS, width=width)
    if dtype.itemsize == 2 and width in LARGE:
        large = LARGE[width]
        for case in cases:
            features = large.features if spec.name == "performer_attention" and not case.learned else case.features
            if name in ("performer", "linear", "linear_attention_projected") and not case.masked:
                sizes = dict(batch=large.batch, heads=large.heads, tokens=large.tokens, width=width, features=features)
                yield name + case.name, replace(case, **sizes)


def observe_call(spec: OpSpec, case: Case, dtype: torch.dtype, arch: str) -> Iterator[tuple[str, list[Launch], int]]:
    """Yield (direction, launches by this library, number of launches by PyTorch) for "forward" and "backward"."""
    problem = draw(spec, case, dtype, "meta")
    outputs: Any = ()
    for direction in ("forward", "backward"):
        with observed(arch) as launches, OnMeta() as torch_kernels:
            if direction == "forward":
                outputs = problem(backend="triton")
            else:
                problem.gradients(outputs)
        yield direction, launches, torch_kernels.launches


@dataclass
class Cell:
    """The launches of all calls for one architecture, dtype and head width."""

    launches: dict[str, list[Launch]] = field(default_factory=lambda: defaultdict(list))  # by key
    uses: dict[str, list[Use]] = field(default_factory=lambda: defaultdict(list))  # passes that launch the kernel, by key
    # Maps "op direction" to the number of launches by this library and the number of launches by PyTorch. If several calls have
    # the same op and direction, the call with the most launches by this library is used.
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


def observe_cell(arch: str, dtype: str, width: int, ops: tuple[str, ...]) -> Cell:
    """Return the launches of all calls to `ops` for this architecture, dtype and head width. No kernel is compiled."""
    cell = Cell()
    for spec in (SPECS[op] for op in ops):
        for name, case in calls(spec, width, DTYPES[dtype]):
            try:
                for direction, launches, others in observe_call(spec, case, DTYPES[dtype], arch):
                    use = Use(name, direction, case.features)
                    if not launches and not others:
                        cell.errors.append(f"{arch} {dtype} width {width}, {use}: no kernel was launched")
                    counts = len(launches), others
                    cell.counts[str(use)] = max(cell.counts.get(str(use), counts), counts)
                    for each in launches:
                        cell.launches[each.key].append(each)
                        if use not in cell.uses[each.key]:
                            cell.uses[each.key].append(use)
            except Exception as error:  # an error in one call must not hide errors in the others
                cell.errors.append(f"{arch} {dtype} width {width}, {name}: {brief(error)}")
    return cell


def brief(error: Exception) -> str:
    while error.__cause__ is not None:  # Triton wraps the original error in errors that quote the kernel's source
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1].strip()}"
