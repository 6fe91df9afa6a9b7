"""Linear attention, as a core (see core.py) and as a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..ops.linear import check_feature_map, linear_attention
from ..ops.rope import Rope
from .core import Core, SdpaArgs, Tokens, register
from .module import AttentionModule


@register("linear")
@dataclass(frozen=True)
class Linear(Core):
    """Linear attention with an elementwise feature map of q and k.

    `attend` ignores `scale`. With relu, a scale would only change the influence of eps. With elu, the model can learn the
    scale as part of the weights of q and k.

    Attributes:
        feature_map: "relu" or "elu" (elu + 1).
        eps: a number >= 0 that is added to the denominator.
    """

    feature_map: Literal["relu", "elu"] = "relu"
    eps: float = 1e-6

    def describe(self) -> str:
        return f"linear, {self.feature_map} of the channels"

    def __post_init__(self) -> None:
        check_feature_map(self.feature_map, self.eps)

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, rope: Rope | None, tokens: Tokens,
        sdpa: SdpaArgs, backend: str,
    ) -> Tensor:  # fmt: skip
        return linear_attention(
            q, k, v, feature_map=self.feature_map, eps=self.eps, key_padding_mask=tokens.key_padding_mask, rope=rope,
            backend=backend,
        )  # fmt: skip


class LinearAttention(AttentionModule):
    """Linear attention with linear layers named as in timm's `Attention` (`qkv`, `proj`).

    The feature map of q and k is elementwise.

    Args:
        feature_map: "relu" or "elu" (elu + 1).
        eps: a number >= 0 that is added to the denominator.

    For the other arguments, see AttentionModule.
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
        super().__init__(
            Linear(feature_map, eps), dim, num_heads, qkv_bias, qk_norm, proj_bias, attn_drop, proj_drop, norm_layer,
            backend=backend,
        )  # fmt: skip
