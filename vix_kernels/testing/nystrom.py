"""Specification of Nystrom attention with its residual convolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..ops.nystrom import nystrom_attention
from .problem import (
    Case,
    OpSpec,
    aggregate_exps,
    aggregate_flops,
    broadcast_exps,
    broadcast_flops,
    exact_scale,
    make_exact,
    make_mask,
    make_qkv,
    make_rope,
    register,
)

CASES = (  # only a few cases, because they are slow in Triton's interpreter; the operators in primitives/ have separate cases
    Case("plain", batch=1, taps=5, features=6, packed=True),
    Case("one_token", tokens=1, features=1),
    Case("odd_width", batch=1, width=24, value_width=40, features=5, tokens=20),
    Case("masked", heads=1, masked=True, rope="half", rotary=8, prefix=1, width=24, tokens=26, features=6),
    Case("grid", batch=1, tokens=20, rows=4, features=6, adaptive=True),
    Case("exact", exact=2, masked=True, rope="half", rotary=8, prefix=1, width=24, tokens=26, features=6, taps=5),
)


def _landmarks(case: Case) -> int:
    return min(case.features, case.tokens - case.prefix)


def _nystrom(case: Case, tensor: Callable[..., Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    qkv = make_qkv(case, tensor)
    tensors = qkv | {"conv_weight": tensor(case.heads, 1, case.taps, 1, scale=case.taps**-0.5)}
    grid = dict(landmarks="grid", grid_size=(case.rows, (case.tokens - case.prefix) // case.rows)) if case.adaptive else {}
    mask, rope = make_mask(case, qkv["k"], qkv["v"]), make_rope(case, qkv["q"].device)
    options = dict(num_landmarks=_landmarks(case), prefix_tokens=case.prefix, scale=exact_scale(case), **grid)
    return tensors, options | dict(key_padding_mask=mask, rope=rope, **make_exact(case))


def _function(q: Tensor, k: Tensor, v: Tensor, conv_weight: Tensor, **options: Any) -> Tensor:
    return nystrom_attention(q, k, v, conv_weight=conv_weight, **options)


def _with_landmarks(count: Callable[[Case], int]) -> Callable[[Case], int]:
    """Return a function that sets a case's `features` to the number of landmarks and prefix tokens, then calls `count`."""
    return lambda case: count(Case(**{**vars(case), "features": _landmarks(case) + case.prefix}))


NYSTROM = OpSpec(
    name="nystrom_attention",
    function=_function,
    reference=lambda *tensors, **options: _function(*tensors, **options, backend="reference"),
    build=_nystrom,
    differentiable=("q", "k", "v", "conv_weight"),
    batched=("q", "k", "v", "key_padding_mask"),
    cases=CASES,
    # The convolution and the pseudo-inverse are not counted. With 64 landmarks and 33 taps, the convolution would add 13 %. The
    # pseudo-inverse would add only a few percent if there are many more tokens than landmarks.
    flops=_with_landmarks(lambda case: aggregate_flops(case) + broadcast_flops(case)),
    exps=_with_landmarks(lambda case: aggregate_exps(case) + broadcast_exps(case)),
    public=True,
    compiled=(Case("", features=64, taps=33),),
    # With up to 64 landmarks, the forward kernel of `pinv` can keep its matrices in registers. With more landmarks, they are in
    # global memory, so one case has 128 landmarks.
    variants=(Case("+rope", features=64, taps=33, rope="interleaved"), Case("+landmarks", features=128, taps=33)),
    most_features=64,  # the published number of landmarks, which is lower than the number of features of Performer
)
register(NYSTROM)
