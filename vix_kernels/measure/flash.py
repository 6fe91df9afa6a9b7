"""A FlashAttention forward kernel for comparing predicted times with published measurements.

bench/break_even.py uses the same kernel to predict the time of softmax attention. The kernel follows algorithm 1 of
FlashAttention-2 (arXiv:2307.08691): a program keeps a tile of queries and loops over the keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .._triton.launch import launch
from .compile_cell import compile_launches
from .launch_times import predict
from .observed import observed
from .roofline import GPUS

# TFLOP/s of the forward pass of Triton's tutorial kernel on an H100 80GB SXM5 in FP16, by (head width, causal) and for each
# length in LENGTHS. Source: FlashAttention-3 (arXiv:2407.08608), figure 5, bars labeled "Triton". A batch has 16,384 tokens in
# total, and all heads together have 2,048 channels. A causal pass counts as half as many FLOPs.
PUBLISHED = {
    (64, False): (382, 400, 403),
    (64, True): (288, 363, 363),
    (128, False): (372, 389, 395),
    (128, True): (273, 353, 378),
}
LENGTHS = (1024, 4096, 16384)
TOTAL_TOKENS, TOTAL_CHANNELS = 16384, 2048
# The range of published time / predicted time over the entries of PUBLISHED. `vix dev roofline --calibrate` prints all ratios.
FACTOR = (1.9, 3.2)


@triton.jit
def attend(
    b_q, k, v, b_max, b_sum, b_out, first, last, start_m, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Update the running maximum, sum and output with keys `first` to `last` - 1. If MASKED, each query ignores later keys."""
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, D)
    for start in range(first, last, BLOCK_N):
        b_k = tl.load(k + (start + o_n)[:, None] * D + o_d[None, :])
        b_v = tl.load(v + (start + o_n)[:, None] * D + o_d[None, :])
        b_s = tl.dot(b_q, tl.trans(b_k))
        if MASKED:
            b_s = tl.where((start_m + tl.arange(0, BLOCK_M))[:, None] >= (start + o_n)[None, :], b_s, float("-inf"))
        new_max = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - new_max[:, None])
        decay = tl.exp2(b_max - new_max)
        b_sum = b_sum * decay + tl.sum(b_p, 1)
        # With b_out * decay as the accumulator of the product, ptxas would serialize the products.
        b_pv = tl.dot(b_p.to(b_k.dtype), b_v)
        b_out = tl.fma(b_out, tl.broadcast_to(decay[:, None], (BLOCK_M, D)), b_pv)
        b_max = new_max
    return b_max, b_sum, b_out


@triton.jit(do_not_specialize=["scale"])
def flash_forward_kernel(
    q, k, v, out, lse, scale, N, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Compute out and lse (base 2) of a tile of queries. N must be a multiple of BLOCK_M and BLOCK_N."""
    start_m, i_bh = tl.program_id(0) * BLOCK_M, tl.program_id(1).to(tl.int64)
    o_m, o_d = start_m + tl.arange(0, BLOCK_M), tl.arange(0, D)
    q += i_bh * N * D
    k += i_bh * N * D
    v += i_bh * N * D
    b_q = tl.load(q + o_m[:, None] * D + o_d[None, :])
    b_q = (b_q * (scale * 1.44269504)).to(b_q.dtype)
    b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_out = tl.zeros((BLOCK_M, D), tl.float32)
    last = start_m if CAUSAL else N
    b_max, b_sum, b_out = attend(b_q, k, v, b_max, b_sum, b_out, 0, last, start_m, D, BLOCK_M, BLOCK_N, False)
    if CAUSAL:
        last = start_m + BLOCK_M
        b_max, b_sum, b_out = attend(b_q, k, v, b_max, b_sum, b_out, start_m, last, start_m, D, BLOCK_M, BLOCK_N, True)
    tl.store(out + i_bh * N * D + o_m[:, None] * D + o_d[None, :], (b_out / b_sum[:, None]).to(out.dtype.element_ty))
    tl.store(lse + i_bh * N + o_m, b_max + tl.log2(b_sum))


def flash_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Compute softmax attention for contiguous q, k and v (batch, heads, N, D). N must be a multiple of the tile sizes."""
    batch, heads, tokens, width = q.shape
    out, lse = torch.empty_like(q), q.new_empty(batch, heads, tokens, dtype=torch.float32)
    block_m, block_n = min(128, tokens), 64
    grid = tokens // block_m, batch * heads
    meta = dict(D=width, BLOCK_M=block_m, BLOCK_N=min(block_n, tokens), CAUSAL=causal)
    options = dict(num_warps=8, num_stages=3, enable_fp_fusion=True)
    launch(flash_forward_kernel, grid, q, k, v, out, lse, width**-0.5, tokens, **meta, **options)
    return out


@dataclass(frozen=True)
class Comparison:
    """A published time (`measured`) and the corresponding prediction, in seconds."""

    width: int
    causal: bool
    tokens: int
    measured: float
    predicted: float
    bound: str

    @property
    def factor(self) -> float:
        return self.measured / self.predicted


def calibrate() -> Iterator[Comparison]:
    """Yield a Comparison for each published time, with the prediction for the H100."""
    gpu = next(gpu for gpu in GPUS if gpu.name == "H100")
    for (width, causal), speeds in PUBLISHED.items():
        for tokens, speed in zip(LENGTHS, speeds, strict=True):
            shape = TOTAL_TOKENS // tokens, TOTAL_CHANNELS // width, tokens, width
            with observed(gpu.arch) as launches:
                flash_forward(*(torch.empty(shape, dtype=torch.float16, device="meta") for _ in range(3)), causal)
            errors: list[str] = []
            (row,) = compile_launches(gpu.arch, launches, errors)
            flops = 4 * TOTAL_TOKENS * tokens * TOTAL_CHANNELS / (2 if causal else 1)
            found = predict(launches[0], row.parts, row.warps, gpu)
            yield Comparison(width, causal, tokens, flops / (speed * 1e12), found.seconds, found.bound)
