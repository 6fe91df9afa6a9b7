"""Attention modules with timm's signature: x (batch, tokens, dim) in, the same shape out."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from . import backends
from .ops.fourier import check_norm, fourier_mixing
from .ops.linear import check_feature_map, linear_attention
from .ops.performer import orthogonal_projection, performer_attention
from .ops.rope import Rope, apply_rope


class Attention(nn.Module):
    """Multi-head softmax attention; the parameters, names and order of arguments of timm's `Attention`.

    Args:
        dim: width of the tokens; num_heads must divide it.
        num_heads: heads.
        qkv_bias, proj_bias: biases of the two linear maps.
        qk_norm: normalise q and k of each head with norm_layer(head_dim).
        attn_drop, proj_drop: dropout of the attention weights and of the output.
        norm_layer: for qk_norm; default torch.nn.LayerNorm.
        backend: of the rotary embedding and, in subclasses, of the attention.
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
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of dim {dim}, got {num_heads}")
        if backend not in backends.BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(map(repr, backends.BACKENDS))}, got {backend!r}")
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
        self.proj_drop = nn.Dropout(proj_drop)

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
            attn_mask, is_causal: timm's; refused, since linear-cost attention never forms the weights they act on.
            key_padding_mask: bool (batch, tokens), True = the token takes part.
            rope: rotary embedding of q and k.
        """
        if attn_mask is not None:
            raise NotImplementedError("attn_mask: expected None, got a mask; use key_padding_mask (batch, tokens)")
        if is_causal:
            raise NotImplementedError("is_causal: expected False; causal attention is not supported")
        q, k, v = rearrange(self.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.num_heads)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        out = self.attend(q, k, v, key_padding_mask, rope)
        return self.proj_drop(self.proj(rearrange(out, "b h n d -> b n (h d)")))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, rope: Rope | None) -> Tensor:
        """The attention between the linear maps: (batch, heads, tokens, head_dim) to the same."""
        if rope is not None:
            q, k = apply_rope(q, k, rope, backend=self.backend)
        mask = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
        dropout = self.attn_drop.p if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)


class PerformerAttention(Attention):
    """Performer attention (FAVOR+) between timm's linear maps.

    Args:
        num_features: M; default int(head_dim * ln(head_dim)), as published.
        seed: of the random features, 0 to 4095. Layers should differ in it, ranks must not.
        Others as in Attention; attn_drop is refused, there are no weights to drop.

    The features are the persistent float32 buffer `projection` (M, head_dim), which stays float32 when the module is cast.
    They change only by `redraw_projection`.
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
        num_features: int | None = None,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        _refuse_dropout(attn_drop)
        super().__init__(dim, num_heads, qkv_bias, qk_norm, proj_bias, attn_drop, proj_drop, norm_layer, backend=backend)
        if not 0 <= seed < 4096:
            raise ValueError(f"seed: expected 0 to 4095, got {seed}")
        if num_features is None:
            num_features = max(1, int(self.head_dim * math.log(self.head_dim)))
        self.num_features = num_features
        self.seed = seed
        self.redraws = 0
        self.register_buffer("projection", self._draw())

    def _draw(self) -> Tensor:
        # A Python integer counts the redraws: reading a tensor would wait for the device in every step. Generators take
        # 32 bits of a seed, so layer and redraw share them: 4096 layers, each a million times.
        return orthogonal_projection(self.num_features, self.head_dim, seed=(self.seed << 20) + self.redraws)

    def redraw_projection(self) -> None:
        """Draw new random features; every rank that calls it as often holds the same ones.

        Never between a forward and its backward: recomputation (checkpointing) would see other features. A captured CUDA
        graph keeps those it was captured with.
        """
        self.redraws += 1
        self.projection = self._draw().to(self.projection.device)

    def get_extra_state(self) -> dict[str, int]:
        return {"redraws": self.redraws}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.redraws = state["redraws"]

    def _apply(self, fn: Any, recurse: bool = True) -> PerformerAttention:
        projection = self.projection
        super()._apply(fn, recurse)
        # Rounded features would differ between ranks and lose the estimate: move them, do not cast them.
        if self.projection.dtype != torch.float32:
            self.projection = projection.to(self.projection.device)
        return self

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, rope: Rope | None) -> Tensor:
        return performer_attention(q, k, v, self.projection, key_padding_mask=key_padding_mask, rope=rope, backend=self.backend)


class LinearAttention(Attention):
    """Linear attention between timm's linear maps, on the channels of q and k as they are.

    Args:
        feature_map: "relu" or "elu" (elu + 1).
        eps: >= 0, added to the denominator.
        Others as in Attention; attn_drop is refused, there are no weights to drop.
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
        feature_map: Literal["relu", "elu"] = "relu",
        eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        _refuse_dropout(attn_drop)
        super().__init__(dim, num_heads, qkv_bias, qk_norm, proj_bias, attn_drop, proj_drop, norm_layer, backend=backend)
        check_feature_map(feature_map, eps)
        self.feature_map, self.eps = feature_map, eps

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, rope: Rope | None) -> Tensor:
        return linear_attention(
            q, k, v, feature_map=self.feature_map, eps=self.eps, key_padding_mask=key_padding_mask, rope=rope,
            backend=self.backend,
        )  # fmt: skip


def _refuse_dropout(attn_drop: float) -> None:
    if attn_drop:
        raise NotImplementedError(f"attn_drop: expected 0 (there are no weights to drop), got {attn_drop}")


class FourierMixing(nn.Module):
    """Fourier mixing (FNet) where attention would stand; it has no parameters.

    Args:
        norm: None, the plain sums of the paper, or "ortho", which keeps the size of the tokens.
        proj_drop: dropout of the output.
        backend: as in fourier_mixing.
        Others, dim included, are accepted for the sake of timm's blocks, and without effect: there are neither heads nor
            linear maps. attn_drop is refused, there are no weights to drop.
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
        norm: Literal["ortho"] | None = None,
        backend: str = "auto",
    ) -> None:
        _refuse_dropout(attn_drop)
        super().__init__()
        check_norm(norm)
        if backend not in backends.BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(map(repr, backends.BACKENDS))}, got {backend!r}")
        self.norm, self.backend = norm, backend
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        key_padding_mask: Tensor | None = None,
        rope: Rope | None = None,
    ) -> Tensor:
        """Mix the tokens and the channels.

        Args:
            x: (batch, tokens, dim).
            Others are refused: every frequency is a sum over all tokens.
        """
        for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
            if mask is not None:
                raise NotImplementedError(f"{name}: expected None, got a mask; every frequency is a sum over all tokens")
        if is_causal:
            raise NotImplementedError("is_causal: expected False; every frequency is a sum over all tokens")
        if rope is not None:
            raise NotImplementedError("rope: expected None; there are no queries and keys to rotate")
        return self.proj_drop(fourier_mixing(x, norm=self.norm, backend=self.backend))

    def extra_repr(self) -> str:
        return f"norm={self.norm!r}"
