"""The moves that every attention here is composed of; one file a primitive."""

from .aggregate import aggregate
from .broadcast import broadcast
from .dft import dft
from .linear import linear_aggregate, linear_broadcast
from .rotate import rotate

__all__ = ["aggregate", "broadcast", "dft", "linear_aggregate", "linear_broadcast", "rotate"]
