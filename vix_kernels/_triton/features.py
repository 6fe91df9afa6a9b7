"""Feature maps and operands of matrix products, shared by the kernels for linear attention.

With a projection, the slots are its scaled rows, and features are computed from products of tokens and slots. Without a
projection, features are computed from the channels of the tokens, and slot j is channel j. In both cases, there is one feature
per slot and token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LaunchConfig, launch_config, padded, slot_strides
from .tiles import LN2, LOG2E, dot, load_slots, slot_channels, split, split_parts

COPIES = tl.constexpr(16)  # the smallest inner dimension of matrix instructions with 16-bit operands


@triton.jit
def apply_map(logits, ELU: tl.constexpr, PROJECTED: tl.constexpr):
    """Return the features and the derivatives of the feature map, which is elu + 1 if ELU and relu otherwise.

    The feature of a NaN logit is NaN. If ELU, the features and the derivatives are computed from the same exponential. If
    PROJECTED is also set, load_operands has multiplied the slots by log2(e), so the logits include this factor.
    """
    if ELU:
        slopes = tl.minimum(logits, 0.0, propagate_nan=tl.PropagateNan.ALL)
        features = tl.maximum(logits, 0.0)
        if PROJECTED:
            slopes = tl.exp2(slopes)
            features = features * LN2 + slopes
        else:
            slopes = tl.exp2(slopes * LOG2E)
            features += slopes
    else:
        slopes = tl.where(logits <= 0, 0.0, 1.0)
        features = tl.maximum(logits, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return features, slopes


@triton.jit
def load_operands(
    slots, first_slot, slots_m, M,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    ELU: tl.constexpr, SPLIT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Load a tile of slots and return it as two tiles.

    If ELU, the slots are multiplied by log2(e), so that the kernels can use exp2 instead of exp. If SPLIT, the results are two
    DTYPE tiles whose sum approximates the slots. Otherwise, both results are the slots, and products use only the first one.
    """
    b_slots = load_slots(slots, first_slot + tl.arange(0, BLOCK_M), slots_m, M, D, BLOCK_D, ROTARY, INTERLEAVED)
    if SPLIT:
        b_slots = b_slots.to(tl.float32)
    if ELU:
        b_slots = b_slots * LOG2E
    return split_parts(b_slots, DTYPE, SPLIT)


@triton.jit
def copies(numbers, DTYPE: tl.constexpr):
    """Return a tile with COPIES rows and one column per number.

    Half of the rows contain the numbers rounded to DTYPE, and the other half contain the rounding errors. Kernels use matrix
    instructions to multiply features by the transpose of this tile. `sum_copies` converts the product to sums of the features
    over tokens or slots, weighted by the numbers. Each number fills a column, not a row, so that each thread loads only a few
    numbers.
    """
    high, low = split(numbers, DTYPE)
    return tl.where((tl.arange(0, COPIES) < COPIES // 2)[:, None], high[None, :], low[None, :])


@triton.jit
def sum_copies(products):
    """Return the weighted sums of features. `products` is the product of the features and copies(weights)^T."""
    return tl.sum(products, 1) * (2.0 / COPIES)


@triton.jit
def outer_product(x, y, acc, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc + x y^T for two vectors, computed as a product of two tiles.

    Each tile contains a vector as two 16-bit parts, high and low. The product of the low parts is negligible, so it is omitted.
    The matrix instructions also add acc, so the addition needs no extra instructions or registers.
    """
    x_high, x_low = split(x * (4.0 / COPIES), DTYPE)
    y_high, y_low = split(y, DTYPE)
    part = tl.arange(0, COPIES) // 4
    b_x = tl.where((part < 2)[None, :], x_high[:, None], x_low[:, None])
    b_y = tl.where((part == 1)[:, None], y_low[None, :], y_high[None, :])
    return dot(b_x, tl.where((part < 3)[:, None], b_y, 0.0).to(DTYPE), acc, PRECISION)


@triton.jit
def slot_rows(
    first_slot, D: tl.constexpr, BLOCK_M: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    PROJECTED: tl.constexpr,
):  # fmt: skip
    """Return the slot index of each feature in a tile."""
    if PROJECTED:
        o_m = first_slot + tl.arange(0, BLOCK_M)
    else:
        o_m = slot_channels(D, BLOCK_M, ROTARY, INTERLEAVED, first_slot)
    return o_m


def feature_config(kernel: str, tokens: Tensor, values: Tensor, slots: Tensor | None) -> LaunchConfig:
    """Return the launch configuration of `kernel`. If `slots` is None, the feature map is applied to the tokens' channels."""
    if tokens.dtype == torch.float16 and kernel in ("linear_aggregate_tokens", "linear_broadcast_tokens"):
        kernel += "_half"  # float16 needs more registers than bfloat16, for scale factors that keep values in range
    config = launch_config(kernel, tokens, max(tokens.shape[3], values.shape[3]), tokens if slots is None else slots)
    if slots is None:  # the columns are the channels of a head, so a wider tile would only add padding
        tile = config.tile._replace(slots=min(config.tile.slots, padded(tokens.shape[3])))
        if kernel in ("linear_aggregate_forward", "linear_broadcast_slots"):  # more warps would compute the same features twice
            tile = tile._replace(num_warps=min(tile.num_warps, tile.slots // 16))
        config = replace(config, tile=tile)
    return replace(config, split=slots is not None and tokens.element_size() == 2)


def feature_strides(slots: Tensor | None) -> tuple[int, int, int]:
    """Return slot_strides(slots), or zeros if `slots` is None."""
    return (0, 0, 0) if slots is None else slot_strides(slots)
