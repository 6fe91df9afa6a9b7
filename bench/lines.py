"""Count lines of code: `python -m bench.lines [CHECKOUT ...]`.

Comments, docstrings, blank lines, tests/ and the launch table are not counted. The row "measuring" counts the code in
vix_kernels/measure/ and bench/. In older checkouts, it also counts vix_kernels/bench/ and the files in ONCE_MEASURING.
"""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

TABLES = ("vix_kernels/_triton/launch_table.py",)
ONCE_MEASURING = {  # the measurement code in checkouts from before measure/ existed; paths relative to vix_kernels/
    "timing.py", "traffic.py", "roofline.py", "check.py", "_triton/compile_report.py", "_triton/compile_table.py",
    "_triton/machine_code.py", "_triton/offline.py", "_triton/shared_memory.py", "_triton/costs.py", "_triton/tune.py",
    "_triton/interpreter.py",
}  # fmt: skip
NO_CODE = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"}


def lines(source: str) -> int:
    """Return the number of lines of `source` that contain code."""
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if tokenize.tok_name[token.type] not in NO_CODE:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
            code.difference_update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(code)


def count(checkout: Path) -> Counter[str]:
    """Return the number of lines of code in each folder, in the measurement code ("measuring"), and in all folders ("all")."""
    counts: Counter[str] = Counter()
    for top in ("vix_kernels", "models", "bench"):
        for path in sorted((checkout / top).rglob("*.py")):
            name = path.relative_to(checkout).as_posix()
            if name in TABLES:
                continue
            number = lines(path.read_text())
            below = path.relative_to(checkout / top)
            counts[f"{top}/{below.parts[0]}" if len(below.parts) > 1 else top] += number
            counts["all"] += number
            if top == "bench" or below.parts[0] in ("measure", "bench") or below.as_posix() in ONCE_MEASURING:
                counts["measuring"] += number
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.lines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkouts", nargs="*", type=Path, default=[Path(__file__).parents[1]], help="folders to count")
    counted = [count(each) for each in parser.parse_args().checkouts]
    for name in sorted(set().union(*counted), key=lambda name: (name in ("measuring", "all"), name)):
        print(name.ljust(28) + "".join(f"{each[name]:8,}" for each in counted))


if __name__ == "__main__":
    main()
