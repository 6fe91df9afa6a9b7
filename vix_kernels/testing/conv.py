"""Specification of the depthwise convolution over tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..primitives.token_conv import token_conv, token_conv_reference
from .problem import Case, OpSpec, make_mask, make_qkv, register

CONV_CASES = (
    Case("plain", taps=33),
    Case("packed", packed=True, taps=33),
    Case("pointwise", taps=1, width=24, tokens=19),
    Case("longer_than_the_sequence", taps=65, width=8, tokens=18),
    Case("one_token", tokens=1, taps=33),
    Case("masked", masked=True, taps=5),
)


def _token_conv(case: Case, tensor: Callable[..., Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    qkv = make_qkv(case, tensor)
    wide = torch.promote_types(qkv["v"].dtype, torch.float32)
    weight = tensor(case.heads, 1, case.taps, 1, dtype=wide, scale=case.taps**-0.5)
    return {"v": qkv["v"], "weight": weight}, dict(mask=make_mask(case, qkv["k"], qkv["v"]))


TOKEN_CONV = OpSpec(
    name="token_conv",
    function=token_conv,
    reference=token_conv_reference,
    build=_token_conv,
    differentiable=("v", "weight"),
    batched=("v", "mask"),
    cases=CONV_CASES,
    flops=lambda case: 2 * case.batch * case.heads * case.tokens * case.taps * (case.value_width or case.width),
)
register(TOKEN_CONV)
