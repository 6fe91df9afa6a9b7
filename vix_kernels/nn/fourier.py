"""Fourier mixing as a module."""

from __future__ import annotations

from typing import Literal

from einops import rearrange
from torch import Tensor, nn

from .. import backends
from ..ops.fourier import check_norm, fourier_mixing
from ..ops.rope import Rope, apply_rope
from .checks import check_heads, check_rate, check_tokens
from .dropout import Dropout


class FourierMixing(nn.Module):
    """Fourier mixing (FNet) where attention would stand; it has no parameters.

    Args:
        dim: width of the tokens; num_heads must divide it.
        num_heads: the heads that a rotary embedding turns; the transform has none.
        norm: None, the plain sums of the paper, or "ortho", which keeps the size of the tokens.
        proj_drop: dropout of the output.
        backend: as in fourier_mixing.

    Others are accepted for the sake of timm's blocks, and without effect: there are no linear maps. attn_drop is refused, there
    are no weights to drop.
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
        super().__init__()
        check_heads(dim, num_heads)
        check_rate("attn_drop", attn_drop)
        check_rate("proj_drop", proj_drop)
        if attn_drop:
            raise NotImplementedError(f"attn_drop: expected 0 (there are no weights to drop), got {attn_drop}")
        check_norm(norm)
        backends.check(backend)
        self.dim, self.num_heads = dim, num_heads
        self.norm, self.backend = norm, backend
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
        """Mix the tokens and the channels.

        Args:
            x: (batch, tokens, dim).
            rope: rotary embedding. There are no queries and keys: it turns the heads of the tokens themselves.

        Masks are refused: every frequency is a sum over all tokens.
        """
        check_tokens(x, self.dim)
        for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
            if mask is not None:
                raise NotImplementedError(f"{name}: expected None, got a mask; every frequency is a sum over all tokens")
        if is_causal:
            raise NotImplementedError("is_causal: expected False; every frequency is a sum over all tokens")
        if rope is not None:
            heads = rearrange(x, "b n (h d) -> b h n d", h=self.num_heads)
            x = rearrange(apply_rope(heads, heads, rope, backend=self.backend)[0], "b h n d -> b n (h d)")
        return self.proj_drop(fourier_mixing(x, norm=self.norm, backend=self.backend))

    def extra_repr(self) -> str:
        return f"norm={self.norm!r}"
