"""Hashes of kernel sources, as stored in the committed tables. If a hash changes, the rows with the old hash are outdated.

A hash covers the code of a kernel and of the device functions and constants it uses, but not their comments and docstrings.
Launch options are not covered, because the key of a row contains them (see observed.py).
"""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

from .._triton import launch_table
from .._triton.launch import kernel_name

LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE}


# Kernels that the launch table lists under the name of another kernel.
LISTED_AS = {"angle_gradient": "rotate", "pinv_forward_registers": "pinv_forward"}


def table_name(kernel: str) -> str:
    """Return the name under which the launch table lists a kernel, such as "rotate" for "rotate_kernel"."""
    name = kernel.removesuffix("_kernel")
    return LISTED_AS.get(name, name)


@cache
def code_hash(name: str) -> str:
    """Return the hash of the kernels that the launch table lists as `name`, and of the code that they use."""
    name = kernel_name(name)
    return hash_of(*(f"{each}_kernel" for each in (name, *LISTED_AS) if table_name(each) == name))


def kernel_hash(kernel: Any) -> str:
    """Return the hash of a kernel and of the device functions and constants it uses.

    For a kernel from outside `_triton`, return the hash of Triton's cache key.
    """
    return hash_of(kernel.__name__) if kernel.__name__ in device_code() else short_hash(kernel.cache_key)


@cache
def hash_of(*kernels: str) -> str:
    names = [*kernels]
    reached: dict[str, str] = {}
    while names:
        name = names.pop()
        if name not in reached:
            used = device_code()[name]
            reached[name] = " ".join(used)
            names += device_code().keys() & set(used)
    return short_hash("\n".join(reached[name] for name in sorted(reached)))


@cache
def device_code() -> dict[str, list[str]]:
    """Return the source-code tokens of each kernel, device function and constant in `_triton`, indexed by name.

    If several files define the same name, the tokens of these definitions are concatenated.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(Path(launch_table.__file__).parent.glob("*.py")):
        lines = path.read_text().splitlines(keepends=True)
        for node in ast.parse("".join(lines)).body:
            if isinstance(node, ast.Assign):
                for target in getattr(node.targets[0], "elts", node.targets):  # A, B = 1, 2 has several targets
                    found[ast.unparse(target)] += words(lines[node.lineno - 1 : node.end_lineno])
            elif isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(each) for each in node.decorator_list):
                first = node.decorator_list[0].lineno - 1
                found[node.name] += words(lines[first : node.end_lineno], ast.get_docstring(node, clean=False))
    return dict(found)


def words(lines: list[str], docstring: str | None = None) -> list[str]:
    """Return the source-code tokens of `lines`, excluding comments, newlines and the docstring."""
    tokens = tokenize.generate_tokens(io.StringIO("".join(lines)).readline)
    return [
        token.string.strip() or tokenize.tok_name[token.type]
        for token in tokens
        if token.type not in LAYOUT
        and not (docstring and token.type == tokenize.STRING and ast.literal_eval(token.string) == docstring)
    ]


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
