"""Feature maps and tiles of features, shared by the kernels for linear attention.

With slots, a tile of features is computed from products of tokens and slots. Without slots, it is computed from a range of the
tokens' channels, so a program does not need all channels of a head at once.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from .launch import LaunchConfig, launch_config, padded, slot_strides
from .tiles import LOG2E, load_rotated, load_slots, row_products, slot_channels


@triton.jit
def apply_map(logits, ELU: tl.constexpr):
    """Apply the feature map: elu + 1 if ELU, otherwise relu. NaN stays NaN."""
    if ELU:
        features = tl.where(logits > 0, logits + 1.0, tl.exp2(logits * LOG2E))
    else:
        features = tl.where(logits <= 0, 0.0, logits)
    return features


@triton.jit
def slope(logits, ELU: tl.constexpr):
    """Return the derivative of the feature map at `logits`."""
    if ELU:
        slopes = tl.where(logits > 0, 1.0, tl.exp2(logits * LOG2E))
    else:
        slopes = tl.where(logits <= 0, 0.0, 1.0)
    return slopes


@triton.jit
def load_logits(
    x, o_n, x_n, valid, slots, slots_m, first_slot, cos, sin, M,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    PROJECTED: tl.constexpr, SPLIT: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return a tile (tokens, BLOCK_M) of inputs to the feature map.

    The inputs are products of tokens and slots if PROJECTED, otherwise channels of the tokens.
    """
    if PROJECTED:
        b_x = load_rotated(x, o_n, x_n, valid, cos, sin, D, BLOCK_D, ROTARY, INTERLEAVED, COMPUTE)
        o_m = first_slot + tl.arange(0, BLOCK_M)
        b_slots = load_slots(slots, o_m, slots_m, M, D, BLOCK_D, ROTARY, INTERLEAVED)
        b_l = row_products(b_x, b_slots, tl.zeros((o_n.shape[0], BLOCK_M), COMPUTE), False, SPLIT, PRECISION)
    else:
        b_l = load_rotated(x, o_n, x_n, valid, cos, sin, D, BLOCK_M, ROTARY, INTERLEAVED, COMPUTE, first_slot).to(COMPUTE)
    return b_l


@triton.jit
def slot_rows(
    first_slot, D: tl.constexpr, BLOCK_M: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    PROJECTED: tl.constexpr,
):  # fmt: skip
    """Return the slot index that each column of a tile of logits belongs to."""
    if PROJECTED:
        o_m = first_slot + tl.arange(0, BLOCK_M)
    else:
        o_m = slot_channels(D, BLOCK_M, ROTARY, INTERLEAVED, first_slot)
    return o_m


@triton.jit
def load_state(sums, norms, sums_m, norms_m, o_m, M, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return the means sums / norms, (slots, BLOCK_E), and the norms for a tile of slots.

    The means are in the range of v. Rows whose index is M or greater are 0.
    """
    o_e = tl.arange(0, BLOCK_E)
    at = o_m.to(tl.int64)
    inside = (o_m < M)[:, None] & (o_e < E)[None, :]
    b_sums = tl.load(sums + at[:, None] * sums_m + o_e[None, :], mask=inside, other=0.0)
    b_norms = tl.load(norms + at * norms_m, mask=o_m < M, other=0.0)
    return b_sums / tl.where(b_norms == 0, 1.0, b_norms)[:, None], b_norms


def feature_config(kernel: str, tokens: Tensor, values: Tensor, slots: Tensor | None) -> LaunchConfig:
    """Return the launch configuration of `kernel`. If `slots` is None, the feature map is applied to the tokens' channels."""
    config = launch_config(kernel, tokens, max(tokens.shape[3], values.shape[3]), tokens if slots is None else slots)
    if slots is None:  # the columns are the channels of a head, so a wider tile would only add padding
        config = replace(config, tile=config.tile._replace(slots=min(config.tile.slots, padded(tokens.shape[3]))))
    return config


def feature_strides(slots: Tensor | None) -> tuple[int, int, int]:
    """Return slot_strides(slots), or zeros if `slots` is None."""
    return (0, 0, 0) if slots is None else slot_strides(slots)
