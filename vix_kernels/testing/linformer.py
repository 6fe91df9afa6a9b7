"""Specifications of Linformer attention with separate key and value projections, and of `project` with a shared projection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..ops.linformer import linformer_attention, linformer_attention_reference
from ..primitives.project import project, project_reference
from .problem import (
    Case,
    OpSpec,
    aggregate_flops,
    broadcast_exps,
    broadcast_flops,
    exact_scale,
    make_exact,
    make_mask,
    make_qkv,
    make_rope,
    make_tables,
    register,
)

PROJECT_CASES = (
    Case("odd_width", batch=1, width=24, value_width=40),
    Case("one_token", tokens=1, features=3),
    Case("rope_partial", rope="half", rotary=8, prefix=1, width=24, features=12, tokens=35, masked=True),
)
CASES = (
    Case("plain"),
    Case("masked", masked=True, features=12, tokens=35),
    Case("per_head", per_head=True, width=24, value_width=8, features=12, queries=19, tokens=20),
    Case("rope_half", rope="half", packed=True, features=12, tokens=20),
    Case("exact", exact=2, masked=True, rope="half", features=12, tokens=20),
)


def _token_projection(case: Case, tensor: Callable[..., Tensor], tokens: Tensor) -> Tensor:
    """Return a random projection (case.tokens + 2, features), or (heads, case.tokens + 2, features) if `case.per_head` is set.

    The entries have standard deviation features^-0.5. They are in float32, or in float64 if `tokens` is in float64.
    """
    shape = (case.heads,) * case.per_head + (case.tokens + 2, case.features)
    return tensor(*shape, dtype=torch.promote_types(tokens.dtype, torch.float32), scale=case.features**-0.5)


def _linformer(case: Case, tensor: Callable[..., Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    qkv = make_qkv(case, tensor)
    projections = {f"{name}_projection": _token_projection(case, tensor, qkv["k"]) for name in ("key", "value")}
    mask, rope = make_mask(case, qkv["k"], qkv["v"]), make_rope(case, qkv["k"].device)
    return qkv | projections, dict(scale=exact_scale(case), key_padding_mask=mask, rope=rope, **make_exact(case))


def _project(case: Case, tensor: Callable[..., Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    qkv = make_qkv(case, tensor)
    k, v = qkv["k"], qkv["v"]
    projection = _token_projection(replace(case, per_head=True), tensor, k)[:1, : case.tokens]
    return {"k": k, "v": v, "key_projection": projection}, dict(mask=make_mask(case, k, v), **make_tables(case, k.device))


LINFORMER = OpSpec(
    name="linformer_attention",
    function=linformer_attention,
    reference=linformer_attention_reference,
    build=_linformer,
    differentiable=("q", "k", "v", "key_projection", "value_projection"),
    batched=("q", "k", "v", "key_padding_mask"),
    cases=CASES,
    flops=lambda case: aggregate_flops(case) + broadcast_flops(case),
    exps=broadcast_exps,
    # The backward pass needs two matrix products for each one in `project`, and five for every two in `broadcast`. Of these
    # five, one recomputes the logits, and four compute gradients.
    backward=2.25,
    public=True,
    compiled=(Case("", features=256),),  # the published number of projected keys
    variants=(Case("+rope", features=256, rope="interleaved"),),
)
PROJECT = OpSpec(
    name="project",
    function=project,
    reference=project_reference,
    build=_project,
    differentiable=("k", "v", "key_projection"),
    batched=("k", "v", "mask"),
    cases=PROJECT_CASES,
    flops=aggregate_flops,
    variants=(Case("+rope", features=256, rope="interleaved"),),
)
register(LINFORMER, PROJECT)
