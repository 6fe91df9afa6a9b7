"""Every public operator beside plain PyTorch, softmax attention and the installed peers; right first, then fast."""

from __future__ import annotations

from collections.abc import Callable


def test_speed(op: str, tokens: int, direction: str, provider: str, report: Callable[..., None]) -> None:
    report(op, tokens, direction, provider)
