"""Linformer attention, as a core (see core.py) and as a module."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.checks import check_integer
from ..ops.linformer import attend_to_slots, check_token_projection, linformer_attention
from ..ops.rope import Rope
from .core import PrefixCore, SdpaArgs, Site, State, Tokens, register
from .module import AttentionModule


@register("linformer")
@dataclass(frozen=True)
class Linformer(PrefixCore):
    """Linformer attention, which projects keys and values along the token axis.

    Attributes:
        seq_len: the maximum sequence length. Defaults to the model's number of tokens. Shorter sequences use the first
            rows of the projections.
        num_landmarks: K, the number of slots to which the tokens are projected. It may exceed the number of tokens.
        share_kv: whether keys and values share one projection.
        per_head: whether each head has a separate projection.
    """

    seq_len: int | None = None
    num_landmarks: int = 256
    share_kv: bool = False
    per_head: bool = False

    for_hosts = False
    not_for_hosts = "its projections are parameters for one number of tokens: build the model with nn.LinformerAttention"
    sited = frozenset({"seq_len"})
    presets = {"zoo": {"num_landmarks": 64, "share_kv": True}}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, count in (("seq_len", self.seq_len), ("num_landmarks", self.num_landmarks)):
            if count is not None or name != "seq_len":
                check_integer(name, count, 1)

    def fit(self, site: Site) -> Linformer:
        if self.seq_len is not None:
            return self
        if site.num_tokens is None:
            raise ValueError("seq_len: expected the maximum number of tokens, got None")
        return replace(self, seq_len=site.num_tokens)

    def state(self, site: Site) -> State:
        shape, bound = (site.num_heads,) * self.per_head + (self.seq_len, self.num_landmarks), self.num_landmarks**-0.5

        def projection() -> nn.Parameter:
            return nn.Parameter(nn.init.uniform_(torch.empty(shape), -bound, bound))

        return {"key_projection": projection(), "value_projection": None if self.share_kv else projection()}

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, rope: Rope | None, tokens: Tokens,
        sdpa: SdpaArgs, backend: str,
    ) -> Tensor:  # fmt: skip
        return linformer_attention(
            q, k, v, module.key_projection, module.value_projection, scale=scale,
            key_padding_mask=tokens.key_padding_mask, rope=rope, exact_rows=self.exact_rows(tokens), backend=backend,
        )  # fmt: skip

    def attend_tokens(
        self, module: nn.Module, x: Tensor, maps: nn.Linear, *, scale: float, rope: Rope | None, tokens: Tokens, backend: str
    ) -> Tensor | None:
        """Return the attention output for x, or None.

        x is projected along the token axis, to E^T x, before the key and value layers are applied. This order does not change
        the result, because (E^T x) W = E^T (x W). It is faster if there are fewer slots than tokens.

        The result is None if there is a rotary embedding or `exact_rows` is not 0, because these need the keys of all tokens.
        It is also None if `per_head` is set, because x would be projected once for each head.
        """
        if self.per_head or rope is not None or self.exact_rows(tokens):
            return None
        weights, mask = maps.weight.chunk(3), tokens.key_padding_mask
        biases = (None,) * 3 if maps.bias is None else maps.bias.chunk(3)
        q = rearrange(F.linear(x, weights[0], biases[0]), "b n (h d) -> b h n d", h=module.num_heads)

        def project(name: str) -> tuple[Tensor, Tensor]:
            """Return E^T x (batch, K, dim) and the sums of E over valid tokens (batch or 1, K, 1).

            `name` is the name of the parameter E. x is 0 at padded tokens.
            """
            projection = check_token_projection(name, getattr(module, name), q)[0]
            # matmul would transpose x in memory; bmm does not.
            projected = torch.bmm(projection.mT.expand(x.shape[0], -1, -1), x)
            if mask is None:
                return projected, projection.sum(0)[None, :, None]
            return projected, (mask.to(projection.dtype) @ projection)[..., None]

        def slots(projected: Tensor, ones: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            y = F.linear(projected, weight)
            return rearrange(y if bias is None else y + ones * bias, "b k (h d) -> b h k d", h=module.num_heads)

        for_keys = project("key_projection")
        for_values = for_keys if module.value_projection is None else project("value_projection")
        keys, values = slots(*for_keys, weights[1], biases[1]), slots(*for_values, weights[2], biases[2])
        return attend_to_slots(q, keys.to(q.dtype), values, scale=scale, backend=backend)


class LinformerAttention(AttentionModule):
    """Linformer attention with linear layers named as in timm's `Attention` (`qkv`, `proj`).

    Args:
        seq_len: the maximum sequence length. Shorter sequences use the first rows of the projections.
        num_landmarks: K, the number of slots to which the tokens are projected. It may exceed the number of tokens.
        share_kv: whether keys and values share one projection.
        per_head: whether each head has a separate projection.

    For the other arguments, see AttentionModule.

    The projections are the parameters `key_projection` and `value_projection`. Their shape is (seq_len, K), or (num_heads,
    seq_len, K) if each head has a separate projection. With share_kv, `value_projection` is None.
    """

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
        seq_len: int,
        num_landmarks: int = 256,
        share_kv: bool = False,
        per_head: bool = False,
        backend: str = "auto",
    ) -> None:
        check_integer("seq_len", seq_len, 1)
        super().__init__(
            Linformer(seq_len, num_landmarks, share_kv, per_head), dim, num_heads, qkv_bias, qk_norm, proj_bias, attn_drop,
            proj_drop, norm_layer, backend=backend,
        )  # fmt: skip
