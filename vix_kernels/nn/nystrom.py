"""Nystrom attention as a module."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from ..ops.checks import check_integer
from ..ops.nystrom import check_nystrom, nystrom_attention
from ..ops.pooling import at_most
from ..ops.rope import Rope
from .attention import Attention
from .checks import check_placement


class NystromAttention(Attention):
    """Nystrom attention between timm's linear maps.

    Args:
        num_landmarks: of the tokens behind the prefix; fewer where there are fewer tokens.
        landmarks: "segment", "grid" or "pad_front", as in nystrom_attention.
        grid_size: height and width of the token map behind the prefix, for "grid".
        prefix_tokens: tokens in front (class, registers) that are landmarks of their own.
        pinv_iterations, pinv_init: as in nystrom_attention.
        residual_conv_kernel: taps of the depthwise convolution over the tokens of v that is added, odd; 0 for none.

    Others as in Attention.
    """

    has_weights = False

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *args: Any,
        num_landmarks: int = 64,
        landmarks: Literal["segment", "grid", "pad_front"] = "segment",
        grid_size: tuple[int, int] | None = None,
        prefix_tokens: int = 0,
        pinv_iterations: int = 6,
        pinv_init: Literal["exact", "original"] = "exact",
        residual_conv_kernel: int = 33,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, *args, **options)
        check_nystrom(landmarks, pinv_iterations, pinv_init)
        check_placement("num_landmarks", num_landmarks, grid_size, prefix_tokens)
        taps = check_integer("residual_conv_kernel", residual_conv_kernel, 0)
        if taps and taps % 2 == 0:
            raise ValueError(f"residual_conv_kernel: expected an odd number of taps, or 0, got {taps}")
        self.num_landmarks, self.landmarks, self.grid_size, self.prefix_tokens = (
            num_landmarks, landmarks, grid_size, prefix_tokens,
        )  # fmt: skip
        self.pinv_iterations, self.pinv_init = pinv_iterations, pinv_init
        # Only its weight is used, which has the name and the shape that published weights have.
        self.res_conv = (
            nn.Conv2d(num_heads, num_heads, (taps, 1), padding=(taps // 2, 0), groups=num_heads, bias=False) if taps else None
        )

    def attention_of(self, x: Tensor, token: int = 0, *, rope: Rope | None = None, residual: bool = False) -> Tensor:
        """As that of Attention; the residual, which is no attention, has no part in it."""
        return super().attention_of(x, token, rope=rope, residual=residual)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None,
        rope: Rope | None,
        residual: bool = True,
    ) -> Tensor:
        return nystrom_attention(
            q, k, v, num_landmarks=at_most(self.num_landmarks, q.shape[2] - self.prefix_tokens), landmarks=self.landmarks,
            grid_size=self.grid_size, prefix_tokens=self.prefix_tokens, pinv_iterations=self.pinv_iterations,
            pinv_init=self.pinv_init, conv_weight=self.res_conv.weight if residual and self.res_conv is not None else None,
            key_padding_mask=key_padding_mask, rope=rope, backend=self.backend,
        )  # fmt: skip
