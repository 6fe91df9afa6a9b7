"""Helpers for the `vix` commands: dtypes by name, argument parsing, tables and atomic file writes."""

from __future__ import annotations

import argparse
import ast
import csv
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
Row = TypeVar("Row")


class Help(argparse.RawDescriptionHelpFormatter):
    """Wraps single-line descriptions, and keeps the line breaks of multi-line ones."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        kind = argparse.RawDescriptionHelpFormatter if "\n" in text else argparse.HelpFormatter
        return kind._fill_text(self, text, width, indent)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that prints errors as one line without the usage, and keeps the line breaks in its help."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=Help, **options)

    @classmethod
    def of(cls, prog: str, docstring: str | None) -> Parser:
        """Create a parser from a module's docstring.

        The help shows the first paragraph of the docstring before the options, and the rest after them.
        """
        description, _, epilog = (docstring or "").partition("\n\n")
        return cls(prog=prog, description=description, epilog=epilog)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


class KeyValues(argparse.Action):
    """Collects `key=value` arguments in a dict. Values are parsed as Python literals, or kept as strings if this fails."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        pairs = dict(getattr(namespace, self.dest) or {})
        for word in values:
            key, separator, value = word.partition("=")
            if not separator or not key:
                parser.error(f"{option_string}: expected key=value, got {word!r}")
            try:
                pairs[key] = ast.literal_eval(value)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # all exceptions that literal_eval raises
                pairs[key] = value
        setattr(namespace, self.dest, pairs)


def within(least: int, most: int) -> Callable[[str], int]:
    """Return an argparse type that accepts integers from `least` to `most`."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected an integer from {least} to {most}, got {text!r}")
        return value

    return integer


def figure(value: Any, digits: int = 3) -> str:
    """Format a value for a table cell. Floats have `digits` significant digits, and None becomes an empty cell."""
    return "" if value is None else f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def markdown(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    headings = list(headings)
    return [f"| {' | '.join(line)} |" for line in (headings, ["---"] * len(headings), *rows)]


def print_table(headings: Iterable[str], rows: Iterable[Iterable[str]], widths: Iterable[int] | None = None) -> None:
    """Print a table with aligned columns.

    `widths` are minimum column widths. With them, each row is printed as soon as `rows` yields it. Without them, all rows are
    collected first, and each column is as wide as its widest cell.
    """
    lines = itertools.chain([list(headings)], map(list, rows))
    if widths is None:
        lines = list(lines)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    widths = tuple(widths)
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip(), flush=True)


def progress(text: str) -> None:
    """Replace the current line of the terminal with `text`. Print nothing if stderr is not a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a temporary path, then move the file to `path`. Readers see either the old or the new file."""
    write_together({path: write})


def write_together(files: Mapping[Path, Callable[[Path], None]]) -> None:
    """Write all files to temporary paths, then move them to the given paths, one after the other. Each move is atomic."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    try:
        for path, write in files.items():
            temporary[path].touch()
            mode = temporary[path].stat().st_mode
            write(temporary[path])
            temporary[path].chmod(mode)  # safetensors creates files that only their owner can read
            with open(temporary[path], "rb+") as file:
                os.fsync(file.fileno())
        for path in files:
            os.replace(temporary[path], path)
    finally:
        for each in temporary.values():
            each.unlink(missing_ok=True)


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]], digits: int = 6) -> None:
    """Write the rows to a CSV file atomically, with a column for every key that occurs in any row."""
    rows = [{name: figure(value, digits) for name, value in row.items()} for row in rows]

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, dict.fromkeys(itertools.chain(*rows)), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


def read_csv(path: Path, kind: type[Row]) -> list[Row]:
    """Return the rows of a CSV file as instances of the dataclass `kind`, whose fields are integers, floats and strings.

    Raises:
        ValueError: the columns are not the fields of `kind`.
    """
    with path.open(newline="") as file:
        header, *lines = csv.reader(file)
    if header != [each.name for each in fields(kind)]:
        raise ValueError(f"unexpected columns {', '.join(header)}")
    types = [{"int": int, "float": float}.get(each.type, str) for each in fields(kind)]
    return [kind(*(convert(cell) for convert, cell in zip(types, line, strict=True))) for line in lines]
