"""Token mixers by name: every core that is registered. A model is given one of them and makes it once a layer.

mixer(dim, place, num_heads=, qkv_bias=, proj_drop=, backend=) -> module(x, rope=rope), x (B, tokens, dim)
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
    """Where in a model a mixer stands."""

    layer: int
    grid: tuple[int, int]  # rows and columns of the token map
    prefix_tokens: int  # tokens in front of the map

    @property
    def tokens(self) -> int:
        return self.prefix_tokens + self.grid[0] * self.grid[1]


def mixer_options(name: str) -> set[str]:
    """The options that the mixer `name` alone takes: all that do not follow from where it stands."""
    check_choice(CORES, mixer=name)
    return set(CORES[name].options()) - CORES[name].sited


def make_mixer(name: str, **own: Any) -> Mixer:
    """The mixer `name` with its own options fixed."""
    check_choice(CORES, mixer=name)
    check_counts(**{key: own[key] for key in COUNTS if own.get(key) is not None})
    core = CORES[name].made("zoo", **own)

    def mixer(dim: int, place: Place, *, num_heads: int, **options: Any) -> nn.Module:
        site = Site(dim // num_heads, num_heads, place.layer, place.grid, place.prefix_tokens, place.tokens)
        return make_module(core, dim, num_heads=num_heads, site=site, **options)

    return mixer
