"""Specification of `landmarks`, which averages groups of queries and groups of keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..primitives.landmarks import landmarks, landmarks_reference
from .problem import Case, OpSpec, make_mask, make_qkv, make_tables, register

CASES = (
    Case("plain", tokens=36, features=2),
    Case("more_queries", batch=1, queries=53, features=9, width=24),
    Case("packed", packed=True, rows=4, mark_rows=2, features=3, prefix=1),
    Case("masked", features=12, masked=True, prefix=2),
    Case("rope_half", batch=1, rows=5, mark_rows=2, features=3, rope="half", prefix=2, adaptive=True),
    Case("partly_rotated", features=5, rope="half", rotary=8, prefix=1, width=24, masked=True),
)


def _landmarks(case: Case, tensor: Callable[..., Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    qkv = make_qkv(case, tensor)
    q, k = qkv["q"], qkv["k"]
    mask = make_mask(case, k, q)
    columns = (case.tokens - case.prefix) // case.rows
    options = dict(
        prefix=case.tokens - case.rows * columns,  # leftover tokens come before the grid
        rows=case.rows,
        mark_rows=min(case.mark_rows, case.rows),
        mark_columns=min(case.features, columns),
        adaptive=case.adaptive,
        q_mask=mask,
        k_mask=mask,
    )
    return {"q": q, "k": k}, options | make_tables(case, q.device)


LANDMARKS = OpSpec(
    name="landmarks",
    function=lambda *tensors, **options: landmarks(*tensors, **options)[:2],  # counts have no gradient
    reference=lambda *tensors, **options: landmarks_reference(*tensors, **options)[:2],
    build=_landmarks,
    differentiable=("q", "k"),
    batched=("q", "k", "q_mask", "k_mask"),
    cases=CASES,
    flops=lambda case: 2 * case.batch * case.heads * case.tokens * case.width,  # one addition per element of q and k
    backward=1.0,
)
register(LANDMARKS)
