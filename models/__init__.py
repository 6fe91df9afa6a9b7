"""The ViX models: `create_model("hybrid_vip", img_size=64, num_classes=200)`.

Plain names are the published CIFAR-10 configuration: 32 x 32 pixels, one token a pixel, width 128, 4 layers, 4 heads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from typing import Any

from torch import nn

from vix_kernels.nn import Attention, FourierMixing, LinformerAttention, NystromAttention, PerformerAttention

from .names import nearest
from .originals import from_original
from .transformer import ConvStem, VisionTransformer, check_counts

__all__ = ["VisionTransformer", "create_model", "from_original", "list_models"]


def vit(**kwargs: Any) -> VisionTransformer:
    """Softmax attention."""
    return VisionTransformer(_mixer(Attention), **kwargs)


def vip(*, num_features: int | None = None, qkv_bias: bool = True, **kwargs: Any) -> VisionTransformer:
    """Performer: FAVOR+ attention with `num_features` random features, drawn anew for each layer."""
    if num_features is not None:
        check_counts(num_features=num_features)

    def attention(layer: int, dim: int, grid: tuple[int, int], prefix_tokens: int, **options: Any) -> nn.Module:
        return PerformerAttention(dim, num_features=num_features, seed=layer, **options)

    return VisionTransformer(attention, qkv_bias=qkv_bias, **kwargs)


def vin(
    *, num_landmarks: int = 64, landmarks: str = "segment", residual_conv_kernel: int = 33, **kwargs: Any
) -> VisionTransformer:
    """Nystromformer: attention through `num_landmarks` means of segments, or of cells of the "grid", and a convolution of v.

    On the grid the class token is a landmark of its own.
    """
    check_counts(num_landmarks=num_landmarks)

    def attention(layer: int, dim: int, grid: tuple[int, int], prefix_tokens: int, **options: Any) -> nn.Module:
        cells = dict(grid_size=grid, prefix_tokens=prefix_tokens) if landmarks == "grid" else {}
        return NystromAttention(
            dim, num_landmarks=num_landmarks, landmarks=landmarks, residual_conv_kernel=residual_conv_kernel, **cells, **options
        )

    return VisionTransformer(attention, **kwargs)


def vil(*, num_landmarks: int = 64, share_kv: bool = True, **kwargs: Any) -> VisionTransformer:
    """Linformer: keys and values are projected along the tokens to `num_landmarks`, by one projection or, not share_kv, two."""
    check_counts(num_landmarks=num_landmarks)

    def attention(layer: int, dim: int, grid: tuple[int, int], prefix_tokens: int, **options: Any) -> nn.Module:
        seq_len = prefix_tokens + grid[0] * grid[1]
        return LinformerAttention(dim, seq_len=seq_len, num_landmarks=num_landmarks, share_kv=share_kv, **options)

    return VisionTransformer(attention, **kwargs)


def fnet(*, position: str = "learned", **kwargs: Any) -> VisionTransformer:
    """FNet: Fourier mixing, scaled to keep the size of the tokens, which the published sums exceed some hundred times.

    A rotary position has nothing to rotate and is refused.
    """
    if position.startswith("rope"):
        raise ValueError(f"position: expected 'learned' or 'none' (the transform has no queries and keys), got {position!r}")

    return VisionTransformer(_mixer(FourierMixing, norm="ortho"), position=position, **kwargs)


def _mixer(kind: Callable[..., nn.Module], **fixed: Any) -> Callable[..., nn.Module]:
    """One that neither its layer nor the token map changes."""

    def mixer(layer: int, dim: int, grid: tuple[int, int], prefix_tokens: int, **options: Any) -> nn.Module:
        return kind(dim, **fixed, **options)

    return mixer


_PLAIN: tuple[Callable[..., nn.Module], ...] = (vit, vip, vin, vil, fnet)
_MODELS = {model.__name__: model for model in _PLAIN} | {
    f"hybrid_{model.__name__}": partial(model, stem=ConvStem) for model in _PLAIN
}


def list_models(pattern: str | None = None) -> list[str]:
    """The names that `create_model` knows, or those that match `pattern`, such as "hybrid_*"."""
    return sorted(name for name in _MODELS if pattern is None or fnmatch(name, pattern))


def create_model(name: str, **overrides: Any) -> nn.Module:
    """Build the model `name` with freshly initialised weights.

    Overrides are the keyword arguments of `VisionTransformer`; the Performers also take `num_features`.
    """
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}{nearest(name, _MODELS)}; the models are {', '.join(list_models())}")
    signatures = inspect.signature(VisionTransformer), inspect.signature(_MODELS[name])
    valid = {p.name for s in signatures for p in s.parameters.values() if p.kind is p.KEYWORD_ONLY} - {"stem"}
    for key in overrides:
        if key not in valid:
            hint = nearest(key, valid)
            raise ValueError(f"model {name!r} has no argument {key!r}{hint}; it takes {', '.join(sorted(valid))}")
    return _MODELS[name](**overrides)
