"""Device functions that all `pinv` kernels use.

They load landmarks, and compute the attention weights A and the divisor s (see primitives/pinv.py for the equations).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import LOG2E, load_tile, row_products


@triton.jit
def has_landmark(counts, i_b, counts_b, counts_l, landmarks, L, MASKED: tl.constexpr):
    """Return, for each index in `landmarks`, whether the landmark is valid.

    A landmark is valid if its index is below L. If MASKED, it must also be the mean of at least one token.
    """
    valid = landmarks < L
    if MASKED:
        valid &= tl.load(counts + i_b * counts_b + landmarks.to(tl.int64) * counts_l, mask=valid, other=0.0) > 0
    return valid


@triton.jit
def load_rows(
    base, stride, rows, column, counts, i_b, counts_b, counts_l, L,
    WIDTH: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Load STEP columns of `base`, starting at `column`, for the landmarks `rows`. Rows of invalid landmarks are 0."""
    valid = has_landmark(counts, i_b, counts_b, counts_l, rows, L, MASKED)
    return load_tile(base, rows, stride, valid, WIDTH, STEP, 0, True, False, column)


@triton.jit
def attention(
    q, k, q_l, k_l, rows, columns, has_row, has_column, scale,
    D: tl.constexpr, STEP: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return rows of A, the attention weights between query and key landmarks. Rows and columns of invalid landmarks are 0."""
    logits = tl.zeros((rows.shape[0], columns.shape[0]), COMPUTE)
    for column in tl.range(0, D, STEP, disable_licm=True):
        b_q = load_tile(q, rows, q_l, has_row, D, STEP, 0, True, False, column)
        b_k = load_tile(k, columns, k_l, has_column, D, STEP, 0, True, False, column)
        logits = row_products(b_q, b_k, logits, PRECISION)
    logits = tl.where(has_column[None, :], logits * (scale * LOG2E), float("-inf"))
    row_max = tl.max(logits, 1)
    a = tl.exp2(logits - tl.where(row_max == float("-inf"), 0.0, row_max)[:, None])
    total = tl.sum(a, 1)
    return tl.where(has_row[:, None], a / tl.where(total == 0, 1.0, total)[:, None], 0.0)


@triton.jit
def start_scale(sums):
    """Return s and, for each column of A, the fraction of the gradient of s that the column receives.

    s is the divisor in Z_0 = A^T / s: the largest column sum of A, or 1 if that sum is 0.
    """
    s = tl.max(sums, 0)
    largest = (sums == s).to(sums.dtype)
    return tl.where(s == 0, 1.0, s), largest / tl.sum(largest, 0)
