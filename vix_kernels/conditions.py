"""Settings for kernel launches. Measurements change them temporarily."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Conditions:
    """Settings that every kernel launch reads.

    Attributes:
        observer: a function to call in place of each launch, with the kernel, grid, arguments and options of the launch. If
            None, kernels are launched.
        arch: if set, Triton's interpreter uses the launch configurations for this architecture, except that tiles may contain
            more tokens, because larger tiles make the interpreter faster.
        split: whether launches may split the tokens of a sample and head, or the terms of a sum (_triton/sums.py), into chunks.
            If False, there is only one chunk.
        tiles: launch configurations that override entries of the launch table (_triton/launch_table.py) with the same keys.
        asked: a function that is called with every key that is looked up in the launch table, or None.
    """

    observer: Callable[[Any, tuple[int, ...], tuple, dict[str, Any]], None] | None = None
    arch: str | None = None
    split: bool = True
    tiles: Mapping[tuple, Any] = field(default_factory=dict)
    asked: Callable[[tuple], None] | None = None


class Recording(threading.local):
    """Holds the current thread's Recorder (recorder.py), or None. The Recorder executes each launch and records it."""

    recorder: Any = None


recording = Recording()
DEFAULT = Conditions()
current = DEFAULT


@contextmanager
def under(**changes: Any) -> Iterator[None]:
    """Apply `changes` to the current conditions inside the `with` block."""
    global current
    before, current = current, replace(current, **changes)
    try:
        yield
    finally:
        current = before
