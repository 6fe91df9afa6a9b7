"""What this library reaches for inside Triton's interpreter; no other file knows its insides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

# Called with the addresses in bytes of the elements that one access reaches, and the size in bytes of one element.
Observer = Callable[[np.ndarray, int], None]


@contextmanager
def hastened() -> Iterator[None]:
    """Kernels run several times faster inside, with the same results.

    The interpreter patches triton.language again in every call of a device function, 2 ms each, although the launch of the
    kernel around it has done so; inside, a launch patches all of it and the calls patch nothing. It also makes every sum and
    product of integers once more in 64 bits, to see whether 32 were enough; inside it does not.
    """
    patch_language, everything = _get(interpreter, "_patch_lang"), SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    nothing = _get(interpreter, "_LangPatchScope")()
    builder = _get(interpreter, "interpreter_builder")
    options, patched = _get(builder, "options"), False

    def patch_once(fn: Any) -> Any:
        nonlocal patched
        if patched:
            return nothing
        scope = patch_language(everything)
        restore = scope.restore

        def restore_all() -> None:
            nonlocal patched
            patched = False
            restore()

        scope.restore, patched = restore_all, True
        return scope

    interpreter._patch_lang = patch_once
    builder.options = replace(options, sanitize_overflow=False)
    try:
        yield
    finally:
        interpreter._patch_lang, builder.options = patch_language, options


@contextmanager
def watched(loaded: Observer, stored: Observer) -> Iterator[None]:
    """Calls `loaded` for every load that a kernel makes inside from global memory, and `stored` for every store."""
    builder = _get(interpreter, "interpreter_builder")
    load, store = _get(builder, "create_masked_load"), _get(builder, "create_masked_store")

    def watch_load(pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        loaded(*_reached(pointers, mask))
        return load(pointers, mask, *rest, **named)

    def watch_store(pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        stored(*_reached(pointers, mask))
        return store(pointers, value, mask, *rest, **named)

    def refuse(*args: Any, **named: Any) -> Any:
        raise NotImplementedError("atomics are not watched")

    hooks = {
        "create_masked_load": watch_load,
        "create_masked_store": watch_store,
        "create_atomic_rmw": refuse,
        "create_atomic_cas": refuse,
    }
    for name, hook in hooks.items():  # every other way to memory goes through these four
        _get(builder, name)
        setattr(builder, name, hook)
    try:
        yield
    finally:
        for name in hooks:
            delattr(builder, name)  # of the instance: the methods of its class show again


def _reached(pointers: Any, mask: Any) -> tuple[np.ndarray, int]:
    return pointers.data[mask.data], max(8, pointers.get_element_ty().primitive_bitwidth) // 8  # a bool takes a byte


def _get(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        raise RuntimeError(f"the interpreter of Triton {triton.__version__} has no {name}, which {__name__} relies on")
    return getattr(owner, name)
