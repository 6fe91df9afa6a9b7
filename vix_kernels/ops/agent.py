"""Agent attention (Han et al., Agent Attention, arXiv 2312.08874).

    out = softmax(scale q a^T) softmax(scale a k^T) v                                            equation 4 of the paper

The computation has two passes, in which the agents a are the slots (see primitives/aggregate.py and primitives/broadcast.py).
The second pass does not use the log-sum-exp that the first pass returns:

    values, _ = aggregate(a, k, v)        out = broadcast(q, a, values)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends
from ..plans import planned
from ..primitives import aggregate, broadcast
from .checks import autocast, check_exact_rows, check_mask, check_qkv, check_scale, check_tensor, dtype_name
from .exact import compute_exact_rows, with_exact_rows_reference
from .rope import Rope, check_rope, mask_and_rotate_reference


@planned
def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    *,
    scale: float | None = None,
    agent_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    rope: Rope | None = None,
    exact_rows: int = 0,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention in two passes: agents attend to the keys, then queries attend to the agents.

    Args:
        q: (batch, heads, queries, head_dim), float16, bfloat16, float32 or float64. Views with last stride 1 are not copied.
        k: (batch, heads, tokens, head_dim).
        v: (batch, heads, tokens, value_dim).
        agents: (batch, heads, A, head_dim) in q's dtype, for example pooled queries. `rope` is not applied to them.
        scale: scaling factor of the logits in both softmaxes, > 0. Defaults to head_dim ** -0.5.
        agent_mask: bool (batch, A), True = valid. The contents of invalid agents are ignored. If a sample has no valid agent,
            its output is 0, except in the exact rows.
        key_padding_mask: bool (batch, tokens), True = valid. If a sample has no valid key, its output is 0.
        rope: rotary embedding of q and k, applied inside the kernels. Requires as many queries as tokens.
        exact_rows: the number of leading queries (class and register tokens) that use exact softmax attention. See
            ops/exact.py.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        (batch, heads, queries, value_dim) in q's dtype. Differentiable in q, k, v, agents and rope.angles.

    Raises:
        ValueError, TypeError: an argument is invalid. The message names it and states the expected and the actual value.
        RuntimeError: backend="triton" was requested but cannot run here. The message lists every reason.
    """
    q, k, v, agents = autocast(q, k, v, agents)
    check_qkv(q, k, v, key_padding_mask)
    rotary = None if rope is None else check_rope(rope, q, k)
    check_agents(agents, agent_mask, q)
    if agent_mask is not None:  # 0 times NaN is NaN, so a NaN in a masked agent would reach the output
        agents = agents.masked_fill(~agent_mask[:, None, :, None], 0)
    scale = check_scale(scale, q.shape[3])
    check_exact_rows(exact_rows, q)
    backend = backends.resolve(backend, q, max(q.shape[3], v.shape[3]))
    options = dict(scale=scale, agent_mask=agent_mask, key_padding_mask=key_padding_mask, rope=rope, exact_rows=exact_rows)
    if backend == "reference":
        return agent_attention_reference(q, k, v, agents, **options)
    rows = compute_exact_rows(q, k, v, exact_rows, scale, key_padding_mask, rope, backend) if exact_rows else None
    values, _ = aggregate(agents, k, v, scale=scale, mask=key_padding_mask, backend=backend, rotary=rotary)
    return broadcast(q, agents, values, agent_mask, scale=scale, rows=rows, backend=backend, rotary=rotary)


def agent_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    *,
    scale: float,
    agent_mask: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    rope: Rope | None = None,
    exact_rows: int = 0,
) -> Tensor:
    """Return the result of `agent_attention`, computed in plain PyTorch with both matrices of attention weights in memory.

    Supports all devices and torch.func transforms.
    """
    tokens = q, k, v
    q, k, v = mask_and_rotate_reference(q, k, v, key_padding_mask, rope)
    values = _softmax(scale * agents @ k.mT, key_padding_mask) @ v
    out = _softmax(scale * q @ agents.mT, agent_mask) @ values
    return with_exact_rows_reference(out, *tokens, exact_rows, scale=scale, mask=key_padding_mask, rope=rope)


def _softmax(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Return the softmax over the valid columns, given a mask (batch, M). Rows without a valid column are 0."""
    if mask is None:
        return logits.softmax(-1)
    valid, has_valid = mask[:, None, None], mask.any(-1)[:, None, None, None]
    return torch.where(has_valid, torch.where(valid | ~has_valid, logits, float("-inf")).softmax(-1), 0.0)


def check_agents(agents: Tensor, mask: Tensor | None, q: Tensor) -> None:
    """Check that agents (B, H, A, D) have q's batch size, heads, width, dtype and device. Also check `mask`, bool (B, A)."""
    batch, heads, _, width = q.shape
    check_tensor("agents", agents)
    if agents.dim() != 4 or agents.shape[2] == 0 or (*agents.shape[:2], agents.shape[3]) != (batch, heads, width):
        expected = f"({batch}, {heads}, A, {width})"
        raise ValueError(f"agents: expected shape (batch, heads, A, head_dim) = {expected}, got {tuple(agents.shape)}")
    if agents.dtype != q.dtype:
        raise TypeError(f"agents: expected q's dtype {dtype_name(q.dtype)}, got {dtype_name(agents.dtype)}")
    if agents.device != q.device:
        raise ValueError(f"agents: expected q's device {q.device}, got {agents.device}")
    check_mask(mask, agents, "agent_mask", "A")
