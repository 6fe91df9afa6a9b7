"""Linear attention as a module."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from ..ops.linear import check_feature_map, linear_attention
from ..ops.rope import Rope
from .attention import Attention


class LinearAttention(Attention):
    """Linear attention between timm's linear maps, on the channels of q and k as they are.

    Args:
        feature_map: "relu" or "elu" (elu + 1).
        eps: a number >= 0, added to the denominator.

    Others as in Attention.
    """

    has_weights = False

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *args: Any,
        feature_map: Literal["relu", "elu"] = "relu",
        eps: float = 1e-6,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, *args, **options)
        check_feature_map(feature_map, eps)
        self.feature_map, self.eps = feature_map, eps

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, rope: Rope | None) -> Tensor:
        return linear_attention(
            q, k, v, feature_map=self.feature_map, eps=self.eps, key_padding_mask=key_padding_mask, rope=rope,
            backend=self.backend,
        )  # fmt: skip
