"""Primitives: differentiable operators from which the attention functions in ops/ are built."""

from .aggregate import aggregate
from .broadcast import broadcast
from .dft import dft
from .landmarks import landmarks
from .linear import linear_aggregate, linear_broadcast
from .pinv import pinv
from .project import project
from .rotate import rotate
from .token_conv import token_conv

__all__ = [
    "aggregate",
    "broadcast",
    "dft",
    "landmarks",
    "linear_aggregate",
    "linear_broadcast",
    "pinv",
    "project",
    "rotate",
    "token_conv",
]
