"""Token mixers by name, one for every core in `CORES` (vix_kernels/nn/core.py).

A `Mixer` is a function that creates the token mixer of a layer. The constructor of a model calls it once per layer:

    module = mixer(dim, place, num_heads=..., qkv_bias=..., proj_drop=..., backend=...)

The forward pass of the model calls module(x, rope=rope), where x has shape (B, tokens, dim).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from vix_kernels.nn.core import CORES, Site
from vix_kernels.nn.module import make_module

from .arguments import check_choice, check_counts

Mixer = Callable[..., nn.Module]
COUNTS = ("num_features", "num_landmarks", "num_agents")


class Place(NamedTuple):
    """The place of a mixer in a model: the index of its layer, and the layout of the tokens."""

    layer: int
    grid: tuple[int, int]  # height and width of the token map
    prefix_tokens: int  # number of tokens before the map

    @property
    def tokens(self) -> int:
        return self.prefix_tokens + self.grid[0] * self.grid[1]


def mixer_options(name: str) -> set[str]:
    """Return the option names of the mixer `name`, except options that the mixer's place in the model determines."""
    check_choice(CORES, mixer=name)
    return set(CORES[name].options()) - CORES[name].sited


def make_mixer(name: str, **core_options: Any) -> Mixer:
    """Return the mixer `name`. `core_options` are the options of its core."""
    check_choice(CORES, mixer=name)
    check_counts(**{key: core_options[key] for key in COUNTS if core_options.get(key) is not None})
    core = CORES[name].made("zoo", **core_options)

    def mixer(dim: int, place: Place, *, num_heads: int, **options: Any) -> nn.Module:
        site = Site(dim // num_heads, num_heads, place.layer, place.grid, place.prefix_tokens, place.tokens)
        return make_module(core, dim, num_heads=num_heads, site=site, **options)

    return mixer
