"""The conditions that kernels are launched under: the ordinary ones, or those that a measurement sets for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Conditions:
    """
    Attributes:
        observer: is handed every launch, kernel, grid, arguments and options, instead of its being run.
        arch: the interpreter launches what this architecture would, but with more tokens a tile.
        split: False keeps all tokens of a sample and head in one chunk.
        tiles: by their keys, before those of the launch table.
        asked: is told every key that is looked up in the launch table.
    """

    observer: Callable[[Any, tuple[int, ...], tuple, dict[str, Any]], None] | None = None
    arch: str | None = None
    split: bool = True
    tiles: Mapping[tuple, Any] = field(default_factory=dict)
    asked: Callable[[tuple], None] | None = None


current = Conditions()


@contextmanager
def under(**changes: Any) -> Iterator[None]:
    """Launches inside the block are under the current conditions with these `changes`."""
    global current
    before, current = current, replace(current, **changes)
    try:
        yield
    finally:
        current = before
