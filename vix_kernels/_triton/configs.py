"""Launch configurations as data: tile sizes, warps and stages of each kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends import gpu_architecture, interpreted
from ..primitives.layout import accumulator
from .layout import padded
from .targets import TARGETS


class Tile(NamedTuple):
    """What one program holds, and with how many threads."""

    slots: int
    tokens: int
    num_warps: int
    num_stages: int
    # How float32 tiles multiply: three TensorFloat32 products, or fused multiply-adds where those need too many registers.
    precision: str = "tf32x3"
    apart: bool = False  # dk and dv in launches of their own, where both accumulators do not fit the registers


@dataclass(frozen=True)
class LaunchConfig:
    tile: Tile
    compute: torch.dtype  # logits, statistics and accumulators
    split: bool  # float32 slots against 16-bit tokens: products in two halves
    precision: str  # of float32 products
    multiprocessors: int  # of the device, 0 for the interpreter
    step: int  # tokens in the architecture's own tile: chunks are multiples of it

    def chunk(self, programs: int, tokens: int) -> tuple[int, int]:
        """How many tokens a program walks over where one tile of slots is one of `programs`, and how many chunks that makes.

        All of them, unless these programs leave multiprocessors idle. The number follows from sizes alone, never from
        timing: the same call gives the same bits.
        """
        if not may_split:
            return tokens, 1
        if self.multiprocessors:
            wanted, least = PROGRAMS_A_MULTIPROCESSOR * self.multiprocessors // max(1, programs), LEAST_CHUNK
        else:
            wanted, least = tokens, 2 * self.step  # always: small inputs must meet the merge too
        size = max(least, triton.cdiv(tokens, max(1, wanted)))
        size = triton.cdiv(size, self.step) * self.step
        return size, triton.cdiv(tokens, size)

    @property
    def triton_compute(self) -> Any:
        return tl.float64 if self.compute == torch.float64 else tl.float32

    def meta(self, width: int, value_width: int) -> dict[str, Any]:
        """The constexprs and options that every kernel of the two moves takes."""
        return dict(
            D=width, E=value_width, BLOCK_D=padded(width), BLOCK_E=padded(value_width),
            BLOCK_M=self.tile.slots, BLOCK_N=self.tile.tokens,
            SPLIT=self.split, COMPUTE=self.triton_compute,
            PRECISION=self.precision,
            num_warps=self.tile.num_warps, num_stages=self.tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip


# The linear moves hold less than those with a softmax: one shape for all of them, but where another is named below.
_LINEAR = {
    (f"linear_{kernel}", bits, width): tile
    for kernel in (
        "aggregate_forward", "aggregate_tokens", "aggregate_slots",
        "broadcast_forward", "broadcast_tokens", "broadcast_slots",
    )
    for (bits, width), tile in {
        (16, 16): Tile(64, 64, 4, 2),
        (16, 32): Tile(64, 64, 4, 2),
        (16, 64): Tile(64, 64, 4, 2),
        (16, 128): Tile(64, 64, 8, 2),
        (16, 256): Tile(32, 32, 8, 1),
        (32, 16): Tile(64, 32, 4, 1),
        (32, 32): Tile(64, 32, 4, 1),
        (32, 64): Tile(32, 32, 4, 1),
        (32, 128): Tile(32, 32, 8, 1),
        (32, 256): Tile(16, 16, 8, 1, "ieee"),
    }.items()
} | {
    ("linear_aggregate_tokens", 16, 64): Tile(64, 64, 8, 2),
}  # fmt: skip
# By kernel, bits of the tokens' dtype and padded width.
TABLE: dict[tuple[str, int, int], Tile] = {
    ("aggregate_forward", 16, 16): Tile(64, 64, 4, 3),
    ("aggregate_forward", 16, 32): Tile(64, 64, 4, 3),
    ("aggregate_forward", 16, 64): Tile(64, 32, 4, 3),
    ("aggregate_forward", 16, 128): Tile(64, 32, 4, 2),
    ("aggregate_forward", 16, 256): Tile(16, 32, 8, 1),
    ("broadcast_forward", 16, 16): Tile(64, 128, 8, 2),
    ("broadcast_forward", 16, 32): Tile(64, 128, 8, 2),
    ("broadcast_forward", 16, 64): Tile(64, 128, 8, 2),
    ("broadcast_forward", 16, 128): Tile(32, 64, 8, 2),
    ("broadcast_forward", 16, 256): Tile(32, 16, 8, 1),
    ("aggregate_tokens", 16, 16): Tile(32, 128, 8, 2),
    ("aggregate_tokens", 16, 32): Tile(32, 128, 8, 2),
    ("aggregate_tokens", 16, 64): Tile(32, 32, 4, 2),
    ("aggregate_tokens", 16, 128): Tile(32, 32, 8, 1),
    ("aggregate_tokens", 16, 256): Tile(32, 16, 8, 1),
    ("broadcast_tokens", 16, 16): Tile(64, 128, 8, 2),
    ("broadcast_tokens", 16, 32): Tile(64, 128, 8, 2),
    ("broadcast_tokens", 16, 64): Tile(32, 32, 4, 2),
    ("broadcast_tokens", 16, 128): Tile(32, 64, 8, 2),
    ("broadcast_tokens", 16, 256): Tile(32, 16, 8, 1),
    ("broadcast_slots", 16, 16): Tile(64, 64, 4, 2),
    ("broadcast_slots", 16, 32): Tile(64, 64, 4, 2),
    ("broadcast_slots", 16, 64): Tile(32, 64, 4, 2),
    ("broadcast_slots", 16, 128): Tile(32, 64, 8, 1),
    ("broadcast_slots", 16, 256): Tile(16, 32, 8, 1),
    ("aggregate_slots", 16, 16): Tile(64, 64, 4, 2),
    ("aggregate_slots", 16, 32): Tile(64, 64, 4, 2),
    ("aggregate_slots", 16, 64): Tile(64, 64, 4, 1),
    ("aggregate_slots", 16, 128): Tile(64, 64, 4, 2),
    ("aggregate_slots", 16, 256): Tile(16, 32, 8, 1),
    ("aggregate_forward", 32, 16): Tile(64, 32, 8, 1),
    ("aggregate_forward", 32, 32): Tile(64, 32, 8, 1),
    ("aggregate_forward", 32, 64): Tile(64, 32, 8, 1),
    ("aggregate_forward", 32, 128): Tile(32, 16, 8, 1),
    ("aggregate_forward", 32, 256): Tile(16, 16, 8, 1, "ieee"),
    ("broadcast_forward", 32, 16): Tile(64, 64, 8, 1),
    ("broadcast_forward", 32, 32): Tile(64, 64, 8, 1),
    ("broadcast_forward", 32, 64): Tile(32, 64, 8, 1),
    ("broadcast_forward", 32, 128): Tile(32, 32, 8, 1),
    ("broadcast_forward", 32, 256): Tile(16, 16, 8, 1, "ieee"),
    ("aggregate_tokens", 32, 16): Tile(32, 32, 8, 1),
    ("aggregate_tokens", 32, 32): Tile(16, 64, 8, 1),
    ("aggregate_tokens", 32, 64): Tile(32, 32, 8, 1),
    ("aggregate_tokens", 32, 128): Tile(32, 16, 8, 1),
    ("aggregate_tokens", 32, 256): Tile(16, 16, 8, 1, "ieee", apart=True),
    ("broadcast_tokens", 32, 16): Tile(32, 64, 8, 1),
    ("broadcast_tokens", 32, 32): Tile(32, 64, 8, 1),
    ("broadcast_tokens", 32, 64): Tile(32, 32, 8, 1),
    ("broadcast_tokens", 32, 128): Tile(32, 16, 8, 1),
    ("broadcast_tokens", 32, 256): Tile(16, 16, 8, 1, "ieee"),
    ("broadcast_slots", 32, 16): Tile(64, 32, 8, 1),
    ("broadcast_slots", 32, 32): Tile(64, 32, 8, 1),
    ("broadcast_slots", 32, 64): Tile(64, 16, 8, 1),
    ("broadcast_slots", 32, 128): Tile(16, 16, 4, 1, "ieee"),
    ("broadcast_slots", 32, 256): Tile(16, 16, 8, 1, "ieee"),
    ("aggregate_slots", 32, 16): Tile(64, 32, 8, 1),
    ("aggregate_slots", 32, 32): Tile(64, 32, 8, 1),
    ("aggregate_slots", 32, 64): Tile(32, 32, 8, 1),
    ("aggregate_slots", 32, 128): Tile(16, 16, 4, 1, "ieee"),
    ("aggregate_slots", 32, 256): Tile(16, 16, 8, 1, "ieee"),
    **_LINEAR,
    ("rotate", 16, 16): Tile(0, 128, 4, 1),
    ("rotate", 16, 32): Tile(0, 128, 4, 1),
    ("rotate", 16, 64): Tile(0, 64, 4, 1),
    ("rotate", 16, 128): Tile(0, 32, 4, 1),
    ("rotate", 16, 256): Tile(0, 16, 4, 1),
    ("rotate", 32, 16): Tile(0, 128, 4, 1),
    ("rotate", 32, 32): Tile(0, 64, 4, 1),
    ("rotate", 32, 64): Tile(0, 32, 4, 1),
    ("rotate", 32, 128): Tile(0, 16, 4, 1),
    ("rotate", 32, 256): Tile(0, 8, 4, 1),
}
_WARP_GROUP = {  # 64 tokens or slots and more a product: warp-group instructions, whose operands need fewer registers
    ("aggregate_forward", 16, 64): Tile(64, 64, 4, 3),
    ("aggregate_tokens", 16, 32): Tile(64, 128, 8, 2),
    ("aggregate_tokens", 16, 64): Tile(64, 64, 8, 2),
    ("aggregate_slots", 16, 64): Tile(64, 64, 4, 2),
    ("broadcast_tokens", 16, 64): Tile(64, 128, 8, 2),
    ("broadcast_slots", 16, 64): Tile(64, 64, 4, 2),
    ("aggregate_forward", 16, 128): Tile(64, 64, 4, 3),
    ("broadcast_forward", 16, 128): Tile(64, 128, 8, 2),
    ("broadcast_tokens", 16, 128): Tile(64, 128, 8, 2),
    ("broadcast_slots", 16, 128): Tile(64, 64, 4, 2),
}
_CDNA = {  # one stage and smaller tiles where the pipeline does not fit the registers
    ("aggregate_tokens", 16, 32): Tile(32, 128, 8, 1),
    ("broadcast_tokens", 16, 32): Tile(32, 128, 4, 1),
    ("broadcast_forward", 16, 64): Tile(64, 128, 8, 1),
    ("aggregate_tokens", 16, 128): Tile(16, 64, 8, 1),
    ("broadcast_tokens", 16, 128): Tile(16, 64, 4, 1),
    ("broadcast_slots", 16, 128): Tile(16, 32, 4, 1),
    ("aggregate_tokens", 32, 128): Tile(16, 32, 8, 1),
}
# What an architecture does better with. The table above is for all others.
OVERRIDES: dict[str, dict[tuple[str, int, int], Tile]] = {
    "sm_90": _WARP_GROUP
    | {
        ("aggregate_tokens", 16, 128): Tile(32, 64, 8, 2),
        # Smaller than the registers allow now: Triton 3.6 spills a few bytes more at width 80.
        ("broadcast_tokens", 16, 128): Tile(32, 128, 8, 2),
        ("aggregate_forward", 32, 128): Tile(16, 32, 8, 1),
        ("broadcast_forward", 32, 128): Tile(32, 16, 8, 1),
    },
    "sm_100": _WARP_GROUP | {("aggregate_tokens", 16, 128): Tile(64, 64, 8, 1)},
    "gfx90a": _CDNA,
    "gfx942": _CDNA,
    "gfx950": _CDNA,
}
PROGRAMS_A_MULTIPROCESSOR = 2  # what their registers let stand on one at the same time
LEAST_CHUNK = 256  # tokens; fewer do not earn back the merge
INTERPRETER = Tile(32, 16, 1, 1)  # small tiles: every loop runs more than once on small inputs
# The traffic meter sets this: the interpreter then launches what an architecture would, but with this many tokens a tile. It
# takes a fifth of the time, and the distinct bytes of a launch do not depend on them, as long as whatever splits the tokens
# over programs looks at the architecture's own tile.
assumed: str | None = None
may_split = True  # the meter's too: False keeps all tokens in one chunk
ASSUMED_TOKENS = 1024


def launch_config(kernel: str, tokens: Tensor, width: int, slots: Tensor) -> LaunchConfig:
    """The configuration of `kernel` for the architecture and dtype of `tokens` and the larger head width `width`."""
    arch = architecture(tokens.device)
    key = (kernel, tokens.element_size() * 8, padded(width))
    tile = OVERRIDES.get(arch, {}).get(key) or (INTERPRETER if arch == "interpreter" else TABLE[key])
    step = tile.tokens
    if assumed:
        tile = tile._replace(tokens=max(tile.tokens, min(ASSUMED_TOKENS, triton.next_power_of_2(tokens.shape[2]))))
    split = slots.element_size() > tokens.element_size()
    return LaunchConfig(tile, accumulator(tokens.dtype), split, _precision(tile, arch), multiprocessors(tokens.device), step)


def _precision(tile: Tile, arch: str) -> str:
    """How float32 tiles multiply."""
    if arch.startswith("gfx"):  # matrix cores that take float32 itself; only gfx942 has tf32
        return "tf32" if tf32_allowed() and arch == "gfx942" else "ieee"
    return "tf32" if tf32_allowed() else tile.precision


def tf32_allowed() -> bool:
    """tf32 is opt-in, by PyTorch's own switch (the older `allow_tf32` and `set_float32_matmul_precision` set it too)."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def architecture(device: torch.device) -> str:
    if interpreted():
        return assumed or "interpreter"
    if device.type == "cuda":
        return gpu_architecture(device.index or 0)
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors (compute units) the device has; 0 for the interpreter."""
    if interpreted():
        return TARGETS[assumed].multiprocessors if assumed else 0
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return TARGETS[architecture(device)].multiprocessors  # compiled or counted, not run
