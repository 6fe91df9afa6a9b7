"""Launch kernels that Triton has already compiled.

`kernel[grid](*args)` takes 26 to 31 microseconds to find the compiled kernel, because Triton inspects every argument. Most
launches repeat an earlier launch with different tensors. `run` recognizes such a launch by the arguments that are not tensors
and by the dtypes, devices and alignment of the tensors. It passes pointers as integers, which Triton's launcher does not
inspect.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver

MOST = 4096  # maximum number of entries in `known`; a full table is cleared before an entry is added
ALIGNMENT = 16  # bytes; Triton compiles different code for unaligned pointers


class Compiled(NamedTuple):
    """A compiled kernel.

    Attributes:
        kernel: Triton's CompiledKernel. It is kept because its deletion unloads the machine code.
        run: the launcher of `kernel`.
        function, metadata: the handle and the metadata that the launcher receives.
        constexprs: the values of the constexprs, in the order of the parameters.
    """

    kernel: Any
    run: Any
    function: Any
    metadata: Any
    constexprs: tuple[Any, ...]

    def start(self, grid: tuple[int, int, int], stream: int, args: list[Any]) -> None:
        """Launch the kernel on the current device. `args` must contain the addresses of tensors, not tensors."""
        self.run(*grid, stream, self.function, self.metadata, None, None, None, *args, *self.constexprs)


def current_stream() -> int:
    return driver.active.get_current_stream(driver.active.get_current_device())


known: dict[tuple, Compiled] = {}


def run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]) -> Compiled | None:
    """Launch `kernel` on the current device.

    `meta` contains the constexprs and the launch options. `args` contains all other arguments.

    Returns:
        The compiled kernel, or None if Triton must handle every launch or a hook skipped the compilation.
    """
    if kernel.pre_run_hooks or needs_triton():
        kernel[grid](*args, **meta)
        return None
    device = driver.active.get_current_device()
    # The key includes types, because 1 and 1.0 are equal, but Triton compiles different code for them.
    key = [kernel, device, *meta.items(), *map(type, args)]
    values = []
    for x in args:
        if isinstance(x, Tensor):
            pointer = x.data_ptr()
            values.append(pointer)
            key += x.dtype, x.get_device(), pointer % ALIGNMENT == 0
        else:
            values.append(x)
            key.append(x)
    found = known.get(key := tuple(key))
    if found is None:
        return remember(key, kernel, kernel[grid](*args, **meta), args, meta)
    found.start((*grid, 1, 1)[:3], driver.active.get_current_stream(device), values)
    return found


def needs_triton() -> bool:
    """Return whether Triton must handle every launch.

    `Compiled.start` does not call launch hooks. On AMD GPUs, compiled code depends on the sizes of tensors, which `run`
    ignores. Debugging and instrumentation change the compiled code, and can be enabled at any time.
    """
    runtime = knobs.runtime
    # By default, each hook is an empty chain.
    hooks = (getattr(hook, "calls", hook) for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook))
    return bool(
        torch.version.hip
        or any(hooks)
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
    )


def remember(key: tuple, kernel: Any, compiled: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> Compiled | None:
    """Keep a compiled kernel for later launches, and return it.

    `compiled` is the result of Triton's launch. If it is None because a hook skipped the compilation, return None.
    """
    params = kernel.params
    if any(param.is_constexpr for param in params[: len(args)]) or not all(param.is_constexpr for param in params[len(args) :]):
        raise TypeError(f"{kernel.__name__}: expected constexprs as keywords, after all other parameters by position")
    if compiled is None:
        return None
    if len(known) >= MOST:
        known.clear()
    constexprs = tuple(meta.get(param.name, param.default) for param in params[len(args) :])
    # Another thread may have added the same kernel. The machine code of that entry may be running, so the entry is kept.
    return known.setdefault(key, Compiled(compiled, compiled.run, compiled.function, compiled.packed_metadata, constexprs))
