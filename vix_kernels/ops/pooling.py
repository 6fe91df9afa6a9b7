"""Where landmarks and agents stand: the segments of a sequence, or the cells of a grid, that their means are of."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .. import backends
from ..primitives.landmarks import landmarks, landmarks_reference
from .checks import check_integer


def pooling(name: str, count: int, grid_size: tuple[int, int] | None, prefix_tokens: int, tokens: int) -> dict[str, Any]:
    """`count` means, an argument called `name`, of `tokens` tokens, as primitives.landmarks takes them.

    Tokens of the prefix stand for themselves, beyond that number. Without a grid_size (height, width) the others are pooled
    in segments of their sequence, with one in the cells of rows x columns = count that are nearest to squares.
    """
    if not 0 <= check_integer("prefix_tokens", prefix_tokens) < tokens:
        raise ValueError(f"prefix_tokens: expected 0 to {tokens - 1} of {tokens} tokens, got {prefix_tokens!r}")
    tokens = tokens - prefix_tokens
    behind = " behind the prefix" if prefix_tokens else ""
    if not 1 <= check_integer(name, count) <= tokens:
        raise ValueError(f"{name}: expected 1 to the {tokens} tokens{behind}, got {count!r}")
    rows, mark_rows, mark_columns = 1, 1, count
    if grid_size is not None:
        rows, columns = check_grid(grid_size)
        if rows < 1 or columns < 1 or rows * columns != tokens:
            raise ValueError(f"grid_size: expected height * width = {tokens} tokens{behind}, got {grid_size}")
        mark_rows, mark_columns = _split(name, count, rows, columns)
    return dict(
        prefix=prefix_tokens, rows=rows, mark_rows=mark_rows, mark_columns=mark_columns, adaptive=grid_size is not None
    )  # fmt: skip


def check_grid(grid_size: Any) -> tuple[int, int]:
    """grid_size: two integers."""
    if not isinstance(grid_size, tuple | list) or len(grid_size) != 2:
        raise TypeError(f"grid_size: expected (height, width), got {grid_size!r}")
    height, width = (check_integer("grid_size", size) for size in grid_size)
    return height, width


def at_most(count: int, tokens: int) -> int:
    """min(count, tokens), of which torch.export would make a symbol where the tokens are dynamic."""
    return count if count <= tokens else tokens


def _split(name: str, count: int, rows: int, columns: int) -> tuple[int, int]:
    pairs = [(a, count // a) for a in range(1, count + 1) if count % a == 0]
    pairs = [(a, b) for a, b in pairs if a <= rows and b <= columns]
    if not pairs:
        raise ValueError(f"{name}: expected a product of at most {rows} rows and {columns} columns of grid_size, got {count}")
    return min(pairs, key=lambda pair: abs(math.log(rows * pair[1] / (columns * pair[0]))))


def pooled_queries(
    q: Tensor, num_agents: int, *, grid_size: tuple[int, int] | None, prefix_tokens: int, mask: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """The agents of `q`, (batch, heads, agents, head_dim), and how many tokens each is the mean of, (batch, agents)."""
    pool = pooling("num_agents", num_agents, grid_size, prefix_tokens, q.shape[2])
    backend = backends.resolve(backend, q, q.shape[3])
    if backend == "reference":
        return landmarks_reference(q, q_mask=mask, **pool)
    return landmarks(q, q_mask=mask, **pool, backend=backend)


def most_cells(grid: tuple[int, int], most: int) -> int:
    """The largest number up to `most` that is a product of at most the rows and at most the columns of the grid."""
    rows, columns = grid
    return max(a * min(most // a, columns) for a in range(1, min(rows, most) + 1))


def place(grid_size: tuple[int, int] | None, prefix_tokens: int) -> str:
    """Where landmarks or agents stand, in words."""
    where = "in segments" if grid_size is None else f"on the grid {grid_size[0]} x {grid_size[1]}"
    return where + (f", {prefix_tokens} prefix token{'s' * (prefix_tokens > 1)}" if prefix_tokens else "")
