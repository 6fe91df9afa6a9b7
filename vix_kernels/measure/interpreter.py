"""Speed up Triton's interpreter, and observe its memory accesses.

Only this module relies on internals of the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

# A function that receives the addresses of the accessed elements, and the size of an element in bytes.
Observer = Callable[[np.ndarray, int], None]


@contextmanager
def fast_interpreter() -> Iterator[None]:
    """Make interpreted kernels run several times faster inside the `with` block, with the same results.

    By default, the interpreter patches triton.language at every call to a device function. Each patch takes 2 ms. Inside the
    block, the interpreter patches the module only once per launch. By default, the interpreter repeats additions, subtractions
    and multiplications of integers in 64 bits to check for overflow. Inside the block, this check is disabled. Dtypes and the
    attributes of block_type and tensor objects are cached, because recomputing them would take most of the remaining time.
    """
    patch_language, everything = _get(interpreter, "_patch_lang"), SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    nothing = _get(interpreter, "_LangPatchScope")()
    builder = _get(interpreter, "interpreter_builder")
    patched = False

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

    numpy_dtype = _get(interpreter, "_get_np_dtype")
    describe_block, describe_tensor = _get(tl.core.block_type, "__init__"), _get(tl.core.tensor, "__init__")
    dtypes: dict[str, np.dtype] = {}
    blocks: dict[tuple, dict[str, Any]] = {}
    shapes: dict[tuple, dict[str, Any]] = {}

    def known_dtype(kind: Any) -> np.dtype:
        if (found := dtypes.get(kind.name)) is None:
            found = dtypes[kind.name] = numpy_dtype(kind)
        return found

    def known_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *map(int, shape))
        if key in blocks:
            vars(self).update(blocks[key], element_ty=element_ty)
        else:
            describe_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))

    def known_tensor(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()  # a plain tuple, because Triton's tuples compare slowly
        if key in shapes:
            vars(self).update(shapes[key], handle=handle, type=type, dtype=type.scalar)
        else:
            describe_tensor(self, handle, type)
            shapes[key] = dict(vars(self))

    with (
        patch.multiple(interpreter, _patch_lang=patch_once, _get_np_dtype=known_dtype),
        patch.object(tl.core.block_type, "__init__", known_block),
        patch.object(tl.core.tensor, "__init__", known_tensor),
        patch.object(builder, "options", replace(_get(builder, "options"), sanitize_overflow=False)),
    ):
        yield


@contextmanager
def watched(loaded: Observer, stored: Observer) -> Iterator[None]:
    """In the `with` block, call `loaded` before each load from global memory in a kernel, and `stored` before each store."""
    builder = _get(interpreter, "interpreter_builder")
    load, store = _get(builder, "create_masked_load"), _get(builder, "create_masked_store")

    def watch_load(pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        loaded(*_reached(pointers, mask))
        return load(pointers, mask, *rest, **named)

    def watch_store(pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        stored(*_reached(pointers, mask))
        return store(pointers, value, mask, *rest, **named)

    def refuse(*args: Any, **named: Any) -> Any:
        raise NotImplementedError("expected a kernel without atomics: atomics are not watched")

    hooks = {
        "create_masked_load": watch_load,
        "create_masked_store": watch_store,
        "create_atomic_rmw": refuse,
        "create_atomic_cas": refuse,
    }
    for name in hooks:
        _get(builder, name)
    with patch.multiple(builder, **hooks):  # all memory accesses go through these four methods
        yield


def _reached(pointers: Any, mask: Any) -> tuple[np.ndarray, int]:
    return pointers.data[mask.data], max(8, pointers.get_element_ty().primitive_bitwidth) // 8  # a bool occupies a byte


def _get(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        raise RuntimeError(f"the interpreter of Triton {triton.__version__} has no {name}, which {__name__} relies on")
    return getattr(owner, name)
