"""Hashes of what a committed figure was made from, without comments and docstrings: a change makes the figure old."""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections import defaultdict
from functools import cache
from pathlib import Path

from .._triton import launch_table

LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE}


def table_name(kernel: str) -> str:
    """The name of a kernel in the launch table."""
    return "rotate" if kernel == "angle_gradient_kernel" else kernel.removesuffix("_kernel")


@cache
def code_hash(name: str) -> str:
    """Of the kernels of a name in the launch table and of the device functions they call."""
    name = name.removesuffix("_pooled")
    names = [f"{name}_kernel", *(["angle_gradient_kernel"] if name == "rotate" else [])]
    reached: dict[str, str] = {}
    while names:
        name = names.pop()
        if name not in reached:
            words = device_functions()[name]
            reached[name] = " ".join(words)
            names += device_functions().keys() & set(words)
    return short_hash("\n".join(reached[name] for name in sorted(reached)))


@cache
def source_hash(kernel: str, arch: str) -> str:
    """Of a kernel's code, and of the tiles that it can be launched with on `arch`."""
    name = table_name(kernel)
    tables = launch_table.TABLE, launch_table.OVERRIDES.get(arch, {})
    tiles = {key: tuple(tile) for table in tables for key, tile in table.items() if key[0].removesuffix("_pooled") == name}
    return short_hash(code_hash(name) + repr(sorted(tiles.items())))


@cache
def device_functions() -> dict[str, list[str]]:
    """The words of the functions of _triton that run on a GPU; the same name may be defined in several files."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(Path(launch_table.__file__).parent.glob("*.py")):
        lines = path.read_text().splitlines(keepends=True)
        for node in ast.parse("".join(lines)).body:
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(each) for each in node.decorator_list):
                first = node.decorator_list[0].lineno - 1
                text = io.StringIO("".join(lines[first : node.end_lineno]))
                docstring = ast.get_docstring(node, clean=False)
                for token in tokenize.generate_tokens(text.readline):
                    is_docstring = token.type == tokenize.STRING and ast.literal_eval(token.string) == docstring
                    if token.type not in LAYOUT and not is_docstring:
                        found[node.name].append(token.string.strip() or tokenize.tok_name[token.type])
    return dict(found)


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
