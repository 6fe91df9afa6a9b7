"""Argument checks for the modules. Each error names the argument and states the expected and the actual value."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.checks import check_floating, check_integer, dtype_name
from ..ops.pooling import check_grid


def check_heads(dim: int, num_heads: int) -> None:
    check_integer("dim", dim, 1)
    check_integer("num_heads", num_heads, 1)
    if dim % num_heads:
        raise ValueError(f"num_heads: expected a divisor of dim {dim}, got {num_heads}")


def check_rate(name: str, rate: Any) -> None:
    """Check that `rate` is a number from 0 to 1."""
    if not isinstance(rate, numbers.Real) or isinstance(rate, bool):
        raise TypeError(f"{name}: expected a number from 0 to 1, got {rate!r}")
    if not 0 <= rate <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {rate!r}")


def check_placement(name: str, count: int, grid_size: tuple[int, int] | None, prefix_tokens: int) -> None:
    """Check `count`, the number of landmarks or agents, and the arguments that place them.

    `name` is the name of `count` in error messages.
    """
    check_integer(name, count, 1)
    check_integer("prefix_tokens", prefix_tokens, 0)
    if grid_size is not None and min(check_grid(grid_size)) < 1:
        raise ValueError(f"grid_size: expected two integers >= 1, got {grid_size!r}")


def check_tokens(x: Tensor, dim: int, first: nn.Module | None = None) -> None:
    """Check that x has shape (batch, tokens, dim). Outside autocast, x must also have the dtype of the linear layer `first`."""
    check_floating("x", x)
    if x.dim() != 3 or x.shape[2] != dim:
        raise ValueError(f"x: expected (batch, tokens, {dim}), got shape {tuple(x.shape)}")
    # A layer that is not a plain nn.Linear, for example a quantized one, may accept dtypes other than the dtype of its weight.
    if type(first) is nn.Linear and x.dtype != first.weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x: expected the module's dtype {dtype_name(first.weight.dtype)}, got {dtype_name(x.dtype)}")


def check_call_grid(grid_size: tuple[int, int], tokens: int, prefix_tokens: int | None) -> None:
    """Check the grid of a call: its height * width must equal the number of tokens after the prefix.

    If `prefix_tokens` is None, the length of the prefix is unknown, so height * width may be less than `tokens`.
    """
    rows, columns = check_grid(grid_size)
    if prefix_tokens is not None and rows * columns != tokens - prefix_tokens:
        raise ValueError(
            f"grid_size: expected height * width = {tokens - prefix_tokens} tokens after the prefix, got {grid_size}"
        )
    if min(rows, columns) < 1 or rows * columns > tokens:
        raise ValueError(f"grid_size: expected positive integers with height * width <= {tokens} tokens, got {grid_size}")
