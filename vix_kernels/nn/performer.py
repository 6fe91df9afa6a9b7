"""Performer attention, as a core (see core.py) and as a module."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..ops.checks import check_integer
from ..ops.performer import orthogonal_projection, performer_attention
from ..ops.rope import Rope
from ..primitives.registry import library
from .core import Buffer, PrefixCore, SdpaArgs, Site, State, Tokens, register
from .module import RedrawnAttentionModule


class Derived(NamedTuple):
    """The random features of Performer attention. `Performer.attend` accepts this tuple in place of a module."""

    projection: Tensor


@register("performer")
@dataclass(frozen=True)
class Performer(PrefixCore):
    """Performer attention (FAVOR+) with random features.

    Attributes:
        num_features: number of random features, M. Defaults to int(head_dim * ln(head_dim)).
        seed: seed of the random features, 0 to 4095. In a model, the index of the layer is added to it.
    """

    num_features: int | None = None
    seed: int = 0

    sited = frozenset({"seed"})
    has_extra_state = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("seed", self.seed, 0)
        if self.num_features is not None:
            check_integer("num_features", self.num_features, 1)

    def fit(self, site: Site) -> Performer:
        return replace(self.in_layer(site.layer), num_features=self.features_of(site.head_dim))

    def in_layer(self, layer: int) -> Performer:
        return replace(self, seed=self.seed + layer) if layer else self

    def features_of(self, head_dim: int) -> int:
        return max(1, int(head_dim * math.log(head_dim))) if self.num_features is None else self.num_features

    def describe(self) -> str:
        return f"performer, {self.num_features or 'd ln d'} features, seed {self.seed}{self.describe_prefix()}"

    def needs_module(self) -> bool:
        return False

    def derived(self, q: Tensor) -> Any:
        """Return a Derived with the random features, which are cached per process instead of being stored in a module."""
        return Derived(random_features(q, self.features_of(q.shape[3]), self.seed))

    def state(self, site: Site) -> State:
        if self.seed >= 4096:
            raise ValueError(f"seed: expected 0 to 4095, got {self.seed}")
        return {"projection": Buffer(self.draw(site.head_dim, 0), keep_dtype=True)}

    def draw(self, head_dim: int, redraws: int) -> Tensor:
        # The CPU generator uses only 32 bits of its seed. The upper 12 bits are the layer's seed. The lower 20 count redraws.
        return orthogonal_projection(self.num_features, head_dim, seed=(self.seed << 20) + redraws)

    def redraw(self, module: nn.Module) -> None:
        module.redraws += 1
        with torch.no_grad():  # in place, because captured CUDA graphs read this memory
            module.projection.copy_(self.draw(module.head_dim, module.redraws))

    def extra_state(self, module: nn.Module) -> Tensor:
        """Return `redraws` as a CPU tensor, because safetensors and timm's ModelEma only support tensors."""
        return torch.tensor(module.redraws, device="cpu")

    def load_extra_state(self, module: nn.Module, extra: Any) -> None:
        """Load `redraws` from a tensor or, for checkpoints of earlier versions, from a dict.

        Averaged checkpoints may contain a fractional number, which is rounded.
        """
        redraws = extra["redraws"] if isinstance(extra, dict) else extra
        if isinstance(redraws, Tensor):
            if redraws.is_meta:  # a state dict without data
                return
            redraws = redraws.item()
        module.redraws = round(redraws)

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, rope: Rope | None, tokens: Tokens,
        sdpa: SdpaArgs, backend: str,
    ) -> Tensor:  # fmt: skip
        return performer_attention(
            q, k, v, module.projection, scale=scale, key_padding_mask=tokens.key_padding_mask, rope=rope,
            exact_rows=self.exact_rows(tokens), backend=backend,
        )  # fmt: skip


class PerformerAttention(RedrawnAttentionModule):
    """Performer attention (FAVOR+) with linear layers named as in timm's `Attention` (`qkv`, `proj`).

    Args:
        num_features: number of random features, M. Defaults to int(head_dim * ln(head_dim)).
        seed: seed of the random features, 0 to 4095. It should differ between layers and must be the same on all ranks.

    For the other arguments, see AttentionModule.

    The features are the persistent buffer `projection` (M, head_dim), which stays float32 when the module is cast. Only
    `redraw_projection` and loading a state dict change them. `redraws` counts the calls to `redraw_projection`.
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


def random_features(q: Tensor, num_features: int, seed: int) -> Tensor:
    """Return random features from `orthogonal_projection` for q's head_dim, on q's device.

    The features are drawn once per process and cached.
    """
    if torch.compiler.is_dynamo_compiling():
        return torch.ops.vix_kernels.random_features(q.detach(), num_features, seed)
    return _drawn(num_features, q.shape[3], seed, q.device)


@lru_cache(maxsize=256)
def _drawn(num_features: int, width: int, seed: int, device: torch.device) -> Tensor:
    # The cached tensor outlives this call, so it must not depend on transforms or modes that are active now.
    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        return orthogonal_projection(num_features, width, seed=seed).to(device)


# Compilers cannot trace how features are drawn, so compiled code calls this operator instead. An operator must not return a
# cached tensor, so this one returns a clone.
library.define("random_features(Tensor q, SymInt num_features, int seed) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
library.impl(
    "random_features",
    lambda q, num_features, seed: _drawn(num_features, q.shape[3], seed, q.device).clone(),
    "CompositeExplicitAutograd",
)
torch.library.register_fake(
    "vix_kernels::random_features",
    lambda q, num_features, seed: q.new_empty(num_features, q.shape[3], dtype=torch.float32),
    lib=library,
)
