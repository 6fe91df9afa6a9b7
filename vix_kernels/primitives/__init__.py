"""The moves that every attention here is composed of; one file a primitive."""

from .aggregate import aggregate
from .broadcast import broadcast
from .linear import linear_aggregate, linear_broadcast
from .rotate import rotate
from .token_conv import token_conv

__all__ = ["aggregate", "broadcast", "linear_aggregate", "linear_broadcast", "rotate", "token_conv"]
