"""A restricted unpickler for untrusted files. It loads only allowed types, because other types could execute code."""

from __future__ import annotations

import io
import pickle
from collections.abc import Set
from typing import Any


class Unpickler(pickle._Unpickler):
    """An unpickler that rejects all names that are not in `allowed`.

    If a length or a memo index is damaged, pickle's C implementation may allocate and fill as much memory as the damaged number
    specifies. The Python implementation, from which this class derives, does so only for byte arrays. Byte arrays are
    rejected, because valid files do not contain any.

    Args:
        content: the pickle.
        allowed: the allowed names, as pairs (module, name in that module).
        options: keyword arguments of pickle.Unpickler.
    """

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}

    def __init__(self, content: bytes, allowed: Set[tuple[str, str]], **options: Any) -> None:
        super().__init__(io.BytesIO(content), **options)
        self.allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in this file")
        return super().find_class(module, name)
