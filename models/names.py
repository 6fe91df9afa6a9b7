"""Suggestions for a mistyped name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, words: Iterable[str]) -> str:
    """' (did you mean ...?)' with the word that comes closest, or nothing."""
    match = get_close_matches(word, list(words), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
