"""Nystrom attention (Xiong et al., A Nystrom-Based Algorithm for Approximating Self-Attention, arXiv 2102.03902).

    out = F Z B v + conv(v),    F = softmax(scale q k~^T),    B = softmax(scale q~ k^T)                 equation 13 of the paper
    Z ~ pinv(A),    A = softmax(scale q~ k~^T)

q~ and k~ are landmarks, means of queries and of keys over segments of the sequence or cells of a grid. They are the slots of
the two moves, with the pseudo-inverse of a small matrix between them:

    values = aggregate(q~, k, v)        out = broadcast(q, k~, Z values)

so neither an attention of tokens to landmarks nor one of tokens to tokens is ever stored. Z is what six steps of an iteration
of order three reach (equation 11 of the paper), a filter on the spectrum of A that is part of the model: not its limit.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from .. import backends
from ..layout import Pool
from ..primitives.aggregate import aggregate_reference
from ..primitives.broadcast import bias_of_taking_part, broadcast_reference
from ..primitives.landmarks import landmarks_reference
from ..primitives.nystrom import mask_of_queries, nystrom
from ..primitives.pinv import INITS, pinv_reference
from ..primitives.token_conv import token_conv_reference
from .checks import autocast, check_floating, check_integer, check_mask, check_qkv, check_scale
from .pooling import pooling
from .rope import Rope, check_rope

LANDMARKS = ("segment", "grid", "pad_front")


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
    backend: str = "auto",
) -> Tensor:
    """Approximation of softmax(scale q k^T) v through landmarks.

    Args:
        q: (batch, heads, queries, head_dim), float16, bfloat16, float32 or float64. Any strides with a unit last one.
        k: (batch, heads, tokens, head_dim).
        v: (batch, heads, tokens, value_dim).
        num_landmarks: how many means the tokens behind the prefix are pooled to; at most as many as these tokens.
        landmarks: where they stand. "segment": equal runs of the sequence, the first ones a token shorter where the number
            does not divide. "grid": cells of the (height, width) map `grid_size`, by adaptive average pooling to the rows x
            columns = num_landmarks that fit its aspect best; on images it is by far the better one. "pad_front": segments of
            a sequence that is padded with zero tokens in front to a multiple, which without a mask are keys too, as in the
            package nystrom-attention; for its weights.
        grid_size: height and width of the token map behind the prefix, for "grid".
        prefix_tokens: tokens in front (class, registers) that are landmarks of their own, beyond num_landmarks.
        pinv_iterations: steps to the pseudo-inverse; weights belong to the number they were trained with.
        pinv_init: what the iteration starts from: "exact", each matrix over its own norm, or "original", over the largest of
            the batch as in the published code, so that samples depend on their batch mates; for its weights.
        conv_weight: (heads, 1, taps, 1), the weight of a depthwise Conv2d over the tokens of v whose result is added; odd taps.
        scale: a number > 0, default head_dim ** -0.5.
        key_padding_mask: bool (batch, tokens), True = the token takes part. With as many queries as tokens it also leaves
            padding out of the landmarks of q. A sample without any valid key returns 0.
        rope: rotary embedding of q and k, applied inside the kernels, landmarks included; needs as many queries as tokens.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        (batch, heads, queries, value_dim) in q's dtype. Differentiable in q, k, v, conv_weight and rope.angles.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it, what was expected and what came.
        RuntimeError: backend="triton" cannot run here; the message lists every reason.
    """
    q, k, v = autocast(q, k, v)
    check_qkv(q, k, v)
    check_mask(key_padding_mask, k)
    if rope is not None:
        check_rope(rope, q, k)
    scale = check_scale(scale, q.shape[3])
    _check_conv(conv_weight, q, k)
    check_nystrom(landmarks, pinv_iterations, pinv_init)
    if (landmarks == "grid") != (grid_size is not None):
        raise ValueError(f"grid_size: expected (height, width) for landmarks='grid' and None else, got {grid_size}")
    if landmarks == "pad_front" and prefix_tokens:
        raise ValueError(f"prefix_tokens: expected 0 for landmarks='pad_front', got {prefix_tokens}")
    for tokens in (q.shape[2], k.shape[2]):
        pool = pooling("num_landmarks", num_landmarks, grid_size, prefix_tokens, tokens)
    backend = backends.resolve(backend, q, max(q.shape[3], v.shape[3]))
    queries, mask = q.shape[2], key_padding_mask
    if landmarks == "pad_front":
        q, k, v, mask, rope = _pad_front(q, k, v, mask, rope, num_landmarks)
    if backend == "reference":
        out = nystrom_attention_reference(
            q, k, v, pool=pool, pinv_iterations=pinv_iterations, pinv_init=pinv_init, conv_weight=conv_weight, scale=scale,
            key_padding_mask=mask, rope=rope,
        )  # fmt: skip
    else:
        out = nystrom(
            q, k, v, conv_weight, mask, scale=scale, iterations=pinv_iterations, init=pinv_init, pool=Pool(**pool),
            rotary=None if rope is None else rope.rotary, backend=backend,
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
) -> Tensor:
    """The equations with all N x L shares in memory, in plain PyTorch; any device, any transform."""
    mask, q_mask = key_padding_mask, mask_of_queries(key_padding_mask, q)
    rotary = None if rope is None else rope.differentiable
    q_marks, k_marks, q_counts, k_counts = landmarks_reference(q, k, q_mask=q_mask, k_mask=mask, **pool, rotary=rotary)
    counts = {} if mask is None else dict(q_counts=q_counts, k_counts=k_counts)
    values, _ = aggregate_reference(q_marks, k, v, scale=scale, mask=mask, rotary=rotary)
    values = pinv_reference(q_marks, k_marks, values, scale=scale, iterations=pinv_iterations, init=pinv_init, **counts)
    bias = None if mask is None else bias_of_taking_part(k_counts > 0, values)
    out = broadcast_reference(q, k_marks, values, bias, scale=scale, rotary=rotary)
    return out if conv_weight is None else out + token_conv_reference(v, conv_weight, mask=mask)


def _pad_front(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rope: Rope | None, num_landmarks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Rope | None]:
    """Zero tokens in front, up to a multiple of num_landmarks; they are not rotated."""

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
        raise ValueError(f"conv_weight: expected as many queries as tokens, got {q.shape[2]} and {k.shape[2]}")


def check_nystrom(landmarks: str, pinv_iterations: int, pinv_init: str) -> None:
    if landmarks not in LANDMARKS:
        raise ValueError(f"landmarks: expected one of {', '.join(map(repr, LANDMARKS))}, got {landmarks!r}")
    check_integer("pinv_iterations", pinv_iterations, 0)
    if pinv_init not in INITS:
        raise ValueError(f"pinv_init: expected one of {', '.join(map(repr, INITS))}, got {pinv_init!r}")
