"""Nystrom attention (Xiong et al., A Nystrom-Based Algorithm for Approximating Self-Attention, arXiv 2102.03902).

    out = F Z B v + conv(v),    F = softmax(scale q k~^T),    B = softmax(scale q~ k^T)                 equation 13 of the paper
    Z ~ pinv(A),    A = softmax(scale q~ k~^T)

q~ and k~ are landmarks: means of queries and of keys over segments of the sequence or cells of a grid. They are the slots in
two passes (see primitives/aggregate.py and primitives/broadcast.py). Between these passes, the values are multiplied by Z, an
approximate pseudo-inverse of the small matrix A:

    values = aggregate(q~, k, v)        out = broadcast(q, k~, Z values)

Only backend="reference" stores the attention weights between tokens and landmarks. Z is computed with a few iterations of a
third-order method (equation 11 of the paper), by default six. In general, Z has not converged to the pseudo-inverse after these
iterations. It acts as a filter on the spectrum of A, and trained weights depend on this filter.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from .. import backends
from ..layout import Pool
from ..plans import planned
from ..primitives.aggregate import aggregate_reference
from ..primitives.broadcast import broadcast_reference
from ..primitives.landmarks import landmarks_reference
from ..primitives.nystrom import mask_of_queries, nystrom
from ..primitives.pinv import INITS, pinv_reference
from ..primitives.token_conv import token_conv, token_conv_reference
from .checks import autocast, check_exact_rows, check_floating, check_integer, check_qkv, check_scale
from .exact import compute_exact_rows, with_exact_rows_reference
from .pooling import pooling
from .rope import Rope, check_rope

LANDMARKS = ("segment", "grid", "pad_front")


@planned
def nystrom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_landmarks: int = 64,
    landmarks: Literal["segment", "grid", "pad_front"] = "segment",
    grid_size: tuple[int, int] | None = None,
    prefix_tokens: int = 0,
    pinv_iterations: int = 6,
    pinv_init: Literal["exact", "original"] = "exact",
    conv_weight: Tensor | None = None,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    rope: Rope | None = None,
    exact_rows: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Approximate softmax(scale q k^T) v with landmarks.

    Args:
        q: (batch, heads, queries, head_dim), float16, bfloat16, float32 or float64. Views with last stride 1 are not copied.
        k: (batch, heads, tokens, head_dim).
        v: (batch, heads, tokens, value_dim).
        num_landmarks: number of landmarks for the tokens after the prefix, at most one per token.
        landmarks: how tokens are grouped. Each landmark is the mean of one group.
            "segment": segments of the sequence. If num_landmarks does not divide the number of tokens, the first segments are
            one token shorter than the others.
            "grid": cells of the grid that the tokens form, as in adaptive average pooling. The grid is divided into
            num_landmarks cells, which are as close to square as possible. num_landmarks must equal rows * columns with rows <=
            height and columns <= width. On images, "grid" is much more accurate than "segment".
            "pad_front": like "segment", but all-zero tokens are first added at the front until num_landmarks divides the number
            of tokens. Without a mask, queries also attend to these tokens. Use this option for weights from the
            nystrom-attention package.
        grid_size: for "grid", the (height, width) of the grid that the tokens after the prefix form.
        prefix_tokens: number of leading tokens (class and register tokens). Each of them is an additional, separate landmark.
            Not supported for "pad_front".
        pinv_iterations: number of iterations for the pseudo-inverse. Use the number with which the weights were trained.
        pinv_init: how to choose s in the initial matrix A^T / s. "exact": the largest column sum of each A.
            "original": the largest column sum over all heads and samples, so the output of a sample depends on the rest of the
            batch. Use "original" for weights trained with Nystromformer's published code.
        conv_weight: (heads, 1, taps, 1), the weight of a depthwise Conv2d over the tokens of v. The number of taps must be odd.
            The result of the convolution is added to the output.
        scale: scaling factor of the logits, > 0. Defaults to head_dim ** -0.5.
        key_padding_mask: bool (batch, tokens), True = valid. If there are as many queries as tokens, the mask also excludes
            padded queries from the landmarks of q. If a sample has no valid key, its output is 0.
        rope: rotary embedding of q and k, applied inside the kernels before landmarks are computed. Requires as many queries as
            tokens.
        exact_rows: the number of leading queries (class and register tokens) that use exact softmax attention. See
            ops/exact.py. The convolution is also added to these rows. Not supported for "pad_front".
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        (batch, heads, queries, value_dim) in q's dtype. Differentiable in q, k, v, conv_weight and rope.angles.

    Raises:
        ValueError, TypeError: an argument is invalid. The message names it and states the expected and the actual value.
        RuntimeError: backend="triton" was requested but cannot run here. The message lists every reason.
    """
    q, k, v = autocast(q, k, v)
    check_qkv(q, k, v, key_padding_mask)
    if rope is not None:
        check_rope(rope, q, k)
    scale = check_scale(scale, q.shape[3])
    _check_conv(conv_weight, q, k)
    check_nystrom(landmarks, pinv_iterations, pinv_init)
    if (landmarks == "grid") != (grid_size is not None):
        raise ValueError(f"grid_size: expected (height, width) for landmarks='grid', otherwise None, got {grid_size}")
    if landmarks == "pad_front" and prefix_tokens:
        raise ValueError(f"prefix_tokens: expected 0 for landmarks='pad_front', got {prefix_tokens}")
    if check_exact_rows(exact_rows, q) and landmarks == "pad_front":
        raise ValueError(f"exact_rows: expected 0 for landmarks='pad_front', got {exact_rows}")
    for tokens in (q.shape[2], k.shape[2]):
        pool = pooling("num_landmarks", num_landmarks, grid_size, prefix_tokens, tokens)
    backend = backends.resolve(backend, q, max(q.shape[3], v.shape[3]))
    queries, mask = q.shape[2], key_padding_mask
    if landmarks == "pad_front":
        q, k, v, mask, rope = _pad_front(q, k, v, mask, rope, num_landmarks)
    if backend == "reference":
        out = nystrom_attention_reference(
            q, k, v, pool=pool, pinv_iterations=pinv_iterations, pinv_init=pinv_init, conv_weight=conv_weight, scale=scale,
            key_padding_mask=mask, rope=rope, exact_rows=exact_rows,
        )  # fmt: skip
    else:
        rows = compute_exact_rows(q, k, v, exact_rows, scale, mask, rope, backend) if exact_rows else None
        if rows is not None and conv_weight is not None:
            reach = exact_rows + conv_weight.shape[2] // 2
            window, window_mask = v[:, :, :reach], None if mask is None else mask[:, :reach]
            rows = rows + token_conv(window, conv_weight, mask=window_mask, backend=backend)[:, :, :exact_rows]
        out = nystrom(
            q, k, v, conv_weight, mask, scale=scale, iterations=pinv_iterations, init=pinv_init, pool=Pool(**pool),
            rows=rows, rotary=None if rope is None else rope.rotary, backend=backend,
        )  # fmt: skip
    return out[:, :, -queries:] if landmarks == "pad_front" else out


def nystrom_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    pool: dict[str, Any],
    pinv_iterations: int = 6,
    pinv_init: str = "exact",
    conv_weight: Tensor | None = None,
    scale: float,
    key_padding_mask: Tensor | None = None,
    rope: Rope | None = None,
    exact_rows: int = 0,
) -> Tensor:
    """Return the result of `nystrom_attention`, computed in plain PyTorch.

    Keeps all attention weights between tokens and landmarks in memory. Supports all devices and torch.func transforms.
    """
    mask, q_mask = key_padding_mask, mask_of_queries(key_padding_mask, q)
    rotary = None if rope is None else rope.differentiable
    q_marks, k_marks, q_counts, k_counts = landmarks_reference(q, k, q_mask=q_mask, k_mask=mask, **pool, rotary=rotary)
    counts = {} if mask is None else dict(q_counts=q_counts, k_counts=k_counts)
    values, _ = aggregate_reference(q_marks, k, v, scale=scale, mask=mask, rotary=rotary)
    values = pinv_reference(q_marks, k_marks, values, scale=scale, iterations=pinv_iterations, init=pinv_init, **counts)
    out = broadcast_reference(q, k_marks, values, counts.get("k_counts"), scale=scale, rotary=rotary)
    out = with_exact_rows_reference(out, q, k, v, exact_rows, scale=scale, mask=mask, rope=rope)
    return out if conv_weight is None else out + token_conv_reference(v, conv_weight, mask=mask)


def _pad_front(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rope: Rope | None, num_landmarks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Rope | None]:
    """Return the arguments with all-zero tokens added at the front until num_landmarks divides the number of tokens."""

    def pad(x: Tensor, tokens: int, value: float = 0.0) -> Tensor:
        return F.pad(x, (0, 0, -tokens % num_landmarks, 0), value=value)

    queries, tokens = q.shape[2], k.shape[2]
    if rope is not None:
        angles = None if rope.angles is None else pad(rope.angles, tokens)
        rope = Rope(pad(rope.cos, tokens, 1.0), pad(rope.sin, tokens), rope.layout, angles)
    if mask is not None:
        mask = F.pad(mask, (-tokens % num_landmarks, 0), value=False)
    return pad(q, queries), pad(k, tokens), pad(v, tokens), mask, rope


def _check_conv(weight: Tensor | None, q: Tensor, k: Tensor) -> None:
    if weight is None:
        return
    check_floating("conv_weight", weight)
    if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[3] != 1:
        raise ValueError(f"conv_weight: expected shape (heads, 1, taps, 1), got {tuple(weight.shape)}")
    if weight.shape[0] != q.shape[1]:
        raise ValueError(f"conv_weight: expected q's {q.shape[1]} heads, got {weight.shape[0]}")
    if weight.shape[2] % 2 == 0:
        raise ValueError(f"conv_weight: expected an odd number of taps, got {weight.shape[2]}")
    if weight.device != q.device:
        raise ValueError(f"conv_weight: expected q's device {q.device}, got {weight.device}")
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"conv_weight: expected as many queries as tokens, got {q.shape[2]} queries and {k.shape[2]} tokens")


def check_nystrom(landmarks: str, pinv_iterations: int, pinv_init: str) -> None:
    if landmarks not in LANDMARKS:
        raise ValueError(f"landmarks: expected one of {', '.join(map(repr, LANDMARKS))}, got {landmarks!r}")
    check_integer("pinv_iterations", pinv_iterations, 0)
    if pinv_init not in INITS:
        raise ValueError(f"pinv_init: expected one of {', '.join(map(repr, INITS))}, got {pinv_init!r}")
