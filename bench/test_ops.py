"""Benchmark every public operator against plain PyTorch, softmax attention and other installed packages.

The results of each implementation are checked before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable


def test_speed(op: str, tokens: int, direction: str, provider: str, report: Callable[..., None]) -> None:
    report(op, tokens, direction, provider)
