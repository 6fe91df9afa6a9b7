"""Specifications of linear attention, with and without a projection to features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..ops.linear import linear_attention, linear_attention_reference
from .problem import (
    Case,
    OpSpec,
    aggregate_exps,
    aggregate_flops,
    broadcast_exps,
    broadcast_flops,
    make_mask,
    make_projection,
    make_qkv,
    make_rope,
    register,
)

LINEAR_CASES = (
    Case("plain"),
    Case("packed", packed=True, feature_map="elu"),
    Case("one_token", tokens=1, feature_map="elu", eps=0.0),
    Case("narrowest", batch=1, width=8, tokens=19),
    Case("odd_width", batch=1, width=24, value_width=40, feature_map="elu"),
    Case("narrow_values", batch=1, width=40, value_width=8),
    Case("widest", batch=1, heads=1, width=256, tokens=18),
    Case("fewer_queries", batch=1, queries=19, feature_map="elu"),
    Case("more_queries", batch=1, queries=53, tokens=20),
    Case("masked", masked=True, feature_map="elu"),
    Case("masked_relu", masked=True),
    Case("rope", batch=1, rope="interleaved", packed=True),
    Case("rope_half", batch=1, rope="half", width=40, feature_map="elu"),
    Case("rope_partial", rope="half", rotary=8, prefix=1, width=24, masked=True, feature_map="elu"),
)
PROJECTED_CASES = (
    Case("plain"),
    Case("widest", batch=1, heads=1, width=256, tokens=18, features=18, feature_map="elu"),
    Case("masked", masked=True, feature_map="elu"),
    Case("per_head", per_head=True),
    Case("rope_half", batch=1, rope="half"),
)


def _linear(case: Case, tensor: Callable[..., Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    qkv = make_qkv(case, tensor)
    mask, rope = make_mask(case, qkv["k"], qkv["v"]), make_rope(case, qkv["q"].device)
    return qkv, dict(feature_map=case.feature_map, eps=case.eps, key_padding_mask=mask, rope=rope)


def _linear_projected(case: Case, tensor: Callable[..., Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    qkv, options = _linear(case, tensor)
    return qkv | {"projection": make_projection(case, qkv["q"])}, options


def _channels(case: Case) -> int:
    """Return the total number of elements of q and k."""
    return case.batch * case.heads * (case.tokens + (case.queries or case.tokens)) * case.width


LINEAR = OpSpec(
    name="linear_attention",
    function=linear_attention,
    reference=linear_attention_reference,
    build=_linear,
    differentiable=("q", "k", "v"),
    batched=("q", "k", "v", "key_padding_mask"),
    cases=LINEAR_CASES,
    flops=lambda case: 2 * _channels(case) * (case.value_width or case.width),
    exps=lambda case: _channels(case) * (case.feature_map == "elu"),
    public=True,
    compiled=(Case("", features=0),),
    variants=(Case("+elu+rope", features=0, feature_map="elu", rope="interleaved"),),
)
PROJECTED = OpSpec(
    name="linear_attention_projected",
    function=lambda q, k, v, projection, **options: linear_attention(q, k, v, projection=projection, **options),
    reference=lambda q, k, v, projection, **options: linear_attention_reference(q, k, v, projection=projection, **options),
    build=_linear_projected,
    differentiable=("q", "k", "v", "projection"),
    fixed=("projection",),
    batched=("q", "k", "v", "key_padding_mask"),
    cases=PROJECTED_CASES,
    flops=lambda case: aggregate_flops(case) + broadcast_flops(case),
    exps=lambda case: (aggregate_exps(case) + broadcast_exps(case)) * (case.feature_map == "elu"),
    variants=(
        Case("", features=128),
        Case("+elu", features=128, feature_map="elu"),
        Case("+learned", features=266, learned=True),
    ),
)
register(LINEAR, PROJECTED)
