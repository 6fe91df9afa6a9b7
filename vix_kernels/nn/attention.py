"""Softmax attention with timm's signature, and what all attention modules share."""

from __future__ import annotations

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .. import backends
from ..ops.checks import check_mask
from ..ops.rope import Rope, apply_rope
from ..ops.weights import attention_weights
from .checks import check_heads, check_rate, check_tokens
from .dropout import Dropout
from .packed_linear import packed_linear


class Attention(nn.Module):
    """Multi-head softmax attention; the parameters, names and order of arguments of timm's `Attention`.

    Args:
        dim: width of the tokens; num_heads must divide it.
        num_heads: heads.
        qkv_bias, proj_bias: biases of the two linear maps.
        qk_norm: normalise q and k of each head with norm_layer(head_dim).
        attn_drop, proj_drop: dropout of the attention weights and of the output. Linear-cost attentions have no weights to
            drop and refuse attn_drop.
        norm_layer: for qk_norm; default torch.nn.LayerNorm.
        backend: of the rotary embedding and, in subclasses, of the attention.
    """

    has_weights = True  # the attention forms its weights, so that some of them can be dropped

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
        super().__init__()
        check_heads(dim, num_heads)
        check_rate("attn_drop", attn_drop)
        check_rate("proj_drop", proj_drop)
        if attn_drop and not self.has_weights:
            raise NotImplementedError(f"attn_drop: expected 0 (there are no weights to drop), got {attn_drop}")
        backends.check(backend)
        norm_layer = norm_layer or nn.LayerNorm
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        key_padding_mask: Tensor | None = None,
        rope: Rope | None = None,
    ) -> Tensor:
        """Mix the tokens.

        Args:
            x: (batch, tokens, dim).
            attn_mask: (tokens, tokens), with leading dimensions or not: bool, True = may be looked at, or added to the
                logits. Linear-cost attention never forms the weights that it acts on, and refuses it.
            is_causal: timm's; refused.
            key_padding_mask: bool (batch, tokens), True = valid. Other tokens are read as 0, whatever they hold.
            rope: rotary embedding of q and k.
        """
        check_tokens(x, self.num_heads * self.head_dim, self.qkv)
        if key_padding_mask is not None:
            check_mask(key_padding_mask, x[:, None], columns="tokens")
            x = x.masked_fill(~key_padding_mask[..., None], 0)
        if attn_mask is not None and not self.has_weights:
            raise NotImplementedError("attn_mask: expected None, got a mask; use key_padding_mask (batch, tokens)")
        if is_causal:
            raise NotImplementedError("is_causal: expected False; causal attention is not supported")
        out = self.mix(x, key_padding_mask, rope, **({} if attn_mask is None else {"attn_mask": attn_mask}))
        return self.proj_drop(self.proj(rearrange(out, "b h n d -> b n (h d)")))

    def mix(self, x: Tensor, key_padding_mask: Tensor | None, rope: Rope | None, **masks: Tensor) -> Tensor:
        """All but the last linear map: (batch, tokens, dim) to (batch, heads, tokens, head_dim)."""
        return self.attend(*self.heads(x), key_padding_mask, rope, **masks)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of (batch, tokens, dim), each (batch, heads, tokens, head_dim)."""
        q, k, v = (rearrange(y, "b n (h d) -> b h n d", h=self.num_heads) for y in packed_linear(self.qkv, x))
        return self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v

    def attention_of(self, x: Tensor, token: int = 0, *, rope: Rope | None = None, **options: Any) -> Tensor:
        """What `token` of x (batch, tokens, dim) looks at: its row of the attention matrix, (batch, heads, tokens).

        `options` are those of `attend`.
        """
        q, k, _ = self.heads(x)
        return attention_weights(self.attend, q, k, None, rope, token=token, **options)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None,
        rope: Rope | None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """The attention between the linear maps: (batch, heads, tokens, head_dim) to the same."""
        if rope is not None:
            q, k = apply_rope(q, k, rope, backend=self.backend)
        mask = attn_mask
        if key_padding_mask is not None:
            valid = key_padding_mask[:, None, None, :]
            if attn_mask is None:
                mask = valid
            else:
                mask = attn_mask & valid if attn_mask.dtype == torch.bool else attn_mask.masked_fill(~valid, -math.inf)
        dropout = self.attn_drop.p if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
