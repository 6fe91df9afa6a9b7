"""Argument checks shared by the models."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


def check_counts(**counts: Any) -> None:
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {count!r}")


def check_rates(**rates: Any) -> None:
    for name, rate in rates.items():
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
            raise ValueError(f"{name}: expected a number from 0 to 1, got {rate!r}")


def check_flags(**flags: Any) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):  # reject other types, such as the string "false", which is truthy
            raise ValueError(f"{name}: expected True or False, got {flag!r}")


def check_choice(choices: Iterable[str], **chosen: Any) -> None:
    choices = tuple(choices)
    for name, choice in chosen.items():
        if choice not in choices:
            raise ValueError(f"{name}: expected one of {choices}, got {choice!r}")


def check_heads(embed_dim: int, num_heads: int) -> None:
    if embed_dim % num_heads:
        raise ValueError(f"embed_dim: expected a multiple of num_heads {num_heads}, got {embed_dim}")


def check_mlp_ratio(mlp_ratio: float, embed_dim: int) -> None:
    if not isinstance(mlp_ratio, int | float) or not 1 <= embed_dim * mlp_ratio < math.inf:
        raise ValueError(f"mlp_ratio: expected a number that gives the MLP a width of 1 or more, got {mlp_ratio!r}")


def pair(name: str, size: Any) -> tuple[int, int]:
    """Return `size` as (height, width). A single number applies to both."""
    both = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, tuple | list) else ()
    if len(both) != 2 or not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in both):
        raise ValueError(f"{name}: expected a positive integer or a pair of positive integers, got {size!r}")
    return both


def per_stage(stages: int, **values: Any) -> list[tuple[int, ...]]:
    """Return each value as a tuple with one positive integer per stage. A single number applies to all stages."""
    rows = []
    for name, value in values.items():
        row = (value,) * stages if isinstance(value, int) else tuple(value) if isinstance(value, tuple | list) else ()
        if len(row) != stages:
            raise ValueError(f"{name}: expected an integer, or one integer for each of the {stages} stages, got {value!r}")
        for count in row:
            check_counts(**{name: count})
        rows.append(row)
    return rows


def check_name(name: Any, known: Iterable[str], kind: str) -> None:
    """Raise an error if `name` is not in `known`. The message includes `kind`, which is "model" or "original"."""
    if not isinstance(name, str):
        raise TypeError(f"name: expected the name of a known {kind}, got {name!r}")
    known = tuple(known)
    if name not in known:
        raise ValueError(f"name: unknown {kind} {name!r}{nearest(name, known)}; the {kind}s are {', '.join(known)}")


def nearest(word: str, words: Iterable[str]) -> str:
    """Return a hint for an error message, with the closest matches for `word`, or "" if there are none."""
    match = get_close_matches(word, list(words), n=3)
    return f" (did you mean {' or '.join(map(repr, match))}?)" if match else ""
