"""Compile kernels for GPUs that are not present, and read their resource usage from the machine code.

    from vix_kernels.measure import offline
    from vix_kernels._triton.launch import launch

    x = torch.empty(8, 1024, 64, dtype=torch.bfloat16, device="meta")
    with offline.target("sm_90") as launches:
        launch(kernel, (8, 16), x, x, x.stride(0), BLOCK_N=64, num_warps=4, num_stages=2)
    for each in launches:  # filled when the block ends, one entry per specialization
        print(each)

Inside the `with` block, kernels are compiled instead of launched. A public function that is called with CPU tensors and
backend="triton" compiles the kernels that it would launch, with the same signature, alignment and constexprs. No kernel runs,
so the outputs are uninitialized. `launch` also accepts meta tensors, whose alignment follows from the storage offset. Triton's
active driver reports the target GPU. TRITON_INTERPRET must not be set when triton is imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from triton.runtime.driver import driver
from triton.runtime.interpreter import InterpretedFunction

from .. import conditions
from .._triton.targets import TARGETS
from . import machine_code
from .machine_code import Resources


@dataclass(frozen=True)
class CompiledLaunch:
    """One specialization of a kernel, and how often it was launched."""

    kernel: str
    target: str
    signature: dict[str, str]  # run-time arguments; "*bf16:16" is aligned to 16 bytes, "i32:16" is divisible by 16
    constexprs: dict[str, Any]
    warps: int
    stages: int
    shared: int  # bytes per block
    tensor_memory: int  # columns per block, on sm_100
    resources: Resources
    launches: int
    key: str  # a hash of the specialization

    @property
    def occupancy(self) -> int:
        """Resident warps of a multiprocessor, as a percentage of the maximum."""
        return TARGETS[self.target].occupancy(self.warps, self.resources.registers, self.shared, self.tensor_memory)

    def __str__(self) -> str:
        used, blocks = self.resources, " ".join(f"{k}={v}" for k, v in self.constexprs.items())
        counts = " ".join(f"{kind} x{count}" for kind, count in used.matrix.items()) or "no matrix instruction"
        accesses = ", ".join(
            f"{name} " + (" ".join(f"{bits}b x{count}" for bits, count in kinds.items()) or "none")
            for name, kinds in (("loads", used.loads), ("stores", used.stores))
        )
        return (
            f"{self.kernel} {self.target} warps={self.warps} stages={self.stages} {blocks}\n"
            f"    {used.registers} registers, {used.spilled} bytes spilled, {self.shared} bytes shared, "
            f"{self.occupancy} % occupancy, {counts}, {accesses}, launched {self.launches}x"
        )


@contextmanager
def driver_of(name: str) -> Iterator[None]:
    """Make Triton's driver report the target `name` inside the `with` block. Kernels can then be compiled, but not run."""
    gpu, active = TARGETS[name].gpu, driver._active
    # Triton's in-process cache is indexed by device, so each target must be a different device.
    answers = dict(get_current_target=lambda: gpu, get_current_device=lambda: gpu, get_current_stream=lambda device: 0)
    driver.set_active(SimpleNamespace(**answers))
    try:
        yield
    finally:
        driver.set_active(active)  # not reset_active(), which raises if there is no real driver


@contextmanager
def target(name: str) -> Iterator[list[CompiledLaunch]]:
    """For the target `name`, compile the kernels that the `with` block launches. The yielded list is filled at the end."""
    launches: list[CompiledLaunch] = []
    with capture(name) as binaries:
        yield launches
    launches += describe(name, binaries)


@contextmanager
def capture(name: str) -> Iterator[list[Any]]:
    """For the target `name`, compile the kernels that the `with` block launches. Yield a list with one kernel per launch."""
    if name not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {name!r}")
    binaries: list[Any] = []

    def observe(kernel: Any, grid: tuple[int, ...], args: tuple, meta: dict[str, Any]) -> None:
        if isinstance(kernel, InterpretedFunction):
            raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET before importing triton")
        binaries.append(kernel.warmup(*args, grid=grid, **meta))

    with driver_of(name), conditions.under(observer=observe):
        yield binaries


def describe(name: str, binaries: Iterable[Any]) -> list[CompiledLaunch]:
    """Return a CompiledLaunch for each distinct binary of the target `name`, in the order of the first launches."""
    counts = Counter(each.hash for each in binaries)
    distinct = list({each.hash: each for each in binaries}.values())
    used = machine_code.read(TARGETS[name].gpu, [each.asm for each in distinct])

    def launch(binary: Any, resources: Resources) -> CompiledLaunch:
        meta, memory = binary.metadata, getattr(binary.metadata, "tmem_size", 0) or 0
        sizes = dict(warps=meta.num_warps, stages=meta.num_stages, shared=meta.shared, tensor_memory=memory)
        found = dict(resources=resources, launches=counts[binary.hash], key=binary.hash)
        return CompiledLaunch(binary.name, name, *arguments(binary.src), **sizes, **found)

    return list(map(launch, distinct, used))


def arguments(source: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """Return two dicts: the types of the run-time arguments of a specialization, and the values of the constexprs."""
    declared = {param.name for param in source.fn.params if param.is_constexpr}
    names = list(source.signature)
    constants = {names[path[0]]: value for path, value in source.constants.items()}
    signature = {}
    for at, (name, kind) in enumerate(source.signature.items()):
        if name in declared:
            continue
        aligned = ["tt.divisibility", 16] in source.attrs.get((at,), [])
        # Triton turns None into a constant. It does the same with 1 if it specializes the argument.
        signature[name] = str(constants[name]) if name in constants else kind + ":16" * aligned
    return signature, {name: value for name, value in constants.items() if name in declared}
