"""A restricted unpickler for untrusted files. It only loads the types that its caller allows, since others could run code."""

from __future__ import annotations

import io
import pickle
from collections.abc import Set
from typing import Any


class Unpickler(pickle._Unpickler):
    """Unpickler of `content` that refuses names outside `allowed`.

    It derives from Python's implementation: the one in C allocates and fills as much memory as a damaged length or memo index
    says. For byte arrays both do, so they are refused; valid files contain none.

    Args:
        content: the pickle.
        allowed: pairs of a module and a name in it.
    """

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}

    def __init__(self, content: bytes, allowed: Set[tuple[str, str]], **options: Any) -> None:
        super().__init__(io.BytesIO(content), **options)
        self.allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in this file")
        return super().find_class(module, name)
