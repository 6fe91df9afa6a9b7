"""Specification of Fourier mixing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..ops.fourier import fourier_mixing, fourier_mixing_reference
from .problem import Case, OpSpec, register

CASES = (  # the cases cover one tile and several tiles along each axis, and even and odd lengths
    Case("plain"),
    Case("packed", tokens=36, heads=3, packed=True),
    Case("one_token", tokens=1),
    Case("one_channel", heads=1, width=1, tokens=19),
    Case("odd", batch=1, tokens=35, heads=3, width=7),
    Case("even", batch=1, tokens=40, heads=5, width=14),
    Case("image", batch=1, tokens=197, heads=3, width=8),
)


def _fourier(case: Case, tensor: Callable[..., Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    channels = case.heads * case.width
    if case.packed:  # x is a view of a wider tensor
        return {"x": tensor(case.batch, case.tokens, 3, channels)[:, :, 1]}, dict(norm="ortho")
    return {"x": tensor(case.batch, case.tokens, channels)}, {}


def _flops(case: Case) -> int:
    """Return the FLOPs of the cheaper algorithm: matrix products that use the symmetry along both axes, or a real FFT."""
    channels = case.heads * case.width
    size = case.tokens * channels
    return case.batch * min(size * (case.tokens + channels) // 2, round(2.5 * size * math.log2(size)))


FOURIER = OpSpec(
    name="fourier_mixing",
    function=fourier_mixing,
    reference=fourier_mixing_reference,
    build=_fourier,
    differentiable=("x",),
    batched=("x",),
    cases=CASES,
    flops=_flops,
    backward=1.0,
    public=True,
    variants=(Case("", features=0),),
)
register(FOURIER)
