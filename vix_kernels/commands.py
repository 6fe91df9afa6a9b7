"""What the commands of `vix` share: dtypes by name, how arguments are refused, how tables are printed and files written."""

from __future__ import annotations

import argparse
import ast
import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import torch

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


class KeyValues(argparse.Action):
    """Collects `key=value` words into a dict; values are Python literals, or else strings."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        pairs = dict(getattr(namespace, self.dest) or {})
        for word in values:
            key, separator, value = word.partition("=")
            if not separator or not key:
                parser.error(f"{option_string}: expected key=value, got {word!r}")
            try:
                pairs[key] = ast.literal_eval(value)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all that literal_eval may raise
                pairs[key] = value
        setattr(namespace, self.dest, pairs)


def figure(value: float | None, digits: int = 3) -> str:
    """For a cell of a table; nothing where there is no value."""
    return "" if value is None else f"{value:.{digits}g}"


def print_table(headings: Iterable[str], rows: Iterable[Iterable[str]], widths: Iterable[int] | None = None) -> None:
    """In columns as wide as their widest cell; or of at least these widths, then each row as soon as it is known."""
    lines = itertools.chain([list(headings)], map(list, rows))
    if widths is None:
        lines = list(lines)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths = tuple(widths)
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip(), flush=True)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file, then put it in the place of `path`: readers see the old file or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
