"""Nystrom attention, as a core (see core.py) and as a module."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from ..ops.checks import check_integer
from ..ops.nystrom import check_nystrom, nystrom_attention
from ..ops.pooling import at_most, most_cells, place
from ..ops.rope import Rope
from .checks import check_placement
from .core import PrefixCore, SdpaArgs, Site, State, Tokens, register
from .module import AttentionModule


@register("nystrom")
@dataclass(frozen=True)
class Nystrom(PrefixCore):
    """Nystrom attention. Landmarks are means of queries and of keys over segments or grid cells.

    Attributes:
        num_landmarks: number of landmarks for the tokens after the prefix, limited to the number of these tokens.
        landmarks: "segment", "grid" or "pad_front", as in nystrom_attention. With "pad_front", class and register tokens are
            treated like the other tokens.
        grid_size: for "grid", the (height, width) of the grid that the tokens after the prefix form. Defaults to the model's
            grid.
        prefix_tokens: number of leading tokens (class and register tokens). Each of them is a separate landmark. If grid_size
            defaults to the model's grid, prefix_tokens is the model's number of class and register tokens.
        pinv_iterations, pinv_init: as in nystrom_attention.
        residual_conv_kernel: odd kernel size of a depthwise convolution of v over the tokens. Its result is added to the
            output. If 0, there is no convolution.
    """

    num_landmarks: int = 64
    landmarks: Literal["segment", "grid", "pad_front"] = "segment"
    grid_size: tuple[int, int] | None = None
    prefix_tokens: int = 0
    pinv_iterations: int = 6
    pinv_init: Literal["exact", "original"] = "exact"
    residual_conv_kernel: int = 33

    presets = {"host": {"residual_conv_kernel": 0, "exact_prefix": True}}
    sited = frozenset({"grid_size", "prefix_tokens"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_nystrom(self.landmarks, self.pinv_iterations, self.pinv_init)
        for name in ("prefix_tokens", "exact_prefix"):
            if self.landmarks == "pad_front" and (count := getattr(self, name)) is not True and count:
                raise ValueError(f"{name}: expected 0 for landmarks='pad_front', got {count}")
        check_placement("num_landmarks", self.num_landmarks, self.grid_size, self.prefix_tokens)
        taps = check_integer("residual_conv_kernel", self.residual_conv_kernel, 0)
        if taps and taps % 2 == 0:
            raise ValueError(f"residual_conv_kernel: expected an odd number of taps, or 0, got {taps}")

    def takes_trained_weights(self) -> bool:
        return not self.residual_conv_kernel

    def needs_module(self) -> bool:
        return self.residual_conv_kernel > 0

    def with_prefix(self, prefix_tokens: int) -> Nystrom:
        return self if self.landmarks == "pad_front" else super().with_prefix(prefix_tokens)

    def after_prefix(self, prefix_tokens: int) -> Nystrom:
        return self if self.landmarks == "pad_front" else replace(self, prefix_tokens=prefix_tokens)

    def on_grid(self, size: tuple[int, int]) -> Nystrom:
        return replace(self, landmarks="grid", grid_size=size, num_landmarks=most_cells(size, self.num_landmarks))

    def describe(self) -> str:
        return f"nystrom, {self.num_landmarks} landmarks {place(self.grid_size, self.prefix_tokens)}{self.describe_prefix()}"

    def weights_only(self) -> Nystrom:
        return replace(self, residual_conv_kernel=0)

    def fit(self, site: Site) -> Nystrom:
        if self.landmarks != "grid" or self.grid_size is not None or site.grid_size is None:
            return self
        return replace(self, grid_size=site.grid_size, prefix_tokens=site.prefix_tokens)

    def state(self, site: Site) -> State:
        # Only the weight of this Conv2d is used. Its name and shape match published checkpoints.
        heads, taps = site.num_heads, self.residual_conv_kernel
        if not taps:
            return {"res_conv": None}
        return {"res_conv": nn.Conv2d(heads, heads, (taps, 1), padding=(taps // 2, 0), groups=heads, bias=False)}

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, rope: Rope | None, tokens: Tokens,
        sdpa: SdpaArgs, backend: str,
    ) -> Tensor:  # fmt: skip
        residual = module.res_conv if self.residual_conv_kernel else None
        most = at_most(at_most(self.num_landmarks, q.shape[2] - self.prefix_tokens), k.shape[2] - self.prefix_tokens)
        return nystrom_attention(
            q, k, v, num_landmarks=most, landmarks=self.landmarks,
            grid_size=self.grid_size, prefix_tokens=self.prefix_tokens, pinv_iterations=self.pinv_iterations,
            pinv_init=self.pinv_init, conv_weight=None if residual is None else residual.weight, scale=scale,
            key_padding_mask=tokens.key_padding_mask, rope=rope, exact_rows=self.exact_rows(tokens), backend=backend,
        )  # fmt: skip


class NystromAttention(AttentionModule):
    """Nystrom attention with linear layers named as in timm's `Attention` (`qkv`, `proj`).

    Args:
        num_landmarks: number of landmarks for the tokens after the prefix, limited to the number of these tokens.
        landmarks: "segment", "grid" or "pad_front", as in nystrom_attention.
        grid_size: for "grid", the (height, width) of the grid that the tokens after the prefix form.
        prefix_tokens: number of leading tokens (class and register tokens). Each of them is a separate landmark.
        pinv_iterations, pinv_init: as in nystrom_attention.
        residual_conv_kernel: odd kernel size of a depthwise convolution of v over the tokens. Its result is added to the
            output. If 0, there is no convolution.

    For the other arguments, see AttentionModule. The convolution's weight is `res_conv.weight`.
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
        num_landmarks: int = 64,
        landmarks: Literal["segment", "grid", "pad_front"] = "segment",
        grid_size: tuple[int, int] | None = None,
        prefix_tokens: int = 0,
        pinv_iterations: int = 6,
        pinv_init: Literal["exact", "original"] = "exact",
        residual_conv_kernel: int = 33,
        backend: str = "auto",
    ) -> None:
        core = Nystrom(
            num_landmarks, landmarks, grid_size, prefix_tokens, pinv_iterations, pinv_init, residual_conv_kernel
        )  # fmt: skip
        super().__init__(
            core, dim, num_heads, qkv_bias, qk_norm, proj_bias, attn_drop, proj_drop, norm_layer, backend=backend
        )  # fmt: skip
