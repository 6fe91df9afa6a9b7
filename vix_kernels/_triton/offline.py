"""Compile launches for GPUs that are not there, and read what they would use out of the machine code.

    from vix_kernels._triton import offline
    from vix_kernels._triton.launch import launch

    x = torch.empty(8, 1024, 64, dtype=torch.bfloat16, device="meta")
    with offline.target("sm_90") as launches:
        launch(kernel, (8, 16), x, x, x.stride(0), BLOCK_N=64, num_warps=4, num_stages=2)
    for each in launches:  # filled when the block ends, one entry a specialisation
        print(each)

Inside the block the library compiles instead of launching: a public call, made with CPU tensors, compiles what it
would have launched, with the true signature, alignment and constexprs. Nothing is computed: outputs hold whatever
their memory held. `launch` itself takes meta tensors as well (aligned storage; the offset of a view is honoured).
Triton's active driver reports the target. TRITON_INTERPRET must not be set when triton is imported.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.interpreter import InterpretedFunction

from . import launch as door


@dataclass(frozen=True)
class Target:
    gpu: GPUTarget
    shared_memory: int  # bytes that one block may have


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 166_912),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 101_376),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 101_376),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 232_448),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 232_448),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 101_376),
}
TENSOR_MEMORY = 512  # columns that one block may have, sm_100


@dataclass(frozen=True)
class Resources:
    """What one kernel uses, from its machine code."""

    registers: int  # a thread
    spilled: int  # bytes of stack a thread
    matrix: dict[str, int] = field(default_factory=dict)  # instruction -> how many
    loads: dict[int, int] = field(default_factory=dict)  # bits a thread -> how many, from global memory
    stores: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CompiledLaunch:
    """One specialisation of a kernel, and how often it was launched."""

    kernel: str
    target: str
    signature: dict[str, str]  # run-time arguments; "*bf16:16" is aligned to 16 bytes, "i32:16" divisible by 16
    constexprs: dict[str, Any]
    warps: int
    stages: int
    shared: int  # bytes a block
    tensor_memory: int  # columns a block, sm_100
    resources: Resources
    launches: int
    key: str  # equal for equal specialisations

    def __str__(self) -> str:
        used, blocks = self.resources, " ".join(f"{k}={v}" for k, v in self.constexprs.items())
        counts = " ".join(f"{kind} x{count}" for kind, count in used.matrix.items()) or "no matrix instruction"
        accesses = ", ".join(
            f"{name} " + (" ".join(f"{bits}b x{count}" for bits, count in kinds.items()) or "none")
            for name, kinds in (("loads", used.loads), ("stores", used.stores))
        )
        return (
            f"{self.kernel} {self.target} warps={self.warps} stages={self.stages} {blocks}\n"
            f"    {used.registers} registers, {used.spilled} bytes spilled, {self.shared} bytes shared, {counts}, "
            f"{accesses}, launched {self.launches}x"
        )


class Driver:
    """Stands in for Triton's active driver; enough of it to compile, not to run."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> GPUTarget:
        # Triton keys its in-process cache by this: one entry a target, not one for all of them.
        return self.target

    def get_current_stream(self, device: GPUTarget) -> int:
        return 0


@contextmanager
def target(name: str) -> Iterator[list[CompiledLaunch]]:
    """Compile for `name` every launch made inside the block; the list yielded is filled when the block ends."""
    launches: list[CompiledLaunch] = []
    with capture(name) as binaries:
        yield launches
    launches += describe(name, binaries)


def compile_launches(name: str, function: Callable[[], Any]) -> list[CompiledLaunch]:
    """The launches that function() makes, compiled for the target `name`."""
    with target(name) as launches:
        function()
    return launches


@contextmanager
def capture(name: str) -> Iterator[list[Any]]:
    """What Triton makes of each launch inside the block, one entry a launch; `describe` reads them all at once."""
    if name not in TARGETS:
        raise ValueError(f"target: expected one of {', '.join(TARGETS)}, got {name!r}")
    binaries: list[Any] = []

    def observe(kernel: Any, grid: tuple[int, ...], args: tuple, meta: dict[str, Any]) -> None:
        if isinstance(kernel, InterpretedFunction):
            raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET before importing triton")
        binaries.append(kernel.warmup(*args, grid=grid, **meta))

    observer, active = door.observer, driver._active
    door.observer = observe
    driver.set_active(Driver(TARGETS[name].gpu))
    try:
        yield binaries
    finally:
        door.observer = observer
        # Not reset_active(): it would look for a real driver, and raise where there is none.
        driver.set_active(active)


def describe(name: str, binaries: Iterable[Any]) -> list[CompiledLaunch]:
    """Each distinct binary of a capture for the target `name`, in the order of its first launch."""
    counts = Counter(each.hash for each in binaries)
    distinct = list({each.hash: each for each in binaries}.values())
    launches = []
    for binary, resources in zip(distinct, read_cubins(name, [each.asm["cubin"] for each in distinct]), strict=True):
        signature, constexprs = arguments(binary.src)
        launches.append(
            CompiledLaunch(
                kernel=binary.name,
                target=name,
                signature=signature,
                constexprs=constexprs,
                warps=binary.metadata.num_warps,
                stages=binary.metadata.num_stages,
                shared=binary.metadata.shared,
                tensor_memory=getattr(binary.metadata, "tmem_size", 0) or 0,
                resources=resources,
                launches=counts[binary.hash],
                key=binary.hash,
            )
        )
    return launches


def arguments(source: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """The run-time arguments with their types, and the constexprs with their values, of a specialisation."""
    declared = {param.name for param in source.fn.params if param.is_constexpr}
    names = list(source.signature)
    constants = {names[path[0]]: value for path, value in source.constants.items()}
    signature = {}
    for at, (name, kind) in enumerate(source.signature.items()):
        if name in declared:
            continue
        aligned = ["tt.divisibility", 16] in source.attrs.get((at,), [])
        # Triton turns None, and 1 where it specialises, into constants.
        signature[name] = str(constants[name]) if name in constants else kind + ":16" * aligned
    return signature, {name: value for name, value in constants.items() if name in declared}


INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
MATRIX = re.compile(r"(?:UTC)?[A-Z]{1,2}MMA")  # HMMA, IMMA, DMMA; HGMMA (sm_90); UTCHMMA (sm_100)
LOADS = {"LDG", "LDGSTS", "UTMALDG", "UBLKCP"}
STORES = {"STG", "UTMASTG"}


def read_cubins(name: str, cubins: list[bytes]) -> list[Resources]:
    """What each cubin uses, by the tools of the Triton wheel.

    The disassembler takes a quarter of a second to start, so it gets the code of all kernels as one piece.
    """
    codes = [machine_code(each) for each in cubins]
    arch = TARGETS[name].gpu.arch
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "code")
        usages = []
        for cubin in cubins:
            path.write_bytes(cubin)
            usages.append(run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path))
        path.write_bytes(b"".join(codes))
        sass = run(knobs.nvidia.nvdisasm.path, "--binary", f"SM{arch}{'a' * (arch >= 90)}", path) if cubins else ""
    instructions = iter(INSTRUCTION.findall(sass))
    instruction = next(instructions, None)
    result, end = [], 0
    for code, usage in zip(codes, usages, strict=True):
        end += len(code)
        opcodes = []
        while instruction is not None and int(instruction[0], 16) < end:
            opcodes.append(instruction[1])
            instruction = next(instructions, None)
        result.append(count(opcodes, dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))))
    return result


def machine_code(cubin: bytes) -> bytes:
    """The .text sections of a cubin, an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, sections, names = struct.unpack_from("<3H", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + at * size) for at in range(sections)]
    start = headers[names][4]
    return b"".join(
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in headers
        if cubin.startswith(b".text.", start + name)
    )


def count(opcodes: Iterable[str], usage: dict[str, str]) -> Resources:
    matrix: Counter[str] = Counter()
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for opcode in opcodes:
        kind, *modifiers = opcode.split(".")
        if MATRIX.fullmatch(kind):
            matrix[kind + ".TF32" * ("TF32" in modifiers)] += 1
        elif kind in LOADS:
            loads[access_bits(kind, modifiers)] += 1
        elif kind in STORES:
            stores[access_bits(kind, modifiers)] += 1
    return Resources(
        registers=int(usage["REG"]),
        spilled=int(usage["STACK"]) + int(usage["LOCAL"]),
        matrix=dict(sorted(matrix.items())),
        loads=dict(sorted(loads.items())),
        stores=dict(sorted(stores.items())),
    )


def access_bits(kind: str, modifiers: list[str]) -> int:
    if kind.startswith("U"):  # the copy engine moves whole tiles, at least as wide as the widest load
        return 128
    widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return next((widths[each] for each in modifiers if each in widths), 32)


def run(tool: str, *arguments: str | Path) -> str:
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout
