"""Performer attention as a module."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import check_integer
from ..ops.performer import orthogonal_projection, performer_attention
from ..ops.rope import Rope
from .attention import Attention


class PerformerAttention(Attention):
    """Performer attention (FAVOR+) between timm's linear maps.

    Args:
        num_features: M; default int(head_dim * ln(head_dim)), as published.
        seed: of the random features, 0 to 4095. Layers should differ in it, ranks must not.

    Others as in Attention.

    The features are the persistent float32 buffer `projection` (M, head_dim), which stays float32 when the module is cast.
    They change only by `redraw_projection`.
    """

    has_weights = False

    def __init__(
        self, dim: int, num_heads: int = 8, *args: Any, num_features: int | None = None, seed: int = 0, **options: Any
    ) -> None:
        super().__init__(dim, num_heads, *args, **options)
        if not 0 <= check_integer("seed", seed) < 4096:
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

    def get_extra_state(self) -> Tensor:
        """`redraws` as a tensor on the CPU, which safetensors and averages of state dicts (timm's ModelEma) can read."""
        return torch.tensor(self.redraws, device="cpu")

    def set_extra_state(self, state: Tensor | dict[str, int]) -> None:
        """`state` as get_extra_state returns it, an average of such tensors, or the dictionary of earlier checkpoints."""
        redraws = state["redraws"] if isinstance(state, dict) else state
        if isinstance(redraws, Tensor):
            if redraws.is_meta:  # a state dict of shapes
                return
            redraws = redraws.item()
        self.redraws = round(redraws)

    def _apply(self, fn: Any, recurse: bool = True) -> PerformerAttention:
        projection = self.projection
        super()._apply(fn, recurse)
        # Rounded features would differ between ranks and lose the estimate: move them, do not cast them.
        if self.projection.dtype != torch.float32:
            self.projection = projection.to(self.projection.device)
        return self

    def attend(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, rope: Rope | None) -> Tensor:
        return performer_attention(q, k, v, self.projection, key_padding_mask=key_padding_mask, rope=rope, backend=self.backend)
