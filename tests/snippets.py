"""Run the code blocks in a page: `python tests/snippets.py PAGE` in an empty folder. Errors name the page and the line.

Fenced blocks are processed in order:

    ```python               is run; all blocks in a page share one namespace
    ```python title="FILE"  is written to FILE; later blocks can import it
    ```sh                   is run, one command after another
    ```text title="output"  must equal the stdout of the block above; "..." matches any text
    ```text                 is neither run nor compared

A comment on the line above a fence skips the block: `<!-- not run: REASON -->` always skips it, and
`<!-- needs: PACKAGE, PACKAGE -->` skips it if one of the packages is not installed. A block in any other language is an error.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from types import ModuleType

CODE, OTHER = ("python", "sh"), ("text",)
FENCE = re.compile(r"(?P<indent> *)(?P<ticks>`{3,})(?P<language>[\w+-]*)(?P<attributes>.*)")
TITLE = re.compile(r'\btitle="([^"]+)"')
SKIPPED = re.compile(r"<!-- *(not run|needs): *(.+?) *-->")


@dataclass(frozen=True)
class Block:
    """A fenced block in a page."""

    line: int  # the line number of the opening fence, starting at 1
    language: str
    title: str | None  # the file to write, or "output"
    text: str
    skipped: str | None  # the reason why the block is not run, or None if it is run

    @property
    def runs(self) -> bool:
        return self.language in CODE and self.skipped is None

    @property
    def is_output(self) -> bool:
        return self.language == "text" and self.title == "output"

    @property
    def commands(self) -> Iterator[tuple[int, str]]:
        """Yield the commands of a shell block, each with its line number."""
        command, at = "", 0
        for number, line in enumerate(self.text.splitlines(), self.line + 1):
            command, at = command + line + "\n", at if command else number
            if not line.endswith("\\"):
                if command.strip():
                    yield at, command
                command = ""
        if command:
            yield at, command


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
        above = SKIPPED.fullmatch(lines[first - 1].strip()) if first else None
        skipped = _why_skipped(*above.groups()) if above else None
        blocks.append(Block(first + 1, opening["language"], title and title[1], dedent("\n".join(text)) + "\n", skipped))
    return blocks


def _why_skipped(kind: str, what: str) -> str | None:
    if kind == "not run":
        return what
    missing = [package for package in re.split(r",\s*", what) if not find_spec(package)]
    return f"needs {' and '.join(missing)}, not installed" if missing else None


def run(page: Path) -> int:
    # The namespace is a module, because some tools look up names in the module that defines a class or a function.
    module = ModuleType("snippet")
    sys.modules[module.__name__] = module
    printed = None  # stdout of the latest code block, or None if that block was skipped
    for block in parse(page):
        if block.language not in CODE + OTHER:
            known = ", ".join(CODE + OTHER)
            return _failed(page, block.line, f"expected a block of {known}, got {block.language or 'no language'}")
        if block.is_output and printed is not None and not matches(block.text, printed):
            return _failed(page, block.line, f"expected the output\n{block.text}got\n{printed}")
        if block.language in CODE:
            printed = None
        if not block.runs:
            continue
        if block.language == "sh":
            printed = ""
            for line, command in block.commands:
                done = subprocess.run(["sh", "-ec", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
                printed += done.stdout
                print(done.stdout, end="", flush=True)
                if done.returncode:
                    return _failed(page, line, f"{command.strip()} ended with status {done.returncode}")
        elif block.title:
            file = Path(block.title)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
        else:
            try:
                with redirect_stdout(io.StringIO()) as stdout:
                    # With the leading blank lines, tracebacks and `inspect` report the line numbers of the page.
                    code = compile("\n" * block.line + block.text, str(page), "exec", dont_inherit=True)
                    exec(code, vars(module))
            except BaseException as error:
                print(stdout.getvalue(), end="", flush=True)
                traceback.print_exception(type(error), error, error.__traceback__.tb_next)
                return _failed(page, _line(error, page) or block.line, f"{type(error).__name__}: {error}")
            printed = stdout.getvalue()
            print(printed, end="", flush=True)
    return 0


def matches(expected: str, printed: str) -> bool:
    """Return whether the texts are equal. "..." in `expected` matches any text.

    Whitespace at the ends of lines, and before and after each text, is ignored.
    """
    expected, printed = ("\n".join(line.rstrip() for line in text.strip().splitlines()) for text in (expected, printed))
    return re.fullmatch(".*".join(map(re.escape, expected.split("..."))), printed, re.DOTALL) is not None


def _line(error: BaseException, page: Path) -> int | None:
    """Return the number of the line in `page` that raised `error`, or None if the traceback contains no line of the page."""
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
        import conftest  # noqa: F401  sets up torch as in the tests: the device, the interpreter and torchvision's operators
    here = Path(__file__).resolve().parent
    sys.path = [each for each in sys.path if Path(each).resolve() != here]  # so that a page cannot import the tests
    sys.exit(run(page))
