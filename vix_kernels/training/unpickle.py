"""Pickles from outside, of which a reader admits what it needs; anything else could run code."""

from __future__ import annotations

import io
import pickle
from collections.abc import Set
from typing import Any


class Unpickler(pickle._Unpickler):
    """Loads `content` if it asks only for `allowed`, pairs of a module and a name in it.

    The one in Python: that in C allocates, and fills, whatever a damaged length or a damaged place in its memo says. So do byte
    arrays in both; no file that is read has any.
    """

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}

    def __init__(self, content: bytes, allowed: Set[tuple[str, str]], **options: Any) -> None:
        super().__init__(io.BytesIO(content), **options)
        self.allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not needed here")
        return super().find_class(module, name)
