"""Pickles from outside, of which a reader admits what it needs; anything else could run code."""

from __future__ import annotations

import pickle
from collections.abc import Set
from typing import Any, BinaryIO


class Unpickler(pickle.Unpickler):
    """Loads `file` if it asks only for `allowed`, pairs of a module and a name in it."""

    def __init__(self, file: BinaryIO, allowed: Set[tuple[str, str]], **options: Any) -> None:
        super().__init__(file, **options)
        self.allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not needed here")
        return super().find_class(module, name)
