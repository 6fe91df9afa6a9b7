"""The token mixers by name. A model is given one of them and makes it once a layer.

mixer(dim, place, num_heads=, qkv_bias=, proj_drop=, backend=) -> module(x, rope=rope), x (B, tokens, dim)
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from vix_kernels.nn import (
    AgentAttention,
    Attention,
    FourierMixing,
    LinearAttention,
    LinformerAttention,
    NystromAttention,
    PerformerAttention,
)

from .arguments import check_choice, check_counts


class Place(NamedTuple):
    """Where in a model a mixer stands."""

    layer: int
    grid: tuple[int, int]  # rows and columns of the token map
    prefix_tokens: int  # tokens in front of the map

    @property
    def tokens(self) -> int:
        return self.prefix_tokens + self.grid[0] * self.grid[1]


def softmax(dim: int, place: Place, **options: Any) -> nn.Module:
    """Softmax attention, quadratic in the tokens."""
    return Attention(dim, **options)


def performer(dim: int, place: Place, *, num_features: int | None = None, **options: Any) -> nn.Module:
    """FAVOR+ through `num_features` random features, drawn anew for each layer."""
    return PerformerAttention(dim, num_features=num_features, seed=place.layer, **options)


def linear(dim: int, place: Place, *, feature_map: str = "relu", **options: Any) -> nn.Module:
    """Linear attention on relu or elu + 1 of the channels."""
    return LinearAttention(dim, feature_map=feature_map, **options)


def nystrom(
    dim: int,
    place: Place,
    *,
    num_landmarks: int = 64,
    landmarks: str = "segment",
    residual_conv_kernel: int = 33,
    **options: Any,
) -> nn.Module:
    """Nystrom attention through the means of segments, or of cells of the "grid", and a convolution of v over the tokens.

    On the grid the class token is a landmark of its own.
    """
    cells = dict(grid_size=place.grid, prefix_tokens=place.prefix_tokens) if landmarks == "grid" else {}
    return NystromAttention(
        dim, num_landmarks=num_landmarks, landmarks=landmarks, residual_conv_kernel=residual_conv_kernel, **cells, **options
    )


def linformer(dim: int, place: Place, *, num_landmarks: int = 64, share_kv: bool = True, **options: Any) -> nn.Module:
    """Keys and values are projected along the tokens to `num_landmarks`, by one projection or, not share_kv, two."""
    return LinformerAttention(dim, seq_len=place.tokens, num_landmarks=num_landmarks, share_kv=share_kv, **options)


def agent(dim: int, place: Place, *, num_agents: int = 49, **options: Any) -> nn.Module:
    """Agent attention; its agents are means of the queries of grid cells, the class token is an agent of its own."""
    side = next(side for side in range(math.isqrt(num_agents), 0, -1) if num_agents % side == 0)
    count = min(side, place.grid[0]) * min(num_agents // side, place.grid[1])
    return AgentAttention(dim, num_agents=count, grid_size=place.grid, prefix_tokens=place.prefix_tokens, **options)


def fourier(dim: int, place: Place, **options: Any) -> nn.Module:
    """The Fourier transform, scaled to keep the size of the tokens, which the published sums exceed some hundred times."""
    return FourierMixing(dim, norm="ortho", **options)


MIXERS: dict[str, Callable[..., nn.Module]] = {
    mixer.__name__: mixer for mixer in (softmax, performer, linear, nystrom, linformer, agent, fourier)
}
Mixer = Callable[..., nn.Module]


def mixer_options(name: str) -> set[str]:
    """The options that the mixer `name` alone takes."""
    check_choice(MIXERS, mixer=name)
    kinds = inspect.signature(MIXERS[name]).parameters.values()
    return {each.name for each in kinds if each.kind is each.KEYWORD_ONLY}


def make_mixer(name: str, **own: Any) -> Mixer:
    """The mixer `name` with its own options fixed."""
    check_choice(MIXERS, mixer=name)
    check_counts(**{key: own[key] for key in ("num_features", "num_landmarks", "num_agents") if own.get(key) is not None})
    return partial(MIXERS[name], **own)
