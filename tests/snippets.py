"""Runs what a page shows: `python tests/snippets.py PAGE` in an empty folder. Says page and line of what fails.

Its fenced blocks, from the first to the last:

    ```python               is run; the blocks of a page share their names
    ```python title="FILE"  is written to FILE, for the blocks behind it to import
    ```sh                   is run, one command after the other
    ```text                 is not code

A comment on the line above a fence leaves the block out: `<!-- not run: REASON -->`, or, where a package is missing,
`<!-- needs: PACKAGE, PACKAGE -->`. A block whose language is none of these is an error, not silence.
"""

from __future__ import annotations

import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from types import ModuleType

CODE, OTHER = ("python", "sh"), ("text",)
FENCE = re.compile(r"(?P<indent> *)(?P<ticks>`{3,})(?P<language>[\w+-]*)(?P<attributes>.*)")
TITLE = re.compile(r'\btitle="([^"]+)"')
LEFT_OUT = re.compile(r"<!-- *(not run|needs): *(.+?) *-->")


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    line: int  # of its fence, from 1
    language: str
    title: str | None  # the file that it is
    text: str
    left_out: str | None  # why it is not run

    @property
    def runs(self) -> bool:
        return self.language in CODE and self.left_out is None

    @property
    def commands(self) -> Iterator[tuple[int, str]]:
        """The commands of a shell block, each with its line."""
        begun, at = "", 0
        for number, line in enumerate(self.text.splitlines(), self.line + 1):
            begun, at = begun + line + "\n", at if begun else number
            if not line.endswith("\\"):
                if begun.strip():
                    yield at, begun
                begun = ""
        if begun:
            yield at, begun


def parse(page: Path) -> list[Block]:
    blocks, lines = [], page.read_text(encoding="utf-8").splitlines()
    numbers = iter(range(len(lines)))
    for first in numbers:
        if not (opening := FENCE.fullmatch(lines[first])):
            continue
        closing = re.compile(rf" *{opening['ticks']}`* *")
        text = []
        for number in numbers:
            if closing.fullmatch(lines[number]):
                break
            text.append(lines[number])
        title = TITLE.search(opening["attributes"])
        above = LEFT_OUT.fullmatch(lines[first - 1].strip()) if first else None
        left_out = _left_out(*above.groups()) if above else None
        blocks.append(Block(first + 1, opening["language"], title and title[1], dedent("\n".join(text)) + "\n", left_out))
    return blocks


def _left_out(kind: str, what: str) -> str | None:
    if kind == "not run":
        return what
    missing = [package for package in re.split(r",\s*", what) if not find_spec(package)]
    return f"needs {' and '.join(missing)}, not installed" if missing else None


def run(page: Path) -> int:
    # A module, since tools look for the names of a class or a function in its own.
    module = ModuleType("snippet")
    sys.modules[module.__name__] = module
    for block in parse(page):
        if block.language not in CODE + OTHER:
            known = ", ".join(CODE + OTHER)
            return _failed(page, block.line, f"expected a block of {known}, got {block.language or 'no language'}")
        if not block.runs:
            continue
        if block.language == "sh":
            for line, command in block.commands:
                if status := subprocess.run(["sh", "-ec", command], stdin=subprocess.DEVNULL).returncode:
                    return _failed(page, line, f"{command.strip()} ended with status {status}")
        elif block.title:
            file = Path(block.title)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
        else:
            try:
                # As many lines in front as on the page: tracebacks, and inspect, then find the page's own lines.
                code = compile("\n" * block.line + block.text, str(page), "exec", dont_inherit=True)
                exec(code, vars(module))
            except BaseException as error:
                traceback.print_exception(type(error), error, error.__traceback__.tb_next)
                return _failed(page, _line(error, page) or block.line, f"{type(error).__name__}: {error}")
    return 0


def _line(error: BaseException, page: Path) -> int | None:
    """The line of the page that `error` came from."""
    if isinstance(error, SyntaxError) and error.filename == str(page):
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(page)]
    return lines[-1] if lines else None


def _failed(page: Path, line: int, message: str) -> int:
    sys.stdout.flush()
    print(f"{page.name}:{line}: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    page = Path(sys.argv[1]).resolve()
    if any("import torch" in block.text for block in parse(page)):
        import conftest  # noqa: F401  what the tests do to torch: a GPU or the interpreter, torchvision's operators
    here = Path(__file__).resolve().parent
    sys.path = [each for each in sys.path if Path(each).resolve() != here]  # the tests are not what a page imports
    sys.exit(run(page))
