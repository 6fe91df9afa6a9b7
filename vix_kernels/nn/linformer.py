"""Linformer attention as a module."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.checks import check_integer
from ..ops.linformer import attend_to_slots, check_token_projection, linformer_attention
from ..ops.rope import Rope
from .attention import Attention


class LinformerAttention(Attention):
    """Linformer attention between timm's linear maps.

    Args:
        seq_len: the longest sequence; shorter ones use the first rows of the projections.
        num_landmarks: K, the slots that the tokens are projected to; more of them than tokens are fine.
        share_kv: one projection for keys and values.
        per_head: projections of each head's own instead of one for all.

    Others as in Attention.

    The projections are the parameters `key_projection` and `value_projection` (None if shared), (seq_len, K) or
    (num_heads, seq_len, K). E^T (x W) = (E^T x) W: keys and values of the tokens are made only where rope or qk_norm needs
    them, or each head has its own E, which would take num_heads products with x.
    """

    has_weights = False

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *args: Any,
        seq_len: int,
        num_landmarks: int = 256,
        share_kv: bool = False,
        per_head: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, *args, **options)
        for name, count in (("seq_len", seq_len), ("num_landmarks", num_landmarks)):
            check_integer(name, count, 1)
        self.through_keys = per_head or not isinstance(self.k_norm, nn.Identity)
        shape = (num_heads,) * per_head + (seq_len, num_landmarks)
        self.key_projection = nn.Parameter(torch.empty(shape))
        self.value_projection = None if share_kv else nn.Parameter(torch.empty(shape))
        bound = num_landmarks**-0.5
        for projection in (self.key_projection, self.value_projection):
            if projection is not None:
                nn.init.uniform_(projection, -bound, bound)

    def mix(self, x: Tensor, key_padding_mask: Tensor | None, rope: Rope | None) -> Tensor:
        if self.through_keys or rope is not None:
            return super().mix(x, key_padding_mask, rope)
        weights = self.qkv.weight.chunk(3)
        biases = (None,) * 3 if self.qkv.bias is None else self.qkv.bias.chunk(3)
        q = rearrange(F.linear(x, weights[0], biases[0]), "b n (h d) -> b h n d", h=self.num_heads)

        def project(name: str) -> tuple[Tensor, Tensor]:
            """E^T x (batch, K, dim) and E^T 1 (batch or 1, K, 1), of the valid tokens; others are 0 in x."""
            projection = check_token_projection(name, getattr(self, name), q)[0]
            # bmm, since matmul would transpose x in memory.
            projected = torch.bmm(projection.mT.expand(x.shape[0], -1, -1), x)
            if key_padding_mask is None:
                return projected, projection.sum(0)[None, :, None]
            return projected, (key_padding_mask.to(projection.dtype) @ projection)[..., None]

        def slots(projected: Tensor, ones: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            y = F.linear(projected, weight)
            return rearrange(y if bias is None else y + ones * bias, "b k (h d) -> b h k d", h=self.num_heads)

        of_keys = project("key_projection")
        of_values = of_keys if self.value_projection is None else project("value_projection")
        keys, values = slots(*of_keys, weights[1], biases[1]), slots(*of_values, weights[2], biases[2])
        return attend_to_slots(q, keys.to(q.dtype), values, scale=self.scale, backend=self.backend)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, rope: Rope | None) -> Tensor:
        return linformer_attention(
            q, k, v, self.key_projection, self.value_projection, key_padding_mask=key_padding_mask, rope=rope,
            backend=self.backend,
        )  # fmt: skip
