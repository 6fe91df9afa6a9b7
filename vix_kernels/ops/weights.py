"""The attention of one token over all others, for maps of what a class token looks at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import check_integer, check_qkv


def attention_weights(
    attention: Callable[..., Tensor], q: Tensor, k: Tensor, *args: Any, token: int = 0, **options: Any
) -> Tensor:
    """One row of the attention matrix that `attention` never forms: the share of every key in the output of one query.

    out_token = sum_n w_n v_n for any attention (equation 1 of Vaswani et al., arXiv 1706.03762), so w is the gradient of one
    output channel with respect to that channel of v: a forward and a backward of the op, and no more memory than they take.

    Args:
        attention: an op of this library, or torch's scaled_dot_product_attention.
        q: (batch, heads, queries, head_dim).
        k: (batch, heads, tokens, head_dim).
        args, options: the further arguments of `attention` behind v. Without conv_weight, which is no attention.
        token: the query, from 0; negative ones count from the end.

    Returns:
        (batch, heads, tokens) in q's dtype, without a gradient. Rows of a softmax add up to 1; the approximations' need not,
        and can be negative.

    Raises:
        ValueError, TypeError: q and k do not fit each other, or there is no such token; the message names the argument.
    """
    if not callable(attention):
        raise TypeError(f"attention: expected a function of q, k and v, got {type(attention).__name__}")
    check_qkv(q, k, k)
    check_integer("token", token)
    queries = q.shape[2]
    if not -queries <= token < queries:
        raise ValueError(f"token: expected {-queries} to {queries - 1}, got {token}")
    q, k = q.detach(), k.detach()
    with torch.enable_grad():
        probe = torch.zeros_like(k).requires_grad_()
        out = attention(q, k, probe, *args, **options)
        (weights,) = torch.autograd.grad(out[:, :, token, 0].sum(), probe)
    return weights[..., 0]
