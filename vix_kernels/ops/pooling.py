"""Pooling of tokens over segments of a sequence or cells of a grid, for landmarks and agents."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..primitives.landmarks import landmarks, landmarks_reference
from .checks import check_integer


def pooling(name: str, count: int, grid_size: tuple[int, int] | None, prefix_tokens: int, tokens: int) -> dict[str, Any]:
    """Return the keyword arguments for `primitives.landmarks` to pool tokens into `count` means.

    Without a grid, tokens after the prefix are pooled over segments of the sequence. With a grid, they are pooled over `count`
    grid cells that are as close to square as possible. Each prefix token becomes an additional, separate mean.

    Args:
        name: name of the argument in error messages about `count`.
        count: number of means for the tokens after the prefix.
        grid_size: (height, width) of the grid that the tokens after the prefix form.
        prefix_tokens: number of leading tokens that are not pooled.
        tokens: total number of tokens, including the prefix.
    """
    if not 0 <= check_integer("prefix_tokens", prefix_tokens) < tokens:
        raise ValueError(f"prefix_tokens: expected 0 to {tokens - 1} for {tokens} tokens, got {prefix_tokens!r}")
    tokens = tokens - prefix_tokens
    after_prefix = " after the prefix" if prefix_tokens else ""
    if not 1 <= check_integer(name, count) <= tokens:
        raise ValueError(f"{name}: expected 1 to {tokens}, the number of tokens{after_prefix}, got {count!r}")
    rows, mark_rows, mark_columns = 1, 1, count
    if grid_size is not None:
        rows, columns = check_grid(grid_size)
        if rows < 1 or columns < 1 or rows * columns != tokens:
            raise ValueError(f"grid_size: expected height * width = {tokens} tokens{after_prefix}, got {grid_size}")
        mark_rows, mark_columns = _split(name, count, rows, columns)
    return dict(
        prefix=prefix_tokens, rows=rows, mark_rows=mark_rows, mark_columns=mark_columns, adaptive=grid_size is not None
    )  # fmt: skip


def check_grid(grid_size: Any) -> tuple[int, int]:
    """Check that grid_size is a tuple or list of two integers, and return them."""
    if not isinstance(grid_size, tuple | list) or len(grid_size) != 2:
        raise TypeError(f"grid_size: expected (height, width), got {grid_size!r}")
    height, width = (check_integer("grid_size", size) for size in grid_size)
    return height, width


def at_most(count: int, tokens: int) -> int:
    """Return min(count, tokens).

    In torch.export with dynamic `tokens`, this function adds a guard and returns `count` or `tokens`. The built-in `min` would
    return a symbolic minimum.
    """
    if isinstance(tokens, torch.Tensor):  # sizes are tensors inside torch.jit.trace
        tokens = int(tokens)
    return count if count <= tokens else tokens


def _split(name: str, count: int, rows: int, columns: int) -> tuple[int, int]:
    pairs = [(a, count // a) for a in range(1, count + 1) if count % a == 0]
    pairs = [(a, b) for a, b in pairs if a <= rows and b <= columns]
    if not pairs:
        raise ValueError(
            f"{name}: expected a product rows * columns with at most {rows} rows and {columns} columns (grid_size), got {count}"
        )
    return min(pairs, key=lambda pair: abs(math.log(rows * pair[1] / (columns * pair[0]))))


def pooled_queries(
    q: Tensor, num_agents: int, *, grid_size: tuple[int, int] | None, prefix_tokens: int, mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Pool queries into agents (see `pooling`).

    Returns:
        The agents (batch, heads, agents, head_dim), and the number of valid queries in each agent (batch, agents).
    """
    pool = pooling("num_agents", num_agents, grid_size, prefix_tokens, q.shape[2])
    backend = backends.resolve(backend, q, q.shape[3])
    if backend == "reference":
        return landmarks_reference(q, q_mask=mask, **pool)
    return landmarks(q, q_mask=mask, **pool, backend=backend)


def most_cells(grid: tuple[int, int], most: int) -> int:
    """Return the largest number of cells, at most `most`, into which a grid of (rows, columns) can be divided."""
    rows, columns = grid
    return max(a * min(most // a, columns) for a in range(1, min(rows, most) + 1))


def place(grid_size: tuple[int, int] | None, prefix_tokens: int) -> str:
    """Return a description of the placement of landmarks or agents."""
    where = "in segments" if grid_size is None else f"on the grid {grid_size[0]} x {grid_size[1]}"
    return where + (f", {prefix_tokens} prefix token{'s' * (prefix_tokens > 1)}" if prefix_tokens else "")
