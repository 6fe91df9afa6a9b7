"""Determine the resource usage of compiled kernels, from cubins on NVIDIA and from assembly code on AMD."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from triton import knobs
from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Resources:
    """Resources that one kernel uses."""

    registers: int  # per thread; on AMD, the sum of architectural and accumulation registers
    spilled: int  # bytes per thread of stack and local memory, or (on AMD) of the private segment
    matrix: dict[str, int] = field(default_factory=dict)  # instruction with its shape, such as HGMMA.64x32x16 -> count
    loads: dict[int, int] = field(default_factory=dict)  # loads from global memory: bits per thread -> number of instructions
    stores: dict[int, int] = field(default_factory=dict)  # stores to global memory: bits per thread -> number of instructions
    code: list[Instruction] = field(default_factory=list, repr=False, compare=False)  # the whole program; empty on AMD


def read(gpu: GPUTarget, kernels: Iterable[Mapping[str, str | bytes]]) -> list[Resources]:
    """Return the resource usage of each kernel. `kernels` are the `asm` attributes of Triton's CompiledKernel objects."""
    if gpu.backend == "cuda":
        return read_cubins(gpu.arch, [each["cubin"] for each in kernels])
    return [read_amdgcn(each["amdgcn"]) for each in kernels]


# NVIDIA

INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)([^;\n]*)", re.MULTILINE)
MATRIX = re.compile(r"(?:UTC)?[A-Z]{1,2}MMA")  # HMMA, IMMA, DMMA; HGMMA (sm_90); UTCHMMA (sm_100)
LOADS = {"LDG", "LDGSTS", "UTMALDG", "UBLKCP"}
STORES = {"STG", "UTMASTG"}


class Instruction(NamedTuple):
    """An instruction of NVIDIA machine code (SASS). `target` is the address to which a branch jumps, or None."""

    address: int
    guard: str  # the predicate that must be true, such as "@!P0", or ""
    opcode: str  # with modifiers, such as "LDG.E.128"
    target: int | None = None

    @property
    def kind(self) -> str:
        return self.opcode.partition(".")[0]


def disassemble(arch: int, cubins: Iterable[bytes]) -> list[list[Instruction]]:
    """Return the instructions of each cubin.

    The disassembler takes 0.25 s to start, so it runs once on the concatenated code of all kernels.
    """
    codes = [machine_code(each) for each in cubins]
    if not codes:
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "code")
        path.write_bytes(b"".join(codes))
        sass = run(knobs.nvidia.nvdisasm.path, "--binary", f"SM{arch}{'a' * (arch >= 90)}", path)
    instructions = [parse(*groups) for groups in INSTRUCTION.findall(sass)]
    starts = [bisect_left(instructions, (end,)) for end in accumulate(map(len, codes), initial=0)]
    return [instructions[start:end] for start, end in pairwise(starts)]


def parse(address: str, guard: str, opcode: str, rest: str) -> Instruction:
    # ptxas also emits branches as calls that never return. Such a call has a guard, unlike a call to a subroutine.
    branches = opcode.startswith("BRA") or (opcode == "CALL.REL.NOINC" and guard)
    target = re.search(r"0x([0-9a-f]+)\s*$", rest) if branches else None
    return Instruction(int(address, 16), guard.strip(), opcode, int(target[1], 16) if target else None)


def read_cubins(arch: int, cubins: list[bytes]) -> list[Resources]:
    """Return the resource usage of each cubin, determined with the NVIDIA tools in the Triton wheel."""
    codes = disassemble(arch, cubins)
    return [count_sass(code, usage(cubin)) for code, cubin in zip(codes, cubins, strict=True)]


def usage(cubin: bytes) -> dict[str, str]:
    """Return the number of registers ("REG") and the bytes of stack ("STACK") and local memory ("LOCAL") of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cubin")
        path.write_bytes(cubin)
        return dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path)))


def machine_code(cubin: bytes) -> bytes:
    """Return the .text sections of a cubin, a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, sections, names = struct.unpack_from("<3H", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + at * size) for at in range(sections)]
    start = headers[names][4]
    return b"".join(
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in headers
        if cubin.startswith(b".text.", start + name)
    )


def run(tool: str, *arguments: str | Path) -> str:
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout


def count_sass(code: list[Instruction], usage: dict[str, str]) -> Resources:
    split = [(kind, modifiers) for kind, *modifiers in (each.opcode.split(".") for each in code)]
    products = (matrix_instruction(*each) for each in split if MATRIX.fullmatch(each[0]))
    loads, stores = ([access_bits(*each) for each in split if each[0] in kinds] for kinds in (LOADS, STORES))
    spilled = int(usage["STACK"]) + int(usage["LOCAL"])
    return Resources(int(usage["REG"]), spilled, count(products), count(loads), count(stores), code)


def matrix_instruction(kind: str, modifiers: list[str]) -> str:
    """Return the opcode of a matrix instruction, without modifiers other than its shape and TF32."""
    return ".".join([kind, *(each for each in modifiers if each[0].isdigit()), *(["TF32"] if "TF32" in modifiers else [])])


def access_bits(kind: str, modifiers: list[str]) -> int:
    if kind.startswith("U"):  # a copy engine moves whole tiles, so its instructions count as wide accesses
        return 128
    widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return next((widths[each] for each in modifiers if each in widths), 32)


# AMD

AMD_USAGE = re.compile(r"^[\s-]+\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", re.MULTILINE)
AMD_MATRIX = re.compile(r"^\s+(v_s?mfma\w+)", re.MULTILINE)
AMD_ACCESS = re.compile(r"^\s+(?:buffer|global|flat)_(load|store)_(?:lds_)?[us]?(byte|short|dword)(?:x(\d))?", re.MULTILINE)
AMD_BITS = {"byte": 8, "short": 16, "dword": 32}


def read_amdgcn(assembly: str) -> Resources:
    usage = dict(AMD_USAGE.findall(assembly))
    accesses = [(kind, AMD_BITS[unit] * int(units or 1)) for kind, unit, units in AMD_ACCESS.findall(assembly)]
    loads, stores = (count(bits for kind, bits in accesses if kind == each) for each in ("load", "store"))
    registers, spilled = (int(usage[name]) for name in ("vgpr_count", "private_segment_fixed_size"))
    return Resources(registers, spilled, count(AMD_MATRIX.findall(assembly)), loads, stores)


def count(kinds: Iterable[Any]) -> dict[Any, int]:
    """Return a dict that maps each kind to the number of its occurrences, sorted by kind."""
    return dict(sorted(Counter(kinds).items()))
