"""Specification of the pseudo-inverse in Nystrom attention. In the test cases, `features` is the number of landmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..primitives.pinv import pinv, pinv_reference
from .problem import Case, OpSpec, register

ITERATIONS = 3  # large enough that every loop over steps in the kernels runs at least once
CASES = (
    Case("plain", batch=1, features=20),
    Case("one_landmark", features=1),
    Case("odd_width", batch=1, heads=1, features=18, width=24, value_width=40),
    Case("packed", features=12, packed=True),
    Case("masked", heads=1, features=20, masked=True),
    Case("wide", batch=1, heads=1, features=64, width=40),
    Case("many", batch=1, heads=1, features=70, masked=True),
)


def _pinv(case: Case, tensor: Callable[..., Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return random landmarks of queries and keys, random values, and options.

    In a masked case, some landmarks have no valid token and contain NaN. If there are several samples, no landmark of the last
    sample has a valid token.
    """
    shape = (case.batch, case.heads, case.features)
    if case.packed:
        q, k = tensor(case.batch, case.features, 2, case.heads, case.width).permute(2, 0, 3, 1, 4)
    else:
        q, k = tensor(*shape, case.width), tensor(*shape, case.width)
    values = tensor(*shape, case.value_width or case.width, dtype=torch.promote_types(q.dtype, torch.float32))
    counts: dict[str, Tensor] = {}
    if case.masked:
        generator = torch.Generator().manual_seed(1)
        for name, marks in (("q_counts", (q, values)), ("k_counts", (k,))):
            count = torch.randint(0, 3, (case.batch, case.features), generator=generator).float()
            count[-1, :] *= case.batch == 1
            counts[name] = count.to(q.device)
            for each in marks:
                each.masked_fill_((counts[name] == 0)[:, None, :, None], float("nan"))
    return {"q_marks": q, "k_marks": k, "values": values}, dict(scale=case.width**-0.5, iterations=ITERATIONS, **counts)


def _flops(case: Case) -> int:
    """Return the FLOPs of the attention between landmarks, four products per iteration, and the product with the values."""
    square = 2 * case.batch * case.heads * case.features**2
    return square * (case.width + 4 * ITERATIONS * case.features + (case.value_width or case.width))


PINV = OpSpec(
    name="pinv",
    function=pinv,
    reference=pinv_reference,
    build=_pinv,
    differentiable=("q_marks", "k_marks", "values"),
    batched=("q_marks", "k_marks", "values", "q_counts", "k_counts"),
    cases=CASES,
    flops=_flops,
    exps=lambda case: case.batch * case.heads * case.features**2,
    backward=3.0,  # the backward pass recomputes the four products of each iteration, and needs eight more for gradients
)
register(PINV)
