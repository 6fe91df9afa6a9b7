"""Attention with learned features, as a core (see core.py) and as a module."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.checks import check_integer, check_number
from ..ops.feature import feature_attention
from ..ops.performer import orthogonal_projection
from ..ops.rope import Rope
from .core import PrefixCore, SdpaArgs, Site, State, Tokens, register
from .module import AttentionModule


@register("feature")
@dataclass(frozen=True)
class Feature(PrefixCore):
    """Attention with learned features of queries and keys. The features are separate for each head.

    The initial features are random. With gaussian=True, the untrained layer computes Performer attention.

    Attributes:
        num_features: number of features, M.
        gaussian: as in feature_attention.
        seed: seed of the initial features. In a model, the index of the layer is added to it.
    """

    num_features: int = 32
    gaussian: bool | float = True
    seed: int = 0

    sited = frozenset({"seed"})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("num_features", self.num_features, 1)
        check_integer("seed", self.seed, 0)
        if not isinstance(self.gaussian, bool):
            check_number("gaussian", self.gaussian, zero=True)

    def fit(self, site: Site) -> Feature:
        return self.in_layer(site.layer)

    def in_layer(self, layer: int) -> Feature:
        return replace(self, seed=self.seed + layer) if layer else self

    def describe(self) -> str:
        return f"feature, {self.num_features} learned features{self.describe_prefix()}"

    def state(self, site: Site) -> State:
        drawn = orthogonal_projection(self.num_features, site.head_dim, seed=self.seed, num_heads=site.num_heads)
        return {
            "query_features": nn.Parameter(drawn),
            "key_features": nn.Parameter(drawn.clone()),
            "feature_bias": nn.Parameter(torch.zeros(site.num_heads, self.num_features)),
        }

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, rope: Rope | None, tokens: Tokens,
        sdpa: SdpaArgs, backend: str,
    ) -> Tensor:  # fmt: skip
        features = module.query_features, module.key_features, module.feature_bias
        features = (x.float() if x.element_size() == 2 else x for x in features)  # if the module was cast to 16 bits
        return feature_attention(
            q, k, v, *features, gaussian=self.gaussian, scale=scale, key_padding_mask=tokens.key_padding_mask, rope=rope,
            exact_rows=self.exact_rows(tokens), backend=backend,
        )  # fmt: skip


class FeatureAttention(AttentionModule):
    """Attention with learned features, and with linear layers named as in timm's `Attention` (`qkv`, `proj`).

    Args:
        num_features: number of features, M.
        gaussian: as in feature_attention.
        seed: seed of the initial features, which are random features as in PerformerAttention.

    For the other arguments, see AttentionModule. The parameters `query_features` and `key_features` are (num_heads, M,
    head_dim), and `feature_bias` is (num_heads, M).
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
        num_features: int = 32,
        gaussian: bool | float = True,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            Feature(num_features, gaussian, seed), dim, num_heads, qkv_bias, qk_norm, proj_bias, attn_drop, proj_drop,
            norm_layer, backend=backend,
        )  # fmt: skip
