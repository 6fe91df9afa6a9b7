"""Attention weights of one token, for example to visualize which tokens a class token attends to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import check_integer, check_qkv


def attention_weights(
    attention: Callable[..., Tensor], q: Tensor, k: Tensor, *args: Any, token: int = 0, **options: Any
) -> Tensor:
    """Return one row of the attention matrix: the weights of all keys in the output of one query.

    The matrix is never materialized. Every attention function computes out_token = sum_n w_n v_n (equation 1 of Vaswani et
    al., arXiv 1706.03762), so w is the gradient of one output channel with respect to the same channel of v. This costs one
    forward and one backward pass of `attention`.

    Args:
        attention: an attention function of this library, or torch's scaled_dot_product_attention.
        q: (batch, heads, queries, head_dim).
        k: (batch, heads, tokens, head_dim).
        args, options: arguments of `attention` after v. Do not pass conv_weight: a convolution has no attention weights.
        token: index of the query. Negative indices count from the end.

    Returns:
        (batch, heads, tokens) in q's dtype, without a gradient. The weights of softmax attention sum to 1. The weights of an
        approximation can be negative and need not sum to 1.

    Raises:
        ValueError, TypeError: `attention`, q, k or `token` is invalid. The message names the argument.
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
