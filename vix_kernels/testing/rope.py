"""Specifications of the rotary embedding, and of operators with learned angles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ops.rope import apply_rope, apply_rope_reference, rope_mixed
from .linear import LINEAR
from .performer import CASES, PERFORMER
from .problem import Case, OpSpec, make_qkv, make_rope, register

MIXED_CASES = (  # for learned angles, with 1 prefix token and 4 rows of 9 tokens
    Case("rope", rope="interleaved", prefix=1),
    Case("rope_partial", rope="half", rotary=8, prefix=1, width=24, masked=True),
)


def _apply_rope(case: Case, tensor: Callable[..., Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    qkv = make_qkv(case, tensor)
    return {"q": qkv["q"], "k": qkv["k"]}, dict(rope=make_rope(case, qkv["q"].device))


def _with_frequencies(build: Callable) -> Callable:
    """Return a function that builds the same problems as `build`, but with learned angles.

    The tokens after the prefix form a grid.
    """

    def mixed(case: Case, tensor: Callable[..., Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, options = build(replace(case, rope=None), tensor)
        wide = torch.promote_types(tensors["q"].dtype, torch.float32)
        tensors["frequencies"] = tensor(2, case.heads, (case.rotary or case.width) // 2, dtype=wide, scale=0.3)
        del options["rope"]
        return tensors, options | dict(rows=4, layout=case.rope or "interleaved", prefix=case.prefix)

    return mixed


def _mixed(function: Callable) -> Callable:
    """Return a function that calls `function` with a rotary embedding from `rope_mixed`.

    The last tensor argument of the returned function contains the frequencies.
    """

    def mixed(q: Tensor, *tensors: Tensor, rows: int, layout: str, prefix: int, **options: Any) -> Any:
        *tensors, frequencies = tensors
        columns = (q.shape[2] - prefix) // rows  # leftover tokens come before the grid
        rope = rope_mixed(rows, columns, frequencies, layout=layout, prefix_tokens=q.shape[2] - rows * columns)
        return function(q, *tensors, rope=rope, **options)

    return mixed


ROPE = OpSpec(
    name="apply_rope",
    function=apply_rope,
    reference=apply_rope_reference,
    build=_apply_rope,
    differentiable=("q", "k"),
    batched=("q", "k"),
    cases=tuple(case for case in CASES if case.rope and not case.masked)
    + (Case("rope_partial", rope="half", rotary=8, prefix=1, width=24),),
    flops=lambda case: 6 * case.batch * case.heads * case.tokens * (case.rotary or case.width),
    backward=1.0,
    rotates=True,
    public=True,
    variants=(Case("", features=0, rope="interleaved"),),
)
register(
    ROPE,
    *(
        replace(
            spec,
            name=f"{spec.name}_mixed",
            function=_mixed(spec.function),
            reference=_mixed(spec.reference),
            build=_with_frequencies(spec.build),
            differentiable=(*spec.differentiable, "frequencies"),
            cases=tuple(case for case in MIXED_CASES if "key_padding_mask" in spec.batched or not case.masked),
            rotates=True,
            public=False,
            compiled=(),
            variants=spec.variants if spec is ROPE else (),
        )
        for spec in (PERFORMER, LINEAR, ROPE)
    ),
)
