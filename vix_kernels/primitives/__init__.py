"""The moves that every attention here is composed of; one file a primitive."""

from .aggregate import aggregate
from .broadcast import broadcast
from .linear import linear_aggregate, linear_broadcast
from .project import project
from .rotate import rotate

__all__ = ["aggregate", "broadcast", "linear_aggregate", "linear_broadcast", "project", "rotate"]
