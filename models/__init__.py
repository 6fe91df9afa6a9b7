"""The ViX models: `create_model("hybrid_vip", img_size=64, num_classes=200)`.

Plain names are the published CIFAR-10 configuration: 32 x 32 pixels, one token a pixel, width 128, 4 layers, 4 heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from fnmatch import fnmatch
from functools import partial
from typing import Any

from torch import nn

from vix_kernels.nn import Attention, PerformerAttention

from .transformer import ConvStem, VisionTransformer, check_counts

__all__ = ["VisionTransformer", "create_model", "list_models"]


def vit(**kwargs: Any) -> VisionTransformer:
    """Softmax attention."""
    return VisionTransformer(lambda layer, *args, **kw: Attention(*args, **kw), **kwargs)


def vip(*, num_features: int | None = None, qkv_bias: bool = True, **kwargs: Any) -> VisionTransformer:
    """Performer: FAVOR+ attention with `num_features` random features, drawn anew for each layer."""

    if num_features is not None:
        check_counts(num_features=num_features)

    def attention(layer: int, *args: Any, **kw: Any) -> nn.Module:
        return PerformerAttention(*args, num_features=num_features, seed=layer, **kw)

    return VisionTransformer(attention, qkv_bias=qkv_bias, **kwargs)


_MODELS: dict[str, Callable[..., nn.Module]] = {
    "vit": vit,
    "vip": vip,
    "hybrid_vit": partial(vit, stem=ConvStem),
    "hybrid_vip": partial(vip, stem=ConvStem),
}


def list_models(pattern: str | None = None) -> list[str]:
    """The names that `create_model` knows, or those that match `pattern`, such as "hybrid_*"."""
    return sorted(name for name in _MODELS if pattern is None or fnmatch(name, pattern))


def create_model(name: str, **overrides: Any) -> nn.Module:
    """Build the model `name` with freshly initialised weights.

    Overrides are the keyword arguments of `VisionTransformer`; the Performers also take `num_features`.
    """
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}{_nearest(name, _MODELS)}; the models are {', '.join(list_models())}")
    signatures = inspect.signature(VisionTransformer), inspect.signature(_MODELS[name])
    valid = {p.name for s in signatures for p in s.parameters.values() if p.kind is p.KEYWORD_ONLY} - {"stem"}
    for key in overrides:
        if key not in valid:
            hint = _nearest(key, valid)
            raise ValueError(f"model {name!r} has no argument {key!r}{hint}; it takes {', '.join(sorted(valid))}")
    return _MODELS[name](**overrides)


def _nearest(word: str, words: Any) -> str:
    match = get_close_matches(word, words, n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
