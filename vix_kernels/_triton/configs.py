"""Launch configurations as data: tile sizes, warps and stages of each kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import launch
from .layout import padded


@dataclass(frozen=True)
class LaunchConfig:
    block_slots: int
    block_tokens: int
    num_warps: int
    num_stages: int
    compute: torch.dtype  # logits, statistics and accumulators
    split: bool  # float32 slots against 16-bit tokens: products in two halves

    @property
    def triton_compute(self) -> Any:
        return tl.float64 if self.compute == torch.float64 else tl.float32

    def meta(self, width: int, value_width: int) -> dict[str, Any]:
        return dict(
            D=width, E=value_width, BLOCK_D=padded(width), BLOCK_E=padded(value_width),
            BLOCK_M=self.block_slots, BLOCK_N=self.block_tokens,
            SPLIT=self.split, COMPUTE=self.triton_compute, PRECISION=precision(),
            num_warps=self.num_warps, num_stages=self.num_stages, enable_fp_fusion=True,
        )  # fmt: skip


# (kernel, bits of the tokens' dtype, padded width): (slots a tile, tokens a tile, warps, stages).
TABLE: dict[tuple[str, int, int], tuple[int, int, int, int]] = {
    ("aggregate_forward", 16, 16): (64, 64, 4, 3),
    ("aggregate_forward", 16, 32): (64, 64, 4, 3),
    ("aggregate_forward", 16, 64): (64, 64, 4, 3),
    ("aggregate_forward", 16, 128): (64, 64, 4, 2),
    ("aggregate_forward", 16, 256): (64, 32, 8, 1),
    ("broadcast_forward", 16, 16): (64, 128, 8, 2),
    ("broadcast_forward", 16, 32): (64, 128, 8, 2),
    ("broadcast_forward", 16, 64): (64, 128, 8, 2),
    ("broadcast_forward", 16, 128): (32, 64, 4, 1),
    ("broadcast_forward", 16, 256): (32, 32, 4, 1),
    ("aggregate_tokens", 16, 16): (64, 128, 8, 2),
    ("aggregate_tokens", 16, 32): (64, 128, 8, 2),
    ("aggregate_tokens", 16, 64): (32, 64, 4, 2),
    ("aggregate_tokens", 16, 128): (32, 64, 8, 1),
    ("aggregate_tokens", 16, 256): (16, 32, 8, 1),
    ("broadcast_tokens", 16, 16): (64, 128, 8, 2),
    ("broadcast_tokens", 16, 32): (64, 128, 8, 2),
    ("broadcast_tokens", 16, 64): (64, 128, 8, 2),
    ("broadcast_tokens", 16, 128): (32, 64, 4, 1),
    ("broadcast_tokens", 16, 256): (16, 32, 8, 1),
    ("broadcast_slots", 16, 16): (64, 64, 4, 2),
    ("broadcast_slots", 16, 32): (64, 64, 4, 2),
    ("broadcast_slots", 16, 64): (64, 64, 4, 2),
    ("broadcast_slots", 16, 128): (64, 32, 4, 1),
    ("broadcast_slots", 16, 256): (32, 16, 8, 1),
    ("aggregate_slots", 16, 16): (64, 64, 4, 2),
    ("aggregate_slots", 16, 32): (64, 64, 4, 2),
    ("aggregate_slots", 16, 64): (64, 64, 4, 1),
    ("aggregate_slots", 16, 128): (64, 64, 4, 2),
    ("aggregate_slots", 16, 256): (32, 16, 8, 1),
    ("aggregate_forward", 32, 16): (64, 32, 8, 1),
    ("aggregate_forward", 32, 32): (64, 32, 8, 1),
    ("aggregate_forward", 32, 64): (64, 32, 8, 1),
    ("aggregate_forward", 32, 128): (32, 32, 8, 1),
    ("aggregate_forward", 32, 256): (32, 16, 8, 1),
    ("broadcast_forward", 32, 16): (64, 64, 8, 1),
    ("broadcast_forward", 32, 32): (64, 64, 8, 1),
    ("broadcast_forward", 32, 64): (32, 64, 8, 1),
    ("broadcast_forward", 32, 128): (32, 32, 4, 1),
    ("broadcast_forward", 32, 256): (16, 32, 8, 1),
    ("aggregate_tokens", 32, 16): (32, 32, 8, 1),
    ("aggregate_tokens", 32, 32): (16, 64, 8, 1),
    ("aggregate_tokens", 32, 64): (32, 32, 4, 1),
    ("aggregate_tokens", 32, 128): (16, 16, 4, 1),
    ("aggregate_tokens", 32, 256): (16, 16, 8, 1),
    ("broadcast_tokens", 32, 16): (32, 64, 8, 1),
    ("broadcast_tokens", 32, 32): (32, 64, 8, 1),
    ("broadcast_tokens", 32, 64): (32, 32, 4, 1),
    ("broadcast_tokens", 32, 128): (32, 32, 8, 1),
    ("broadcast_tokens", 32, 256): (16, 16, 8, 1),
    ("broadcast_slots", 32, 16): (64, 32, 8, 1),
    ("broadcast_slots", 32, 32): (64, 32, 8, 1),
    ("broadcast_slots", 32, 64): (64, 16, 8, 1),
    ("broadcast_slots", 32, 128): (16, 16, 8, 1),
    ("broadcast_slots", 32, 256): (16, 16, 8, 1),
    ("aggregate_slots", 32, 16): (64, 32, 8, 1),
    ("aggregate_slots", 32, 32): (64, 32, 8, 1),
    ("aggregate_slots", 32, 64): (32, 32, 8, 1),
    ("aggregate_slots", 32, 128): (16, 16, 4, 1),
    ("aggregate_slots", 32, 256): (16, 16, 8, 1),
    ("rotate", 16, 16): (0, 128, 4, 1),
    ("rotate", 16, 32): (0, 128, 4, 1),
    ("rotate", 16, 64): (0, 64, 4, 1),
    ("rotate", 16, 128): (0, 32, 4, 1),
    ("rotate", 16, 256): (0, 16, 4, 1),
    ("rotate", 32, 16): (0, 128, 4, 1),
    ("rotate", 32, 32): (0, 64, 4, 1),
    ("rotate", 32, 64): (0, 32, 4, 1),
    ("rotate", 32, 128): (0, 16, 4, 1),
    ("rotate", 32, 256): (0, 8, 4, 1),
}
_WARP_GROUP = {  # 64 tokens or slots and more a dot: warp-group products, whose operands need no registers
    ("aggregate_tokens", 16, 64): (64, 128, 8, 2),
    ("aggregate_slots", 16, 64): (64, 64, 4, 2),
    ("aggregate_forward", 16, 128): (64, 64, 4, 3),
    ("broadcast_forward", 16, 128): (64, 128, 8, 2),
    ("broadcast_tokens", 16, 128): (64, 128, 8, 2),
    ("broadcast_slots", 16, 128): (64, 64, 4, 2),
}
# What an architecture does better with. The table above is for all others.
OVERRIDES: dict[str, dict[tuple[str, int, int], tuple[int, int, int, int]]] = {
    "sm_90": _WARP_GROUP,
    "sm_100": _WARP_GROUP | {("aggregate_tokens", 16, 128): (64, 128, 8, 1)},
}
INTERPRETER = (32, 16, 1, 1)  # small tiles: every loop runs more than once on small inputs


def launch_config(kernel: str, tokens: Tensor, width: int, slots: Tensor) -> LaunchConfig:
    """The configuration of `kernel` for the architecture and dtype of `tokens` and the larger head width `width`."""
    arch = architecture(tokens.device)
    key = (kernel, tokens.element_size() * 8, padded(width))
    tile = INTERPRETER if arch == "interpreter" else OVERRIDES.get(arch, TABLE).get(key) or TABLE[key]
    compute = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    return LaunchConfig(*tile, compute=compute, split=slots.element_size() > tokens.element_size())


def precision() -> str:
    """tf32 if PyTorch was told to use it for float32 products, else three tf32 products a float32 one."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def architecture(device: torch.device) -> str:
    if device.type == "cuda":
        return _cuda_architecture(device.index or 0)
    if launch.observer is None:
        return "interpreter"
    import triton

    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


@cache
def _cuda_architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
