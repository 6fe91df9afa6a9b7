"""Kernel launches, their configurations, and arguments that many kernels share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import conditions
from ..backends import gpu_architecture, interpreted, is_current, tf32_allowed
from ..layout import Rotary, accumulator
from . import compiled
from .launch_table import INTERPRETER, OVERRIDES, TABLE, Key, Tile
from .targets import TARGETS


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch `kernel` over `grid` on the device of its first argument, which must be a tensor.

    `meta` contains the constexprs and the launch options, such as num_warps.
    """
    if (observer := conditions.current.observer) is not None:
        observer(kernel, grid, args, meta)
        return
    if 0 in grid:  # an empty batch
        return
    if (recorder := conditions.recording.recorder) is not None:
        recorder.launch(start, kernel, grid, args, meta)
    else:
        start(kernel, grid, args, meta)


def start(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> compiled.Compiled | None:
    """Launch a kernel through Triton. Return the compiled kernel, or None if later launches must use Triton, too."""
    if interpreted():
        kernel[grid](*args, **meta)
        return None
    if is_current(args[0].device):
        return compiled.run(kernel, grid, args, meta)
    with torch.cuda.device(args[0].device):
        return compiled.run(kernel, grid, args, meta)


# Configuration


@dataclass(frozen=True)
class LaunchConfig:
    tile: Tile
    compute: torch.dtype  # dtype of logits, statistics and accumulators
    split: bool  # whether slots are float32 and tokens are 16-bit; such slots are multiplied as a sum of two 16-bit tiles
    precision: str  # precision of float32 products
    multiprocessors: int  # result of the function `multiprocessors` for the device
    step: int  # tokens per tile in the launch table; the size of a chunk is a multiple of this number

    def chunk(self, programs: int, tokens: int) -> tuple[int, int]:
        """Return the number of tokens per chunk and the number of chunks, for a launch with `programs` programs per chunk.

        All tokens form one chunk, unless the device can run the programs of several chunks at the same time. The split depends
        only on the sizes and the device, never on timing, so repeated calls return bit-identical results.
        """
        if not conditions.current.split:
            return tokens, 1
        if self.multiprocessors:
            wanted, least = self.resident * self.multiprocessors // max(1, programs), LEAST_CHUNK
        else:
            wanted, least = tokens, 2 * self.step  # the interpreter always splits, so that the merge runs even for small inputs
        size = max(least, cdiv(tokens, max(1, wanted)))
        size = cdiv(size, self.step) * self.step
        return size, cdiv(tokens, size)

    @property
    def resident(self) -> int:
        """Number of programs that fit on a multiprocessor if each thread uses the maximum number of registers."""
        return max(1, WARPS_A_MULTIPROCESSOR // self.tile.num_warps)

    def slots(self, num_slots: int) -> int:
        """Return the number of slots per tile.

        `num_slots` is rounded up to a power of two and to at least 64. The result is limited to `tile.slots`.
        """
        return min(self.tile.slots, max(64, power_of_2(num_slots)))

    def stream(self, programs: int, tokens: int, num_slots: int) -> tuple[int, dict[str, int]]:
        """Return the number of tokens per program and a dict of updates to `meta`, for kernels whose programs loop over tokens.

        TILES is the number of tiles of BLOCK_M slots that a program loads once, before the loop. It is 0 if the program loads
        the slots again for every tile of tokens. `programs` is the number of programs per chunk, as in the method `chunk`.
        Tokens do not interact, so results do not depend on how the tokens are split into chunks.
        """
        block = self.slots(num_slots)
        tiles = cdiv(num_slots, block)
        size, _ = self.chunk(programs, tokens)
        return size, dict(BLOCK_M=block, TILES=tiles if tiles <= self.tile.resident else 0)

    def keep(self, num_slots: int) -> tuple[int, dict[str, int]]:
        """Return the number of slots per program and a dict of updates to `meta`, for kernels with one slot tile per program.

        A tile with fewer slots than in the launch table has proportionally fewer warps. For example, a tile of 128 slots with 8
        warps can become a tile of 64 slots with 4 warps. Tiles are not reduced below 64 slots.
        """
        block = self.slots(num_slots)
        return block, dict(BLOCK_M=block, num_warps=max(self.tile.num_warps * block // self.tile.slots, 1))

    @property
    def triton_compute(self) -> Any:
        return triton_dtype(self.compute)

    def meta(self, width: int, value_width: int) -> dict[str, Any]:
        """Return the constexprs and launch options that the attention kernels share."""
        return dict(
            D=width, E=value_width, BLOCK_D=padded(width), BLOCK_E=padded(value_width),
            BLOCK_M=self.tile.slots, BLOCK_N=self.tile.tokens,
            SPLIT=self.split, COMPUTE=self.triton_compute,
            PRECISION=self.precision,
            num_warps=self.tile.num_warps, num_stages=self.tile.num_stages, enable_fp_fusion=True,
        )  # fmt: skip


VARIANTS = ("_heavy", "_learned", "_half")  # suffixes in the launch table
WARPS_A_MULTIPROCESSOR = 8  # warps that fit on a multiprocessor if each thread uses the maximum number of registers
LEAST_CHUNK = 256  # tokens; merging smaller chunks would take more time than the additional programs save
# Largest number of tokens per tile when the interpreter uses the launch configurations of a GPU architecture. With tiles this
# large, the interpreter takes one fifth of the time that it takes with the tiles of the launch table. Each launch still reads
# and writes the same number of bytes, because the size of a chunk depends on the tile in the launch table (`step`). The tables
# of `dft` are an exception, because they are padded to a multiple of the tile.
ASSUMED_TOKENS = 1024


def launch_config(kernel: str, tokens: Tensor, width: int, slots: Tensor, heavy: bool | None = None) -> LaunchConfig:
    """Return the configuration of `kernel` for the device and dtype of `tokens`.

    Args:
        kernel: name of the kernel in the launch table.
        tokens: the tokens, (batch, heads, tokens, channels) or (batch, tokens, channels).
        width: width to look up in the launch table, for example the larger of the head widths of keys and values.
        slots: the slots. Only their dtype is used.
        heavy: whether to prefer the entry `{kernel}_heavy`, for launches that need many registers. By default, True if slots
            have the tokens' dtype.
    """
    split = slots.element_size() > tokens.element_size()
    heavy = not split if heavy is None else heavy
    find = find_config if conditions.current is conditions.DEFAULT else find_config.__wrapped__
    config = find(kernel, tokens.device, tokens.dtype, padded(width), split, heavy, tf32_allowed())
    if conditions.current.arch:
        tokens_at_most = max(config.tile.tokens, min(ASSUMED_TOKENS, power_of_2(tokens.shape[-2])))
        config = replace(config, tile=config.tile._replace(tokens=tokens_at_most))
    return config


@cache
def find_config(
    kernel: str, device: torch.device, dtype: torch.dtype, width: int, split: bool, heavy: bool, tf32: bool
) -> LaunchConfig:  # fmt: skip
    """Look up a launch configuration.

    Results are cached, except while a measurement overrides the launch settings. The launch table must not change after the
    first launch.
    """
    arch = architecture(device)
    _, tile = find_tile(arch, kernel, dtype.itemsize * 8, width, heavy=heavy)
    return LaunchConfig(tile, accumulator(dtype), split, _precision(tile, arch, tf32), multiprocessors(device), tile.tokens)


def is_heavy(tokens: Tensor, slots: Tensor, rotary: Rotary | None) -> bool:
    """Return whether a launch uses RoPE or has slots in the tokens' dtype. Such launches need many registers."""
    return rotary is not None or slots.dtype == tokens.dtype


def kernel_name(entry: str) -> str:
    """Return the kernel name of a launch table entry, without a suffix from VARIANTS."""
    return next((entry.removesuffix(suffix) for suffix in VARIANTS if entry.endswith(suffix)), entry)


def find_tile(arch: str, kernel: str, bits: int, width: int, heavy: bool) -> tuple[Key, Tile]:
    """Return the key in the launch table and the tile of `kernel` on `arch`.

    If `heavy`, prefer the entry `{kernel}_heavy`, for launches that need many registers. If an entry with a suffix (see
    VARIANTS) does not exist, the entry without the suffix is used. A TABLE entry with a suffix takes precedence over an
    OVERRIDES entry without one.
    """
    names = (f"{kernel}_heavy", kernel, kernel_name(kernel)) if heavy else (kernel, kernel_name(kernel))
    keys = [(name, bits, width) for name in dict.fromkeys(names)]
    for key in keys:
        if conditions.current.asked is not None:
            conditions.current.asked(key)
        for table in (conditions.current.tiles, OVERRIDES.get(arch, {}), {} if arch == "interpreter" else TABLE):
            if tile := table.get(key):
                return key, tile
    if arch == "interpreter":
        return keys[-1], INTERPRETER
    raise KeyError(f"the launch table has no entry for {kernel}, {bits}-bit tokens and width {width}")


def _precision(tile: Tile, arch: str, tf32: bool) -> str:
    """Return the precision of float32 products. `tf32` says whether TF32 is allowed."""
    if arch.startswith("gfx"):  # AMD's matrix cores multiply float32, but only gfx942 supports TF32
        return "tf32" if tf32 and arch == "gfx942" else "ieee"
    return "tf32" if tf32 else tile.precision


def triton_dtype(dtype: torch.dtype) -> Any:
    """Return tl.float64 if `dtype` is torch.float64, else tl.float32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def architecture(device: torch.device) -> str:
    if interpreted():
        return conditions.current.arch or "interpreter"
    if device.type == "cuda":
        return gpu_architecture(device.index or 0)
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors (compute units on AMD) of the device.

    In the interpreter, return the number for the assumed architecture, or 0 if no architecture is assumed.
    """
    if interpreted():
        return TARGETS[conditions.current.arch].multiprocessors if conditions.current.arch else 0
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return TARGETS[architecture(device)].multiprocessors  # without a GPU, kernels can be compiled, but not run


# Arguments


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up. triton.cdiv takes two microseconds, because it can also be called in kernels."""
    return -(-a // b)


def power_of_2(size: int) -> int:
    """Return the smallest power of two >= `size`."""
    return 1 << (size - 1).bit_length()


def padded(width: int) -> int:
    """Return the smallest power of two >= `width`, but at least 16, the minimum for matrix instructions."""
    return max(16, power_of_2(width))


def token_strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride()[:3]


def output_strides(x: Tensor) -> tuple[int, int, int]:
    """Return token_strides(x), or zeros if x is an empty placeholder for a gradient that is not needed."""
    return token_strides(x) if x.dim() == 4 else (0, 0, 0)


def slot_strides(x: Tensor) -> tuple[int, int, int]:
    """Return the batch, head and slot strides of x. Dimensions of size 1 are broadcast, so their stride is 0."""
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True))


def mask_strides(mask: Tensor | None) -> tuple[int, int]:
    return (0, 0) if mask is None else mask.stride()


def rotary_arguments(rotary: Rotary | None, placeholder: Tensor) -> tuple[Tensor, Tensor, int, dict[str, Any]]:
    """Return cos, sin, their head stride (0 if all heads share a table), and the constexprs of the rotation.

    ROTARY is the number of rotated channels. Without a rotation it is 0, and kernels do not read cos and sin.
    """
    if rotary is None:
        return placeholder, placeholder, 0, dict(ROTARY=0, INTERLEAVED=True)
    cos, sin = rotary.cos.contiguous(), rotary.sin.contiguous()
    stride = 0 if cos.shape[0] == 1 else cos.stride(0)
    return cos, sin, stride, dict(ROTARY=2 * cos.shape[-1], INTERLEAVED=rotary.interleaved)


def merge_arguments(parts: Tensor, *, outputs: int) -> tuple[tuple[int], tuple[Tensor, ...], dict[str, Any]]:
    """Return the grid, the output tensors and `meta` (see `launch`) for a kernel that merges partial results of token chunks.

    Args:
        parts: partial results, (batch, heads, chunks, M, E).
        outputs: number of (batch, heads, M) tensors that the kernel writes in addition to the merged rows (batch, heads, M, E).
    """
    batch, num_heads, _, num_slots, width = parts.shape
    merged = parts.new_empty(batch, num_heads, num_slots, width)
    numbers = [parts.new_empty(batch, num_heads, num_slots) for _ in range(outputs)]
    block, num_warps = (8 if padded(width) >= 128 else 16), (4 if padded(width) <= 32 else 8)  # 2 to 8 elements per thread
    meta = dict(
        E=width, BLOCK_E=padded(width), BLOCK_M=block, COMPUTE=triton_dtype(parts.dtype),
        num_warps=num_warps, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return (batch * num_heads * cdiv(num_slots, block),), (merged, *numbers), meta
