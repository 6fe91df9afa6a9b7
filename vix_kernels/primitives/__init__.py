"""The moves that every attention here is composed of; one file a primitive."""

from .aggregate import aggregate
from .broadcast import broadcast
from .landmarks import landmarks
from .linear import linear_aggregate, linear_broadcast
from .rotate import rotate

__all__ = ["aggregate", "broadcast", "landmarks", "linear_aggregate", "linear_broadcast", "rotate"]
