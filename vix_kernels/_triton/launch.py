"""The one door through which every Triton kernel is launched."""

from __future__ import annotations

from typing import Any

import torch

from . import conditions


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch `kernel` over `grid` on the device of its first argument, a tensor.

    `meta` holds the constexprs and the launch configuration (num_warps, num_stages).
    """
    if (observer := conditions.current.observer) is not None:
        observer(kernel, grid, args, meta)
        return
    if 0 in grid:  # an empty batch
        return
    device = args[0].device
    if device.type == "cpu":  # the interpreter
        kernel[grid](*args, **meta)
        return
    # Backward threads do not inherit the caller's current device.
    with torch.get_device_module(device).device(device):
        kernel[grid](*args, **meta)
