"""Softmax attention, as a core (see core.py) and as a module."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.rope import Rope, apply_rope
from .core import Core, SdpaArgs, Tokens, register
from .module import AttentionModule


@register("softmax")
@dataclass(frozen=True)
class Softmax(Core):
    """Softmax attention, softmax(scale q k^T) v, computed with torch's scaled_dot_product_attention in quadratic time."""

    for_hosts = False  # host models already use softmax attention

    def accepts(self) -> frozenset[str]:
        return super().accepts() | {"attn_mask", "dropout", "cross"}

    def takes_trained_weights(self) -> bool:
        return True

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, rope: Rope | None, tokens: Tokens,
        sdpa: SdpaArgs, backend: str,
    ) -> Tensor:  # fmt: skip
        if rope is not None:
            q, k = apply_rope(q, k, rope, backend=backend)
        mask = sdpa.attn_mask
        if tokens.key_padding_mask is not None:
            valid = tokens.key_padding_mask[:, None, None, :]
            if mask is None:
                mask = valid
            else:
                mask = mask & valid if mask.dtype == torch.bool else mask.masked_fill(~valid, -math.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=sdpa.dropout, scale=scale)


class Attention(AttentionModule):
    """Multi-head softmax attention with the argument names of timm's `Attention`. See AttentionModule for the arguments."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: type[nn.Module] | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            Softmax(), dim, num_heads, qkv_bias, qk_norm, proj_bias, attn_drop, proj_drop, norm_layer, backend=backend
        )  # fmt: skip
