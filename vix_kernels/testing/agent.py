"""Specification of agent attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.agent import agent_attention, agent_attention_reference
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

CASES = (
    Case("odd_width", batch=1, width=24, value_width=40, features=36, tokens=21, queries=19),
    Case("masked", masked=True, features=9, tokens=21),
    Case("rope_half", rope="half", packed=True, features=9, tokens=21),
    Case("exact", exact=2, masked=True, rope="interleaved", width=24, value_width=40, features=9, tokens=21),
)


def _agent(case: Case, tensor: Callable[..., Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    qkv = make_qkv(case, tensor)
    device = qkv["q"].device
    agents = tensor(case.batch, case.heads, case.features, case.width, scale=case.spread)
    mask, agent_mask = make_mask(case, qkv["k"], qkv["v"]), None
    if case.masked:
        agent_mask = torch.rand(case.batch, case.features, generator=torch.Generator().manual_seed(3)) > 0.4
        agent_mask = agent_mask.to(device)
    options = dict(
        scale=exact_scale(case), agent_mask=agent_mask, key_padding_mask=mask, rope=make_rope(case, device),
        **make_exact(case),
    )  # fmt: skip
    return qkv | {"agents": agents}, options


AGENT = OpSpec(
    name="agent_attention",
    function=agent_attention,
    reference=agent_attention_reference,
    build=_agent,
    differentiable=("q", "k", "v", "agents"),
    batched=("q", "k", "v", "agents", "agent_mask", "key_padding_mask"),
    cases=CASES,
    flops=lambda case: aggregate_flops(case) + broadcast_flops(case),
    exps=lambda case: aggregate_exps(case) + broadcast_exps(case),
    # For every two matrix products in the forward pass, the backward pass needs five: one recomputes the logits, and four
    # compute gradients.
    backward=2.5,
    public=True,
    compiled=(Case("", features=49),),  # the published number of agents
)
register(AGENT)
