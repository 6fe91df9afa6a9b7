"""Launch kernels that Triton has already compiled.

`kernel[grid](*args)` takes 26 to 31 microseconds to find the compiled kernel: Triton inspects every argument. Most launches
repeat an earlier one with other tensors. `run` recognizes them by the arguments that are not tensors and by the dtypes and the
alignment of the tensors. It calls the compiled kernel with integers as pointers, which Triton's launcher does not inspect.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver

MOST = 4096  # entries; with more, all are forgotten
ALIGNMENT = 16  # bytes; Triton compiles different code for pointers that are not aligned


class Compiled(NamedTuple):
    """A compiled kernel, and the values of its constexprs in the order of its parameters."""

    run: Callable[..., None]
    function: int
    metadata: Any
    constexprs: tuple[Any, ...]


known: dict[tuple, Compiled] = {}


def run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    """Launch `kernel` on the current device. `args` are all parameters that are not constexprs, and `meta` has the others."""
    runtime = knobs.runtime
    if torch.version.hip or kernel.pre_run_hooks or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls:
        kernel[grid](*args, **meta)  # AMD's code also depends on the sizes of tensors, and hooks want the arguments
        return
    device = driver.active.get_current_device()
    # The types matter, because 1 and 1.0 are equal, but compiled differently.
    key = [kernel, device, *meta.items(), *map(type, args)]
    values = []
    for x in args:
        if isinstance(x, Tensor):
            pointer = x.data_ptr()
            values.append(pointer)
            key += x.dtype, pointer % ALIGNMENT == 0
        else:
            values.append(x)
            key.append(x)
    key = tuple(key)
    found = known.get(key)
    if found is None:
        remember(key, kernel, kernel[grid](*args, **meta), meta)
        return
    found.run(
        *grid, *(1,) * (3 - len(grid)), driver.active.get_current_stream(device), found.function, found.metadata,
        None, None, None, *values, *found.constexprs,
    )  # fmt: skip


def remember(key: tuple, kernel: Any, compiled: Any, meta: dict[str, Any]) -> None:
    """Keep a compiled kernel for later launches. Its constexprs must be the last parameters."""
    last = [param.is_constexpr for param in kernel.params]
    if last != sorted(last):
        raise TypeError(f"{kernel.__name__}: expected constexprs after all other parameters")
    constexprs = tuple(meta.get(param.name, param.default) for param in kernel.params if param.is_constexpr)
    if len(known) >= MOST:
        known.clear()
    known[key] = Compiled(compiled.run, compiled.function, compiled.packed_metadata, constexprs)
