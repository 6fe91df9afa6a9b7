"""The moves that every attention here is composed of; one file a primitive."""

from .aggregate import aggregate
from .broadcast import broadcast
from .rotate import rotate

__all__ = ["aggregate", "broadcast", "rotate"]
