"""Specifications of Performer attention, and of `aggregate` and `broadcast`, which compute it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.performer import performer_attention, performer_attention_reference
from ..primitives.aggregate import aggregate, aggregate_reference
from ..primitives.broadcast import broadcast, broadcast_reference
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
    make_tables,
    register,
)

CASES = (
    Case("plain"),
    Case("packed", packed=True),
    Case("one_token", tokens=1),
    Case("one_feature", batch=1, features=1, tokens=20),
    Case("narrowest", batch=1, width=8, features=17, tokens=19),
    Case("odd_width", batch=1, width=24, value_width=40),
    Case("narrow_values", batch=1, width=40, value_width=8),
    Case("widest", batch=1, heads=1, width=256, tokens=18, features=18),
    Case("fewer_queries", batch=1, queries=19),
    Case("more_queries", batch=1, queries=53, tokens=20),
    Case("masked", masked=True),
    Case("sharp", batch=1, spread=3.0),
    Case("per_head", per_head=True),
    Case("rope", batch=1, rope="interleaved", packed=True),
    Case("rope_half", batch=1, rope="half"),
    Case("rope_partial", rope="half", rotary=8, prefix=1, width=24, masked=True),
    Case("rope_odd_width", batch=1, rope="interleaved", width=40, rotary=24, prefix=2),
)
EXACT = (
    Case("exact", batch=1, exact=2, queries=19),
    Case("exact_masked", exact=3, masked=True, rope="half", rotary=8, prefix=1, width=24, value_width=40),
)
COMPILED_FEATURES = (16, 110, 266)  # fewer features than fit in a tile, and the defaults for head widths 32 and 64


def _performer(case: Case, tensor: Callable[..., Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    qkv = make_qkv(case, tensor)
    device = qkv["q"].device
    mask = make_mask(case, qkv["k"], qkv["v"])
    options = dict(
        scale=exact_scale(case), key_padding_mask=mask, rope=make_rope(case, device), **make_exact(case)
    )  # fmt: skip
    return qkv | {"projection": make_projection(case, qkv["q"])}, options


def _aggregate(case: Case, tensor: Callable[..., Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    qkv = make_qkv(case, tensor)
    k, v = qkv["k"], qkv["v"]
    slots = _slots(case, tensor, k)
    options = dict(
        scale=exact_scale(case) ** 0.5, gaussian=not case.per_head, mask=make_mask(case, k, v), **make_tables(case, k.device)
    )
    return {"slots": slots, "k": k, "v": v}, options


def _broadcast(case: Case, tensor: Callable[..., Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    q = make_qkv(case, tensor)["q"]
    wide = torch.promote_types(q.dtype, torch.float32)
    slots = _slots(case, tensor, q)
    values = tensor(case.batch, case.heads, case.features, case.value_width or case.width, dtype=wide)
    bias = tensor(case.batch, case.heads, case.features, dtype=wide)
    if case.masked:  # some slots have no valid key
        bias[:, :, ::3] = float("-inf")
        bias[-1] = float("-inf")
    return {"q": q, "slots": slots, "values": values, "slot_bias": bias}, dict(
        scale=exact_scale(case) ** 0.5, **make_tables(case, q.device)
    )


def _slots(case: Case, tensor: Callable[..., Tensor], tokens: Tensor) -> Tensor:
    """Return random slots for `aggregate` or `broadcast`.

    If `case.per_head` is set, the slots differ between samples and heads, like pooled tokens, and have the problem's dtype.
    Otherwise, the slots are random features in float32, or in float64 if `tokens` is in float64.
    """
    if case.per_head:
        return tensor(case.batch, case.heads, case.features, case.width)
    return make_projection(case, tokens)[None, None]


PERFORMER = OpSpec(
    name="performer_attention",
    function=performer_attention,
    reference=performer_attention_reference,
    build=_performer,
    differentiable=("q", "k", "v", "projection"),
    fixed=("projection",),
    batched=("q", "k", "v", "key_padding_mask"),
    cases=CASES + EXACT,
    flops=lambda case: aggregate_flops(case) + broadcast_flops(case),
    exps=lambda case: aggregate_exps(case) + broadcast_exps(case),
    public=True,
    compiled=tuple(Case("", features=count) for count in COMPILED_FEATURES),
    variants=(
        *(Case("+rope", features=count, rope="interleaved") for count in COMPILED_FEATURES),
        Case("+learned", features=266, learned=True),
    ),
)
AGGREGATE = OpSpec(
    name="aggregate",
    function=aggregate,
    reference=aggregate_reference,
    build=_aggregate,
    differentiable=("slots", "k", "v"),
    fixed=("slots",),
    batched=("k", "v", "slots", "mask"),
    cases=tuple(case for case in CASES if case.queries is None),
    flops=aggregate_flops,
    exps=aggregate_exps,
)
BROADCAST = OpSpec(
    name="broadcast",
    function=broadcast,
    reference=broadcast_reference,
    build=_broadcast,
    differentiable=("q", "slots", "values", "slot_bias"),
    fixed=("slots",),
    batched=("q", "slots", "values", "slot_bias"),
    cases=tuple(case for case in CASES if case.queries is None),
    flops=broadcast_flops,
    exps=broadcast_exps,
)
register(PERFORMER, AGGREGATE, BROADCAST)
