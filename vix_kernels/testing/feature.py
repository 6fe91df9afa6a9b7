"""Specification of attention with learned features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.feature import feature_attention, feature_attention_reference
from .performer import COMPILED_FEATURES
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
    make_projection,
    make_qkv,
    make_rope,
    register,
)

CASES = (
    Case("plain"),
    Case("one_feature", batch=1, features=1, tokens=20),
    Case("odd_width", batch=1, width=24, value_width=40, queries=19, features=36),
    Case("masked", masked=True, features=17),
    Case("per_head", per_head=True, features=16),
    Case("rope_partial", rope="half", rotary=8, prefix=1, width=24, masked=True, per_head=True),
    Case("exact", exact=2, masked=True, rope="interleaved", width=24, per_head=True, features=16),
)


def _feature(case: Case, tensor: Callable[..., Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and options. `gaussian`, the factor of |k|^2 / 2, is 0, 0.25 or 1, so that its square root is exact."""
    qkv = make_qkv(case, tensor)
    mask, features = make_mask(case, qkv["k"], qkv["v"]), make_projection(case, qkv["q"])
    bias = tensor(*features.shape[:-1], dtype=torch.promote_types(qkv["q"].dtype, torch.float32))
    options = dict(
        gaussian=0.25 if case.masked else not case.per_head, scale=exact_scale(case), key_padding_mask=mask,
        rope=make_rope(case, qkv["q"].device), **make_exact(case),
    )  # fmt: skip
    return qkv | dict(query_features=features.flip(-2), key_features=features, feature_bias=bias), options


FEATURE = OpSpec(
    name="feature_attention",
    function=feature_attention,
    reference=feature_attention_reference,
    build=_feature,
    differentiable=("q", "k", "v", "query_features", "key_features", "feature_bias"),
    fixed=("query_features", "key_features", "feature_bias"),
    batched=("q", "k", "v", "key_padding_mask"),
    cases=CASES,
    flops=lambda case: aggregate_flops(case) + broadcast_flops(case),
    exps=lambda case: aggregate_exps(case) + broadcast_exps(case),
    public=True,
    compiled=tuple(Case("", features=count) for count in COMPILED_FEATURES),
    variants=(Case("+learned", features=32, learned=True),),
)
register(FEATURE)
