"""Performer attention: its core, and its module."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.checks import check_integer
from ..ops.performer import orthogonal_projection, performer_attention
from ..ops.rope import Rope
from .core import Buffer, Core, SdpaArgs, Site, State, Tokens, register
from .module import RedrawnAttentionModule


@register("performer")
@dataclass(frozen=True)
class Performer(Core):
    """FAVOR+ through random features.

    Attributes:
        num_features: M; default int(head_dim * ln(head_dim)), as published.
        seed: of the random features, 0 to 4095; each layer of a model adds its number.
    """

    num_features: int | None = None
    seed: int = 0

    sited = frozenset({"seed"})
    has_extra_state = True

    def __post_init__(self) -> None:
        if not 0 <= check_integer("seed", self.seed) < 4096:
            raise ValueError(f"seed: expected 0 to 4095, got {self.seed}")

    def fit(self, site: Site) -> Performer:
        features = self.num_features
        if features is None:
            features = max(1, int(site.head_dim * math.log(site.head_dim)))
        return replace(self, num_features=features, seed=self.seed + site.layer)

    def state(self, site: Site) -> State:
        return {"projection": Buffer(self.draw(site.head_dim, 0), keep_dtype=True)}

    def draw(self, head_dim: int, redraws: int) -> Tensor:
        # Generators take 32 bits of a seed, so layer and redraw share them: 4096 layers, each a million times.
        return orthogonal_projection(self.num_features, head_dim, seed=(self.seed << 20) + redraws)

    def redraw(self, module: nn.Module) -> None:
        module.redraws += 1
        module.projection = self.draw(module.head_dim, module.redraws).to(module.projection.device)

    def extra_state(self, module: nn.Module) -> Tensor:
        """`redraws` as a tensor on the CPU, which safetensors and averages of state dicts (timm's ModelEma) can read."""
        return torch.tensor(module.redraws, device="cpu")

    def load_extra_state(self, module: nn.Module, extra: Any) -> None:
        """`extra` as extra_state returns it, an average of such tensors, or the dictionary of earlier checkpoints."""
        redraws = extra["redraws"] if isinstance(extra, dict) else extra
        if isinstance(redraws, Tensor):
            if redraws.is_meta:  # a state dict of shapes
                return
            redraws = redraws.item()
        module.redraws = round(redraws)

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *, scale: float, rope: Rope | None, tokens: Tokens,
        sdpa: SdpaArgs, backend: str,
    ) -> Tensor:  # fmt: skip
        return performer_attention(
            q, k, v, module.projection, scale=scale, key_padding_mask=tokens.key_padding_mask, rope=rope, backend=backend
        )  # fmt: skip


class PerformerAttention(RedrawnAttentionModule):
    """Performer attention (FAVOR+) between timm's linear maps.

    Args:
        num_features: M; default int(head_dim * ln(head_dim)), as published.
        seed: of the random features, 0 to 4095. Layers should differ in it, ranks must not.

    Others as in AttentionModule.

    The features are the persistent float32 buffer `projection` (M, head_dim), which stays float32 when the module is cast.
    They change only by `redraw_projection`, which `redraws` counts.
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
        super().__init__(
            Performer(num_features, seed), dim, num_heads, qkv_bias, qk_norm, proj_bias, attn_drop, proj_drop, norm_layer,
            backend=backend,
        )  # fmt: skip
