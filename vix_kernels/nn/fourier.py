"""Fourier mixing (FNet), as a mixer (see core.py) and as a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from einops import rearrange
from torch import Tensor, nn

from ..ops.fourier import check_norm, fourier_mixing
from ..ops.rope import Rope, apply_rope
from .core import Mixer, Tokens, register
from .module import MixingModule


@register("fourier")
@dataclass(frozen=True)
class Fourier(Mixer):
    """Real part of the Fourier transform over tokens and channels (FNet).

    Attributes:
        norm: None for plain sums, as in the paper, or "ortho", which keeps the results at about the magnitude of the tokens.
            Plain sums are sqrt(tokens * channels) times as large as the results of "ortho".
    """

    norm: Literal["ortho"] | None = None

    not_for_hosts = "it mixes tokens without q, k and v: build the model with nn.FourierMixing"
    presets = {"zoo": {"norm": "ortho"}}

    def __post_init__(self) -> None:
        check_norm(self.norm)

    def accepts(self) -> frozenset[str]:
        return frozenset({"rope"})

    def reason(self, argument: str) -> str:
        return super().reason(argument) if argument == "dropout" else "every frequency is a sum over all tokens"

    def mix(
        self, module: nn.Module, x: Tensor, *, num_heads: int, rope: Rope | None, tokens: Tokens, backend: str
    ) -> Tensor:  # fmt: skip
        if rope is not None:
            heads = rearrange(x, "b n (h d) -> b h n d", h=num_heads)
            x = rearrange(apply_rope(heads, heads, rope, backend=backend)[0], "b h n d -> b n (h d)")
        return fourier_mixing(x, norm=self.norm, backend=backend)


class FourierMixing(MixingModule):
    """Fourier mixing (FNet) in place of attention. It has no parameters.

    Args:
        norm: None for plain sums, as in the paper, or "ortho", which keeps the results at about the magnitude of the tokens.

    For the other arguments, see MixingModule. Masks are not supported, because every frequency depends on the number of tokens.
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
        super().__init__(
            Fourier(norm), dim, num_heads, qkv_bias, qk_norm, proj_bias, attn_drop, proj_drop, norm_layer, backend=backend
        )  # fmt: skip
