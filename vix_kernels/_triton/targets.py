"""GPUs for which kernels can be compiled, and the occupancy of kernels on these GPUs.

A multiprocessor is an SM on NVIDIA and a compute unit on AMD. AMD's wavefronts are called warps here, and its workgroups are
called blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

# Both vendors divide the registers of a multiprocessor into four parts. Each part has 512 registers per lane (on AMD, the
# architectural and accumulation registers together). Warps allocate registers in multiples of eight.
PARTS, PART_REGISTERS, REGISTER_UNIT = 4, 512, 8
TENSOR_MEMORY = 512  # columns per multiprocessor on sm_100


@dataclass(frozen=True)
class Target:
    gpu: GPUTarget
    multiprocessors: int  # number in the whole GPU
    warps: int  # maximum per multiprocessor
    blocks: int  # maximum per multiprocessor
    shared_memory_total: int  # bytes per multiprocessor
    shared_memory_unit: int  # bytes; the allocation of each block is rounded up to a multiple of this number
    shared_memory_reserved: int  # bytes per block that the system reserves

    @property
    def shared_memory(self) -> int:
        """Shared memory that a block can allocate, in bytes."""
        return self.shared_memory_total - self.shared_memory_reserved

    def occupancy(self, warps: int, registers: int, shared: int, tensor_memory: int = 0) -> int:
        """Return the number of resident warps per multiprocessor, as a percentage of the maximum.

        Args:
            warps: warps per block.
            registers: registers per thread.
            shared: bytes of shared memory per block.
            tensor_memory: columns of tensor memory per block.
        """
        held = PARTS * (PART_REGISTERS // round_up(registers, REGISTER_UNIT))
        allocated = round_up(shared + self.shared_memory_reserved, self.shared_memory_unit)
        blocks = min(self.warps // warps, self.blocks, held // warps, self.shared_memory_total // allocated)
        if tensor_memory:
            blocks = min(blocks, TENSOR_MEMORY // tensor_memory)
        return 100 * blocks * warps // self.warps


def round_up(amount: int, unit: int) -> int:
    """Return `amount` rounded up to a multiple of `unit`. The result is at least `unit`."""
    return max(1, -(-amount // unit)) * unit


def nvidia(arch: int, *, multiprocessors: int, warps: int, blocks: int, shared_memory: int) -> Target:
    return Target(GPUTarget("cuda", arch, 32), multiprocessors, warps, blocks, shared_memory * 1024, 128, 1024)


def amd(arch: str, *, multiprocessors: int, shared_memory: int, unit: int) -> Target:
    """Return a target with AMD's limits per compute unit.

    A compute unit runs up to eight wavefronts on each of its four SIMDs. It has sixteen barriers, so it runs at most sixteen
    workgroups.
    """
    return Target(GPUTarget("hip", arch, 64), multiprocessors, 32, 16, shared_memory * 1024, unit, 0)


# The GPUs are the A100, RTX 3090, RTX 4090, H100, B200, RTX 5090, MI210, MI300X and MI355X, in this order. shared_memory is in
# KiB per multiprocessor.
# Sources for NVIDIA: CUDA Programming Guide, "Compute Capabilities", tables 30 and 31. For the reserved bytes:
# cuda::arch_traits in CCCL. For the allocation units: CUDA's occupancy calculator.
# Sources for AMD: ROCm, "AMD GPU specifications". For registers, wavefronts, allocation units and barriers:
# AMDGPUBaseInfo.cpp in LLVM.
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
