"""The GPUs that kernels can be compiled for, and how much of a kernel one of their multiprocessors holds.

A multiprocessor is an SM, or a compute unit on AMD, whose wavefronts are called warps here.
"""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

# Both vendors divide a multiprocessor's registers into four parts. A lane has 512 of each (on AMD architectural and
# accumulation registers together), which warps take by eights.
PARTS, PART_REGISTERS, REGISTER_UNIT = 4, 512, 8
TENSOR_MEMORY = 512  # columns of a multiprocessor, sm_100


@dataclass(frozen=True)
class Target:
    gpu: GPUTarget
    multiprocessors: int  # of the full GPU: A100, RTX 3090, RTX 4090, H100, B200, RTX 5090, MI210, MI300X, MI355X
    warps: int  # that a multiprocessor holds at most
    blocks: int
    shared_memory_total: int  # bytes of a multiprocessor
    shared_memory_unit: int  # bytes, what a block takes is a multiple of
    shared_memory_reserved: int  # bytes a block, for the system

    @property
    def shared_memory(self) -> int:
        """Bytes that one block may ask for."""
        return self.shared_memory_total - self.shared_memory_reserved

    def occupancy(self, warps: int, registers: int, shared: int, tensor_memory: int = 0) -> int:
        """Warps that a multiprocessor holds of a kernel, in per cent of the most that it can hold.

        A block of the kernel has `warps` warps, of `registers` registers a thread, `shared` bytes of shared memory and
        `tensor_memory` columns.
        """
        held = PARTS * (PART_REGISTERS // round_up(registers, REGISTER_UNIT))
        taken = round_up(shared + self.shared_memory_reserved, self.shared_memory_unit)
        blocks = min(self.warps // warps, self.blocks, held // warps, self.shared_memory_total // taken)
        if tensor_memory:
            blocks = min(blocks, TENSOR_MEMORY // tensor_memory)
        return 100 * blocks * warps // self.warps


def round_up(amount: int, unit: int) -> int:
    """The least multiple of `unit`, at least one, that holds `amount`."""
    return max(1, -(-amount // unit)) * unit


def nvidia(arch: int, *, multiprocessors: int, warps: int, blocks: int, shared_memory: int) -> Target:
    return Target(GPUTarget("cuda", arch, 32), multiprocessors, warps, blocks, shared_memory * 1024, 128, 1024)


def amd(arch: str, *, multiprocessors: int, shared_memory: int, unit: int) -> Target:
    """Eight wavefronts on each of four SIMDs; sixteen workgroups of several, for that many barriers."""
    return Target(GPUTarget("hip", arch, 64), multiprocessors, 32, 16, shared_memory * 1024, unit, 0)


# Shared memory in KiB of a multiprocessor.
# NVIDIA: CUDA Programming Guide, "Compute Capabilities", tables 30 and 31; what is reserved: cuda::arch_traits of CCCL;
# units: CUDA's occupancy calculator.
# AMD: ROCm, "AMD GPU specifications"; registers, wavefronts, units and barriers: AMDGPUBaseInfo.cpp of LLVM.
TARGETS = {
    "sm_80": nvidia(80, multiprocessors=108, warps=64, blocks=32, shared_memory=164),
    "sm_86": nvidia(86, multiprocessors=82, warps=48, blocks=16, shared_memory=100),
    "sm_89": nvidia(89, multiprocessors=128, warps=48, blocks=24, shared_memory=100),
    "sm_90": nvidia(90, multiprocessors=132, warps=64, blocks=32, shared_memory=228),
    "sm_100": nvidia(100, multiprocessors=148, warps=64, blocks=32, shared_memory=228),
    "sm_120": nvidia(120, multiprocessors=170, warps=48, blocks=24, shared_memory=100),
    "gfx90a": amd("gfx90a", multiprocessors=104, shared_memory=64, unit=512),
    "gfx942": amd("gfx942", multiprocessors=304, shared_memory=64, unit=512),
    "gfx950": amd("gfx950", multiprocessors=256, shared_memory=160, unit=1280),
}
