"""The snippets of the README and of the pages in docs/ run as they stand there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import snippets

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TIMM = ROOT / "docs" / "integrations.md"
SECONDS = 300  # of a page; they take some seconds each


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def run(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, in `folder`, with the commands of this environment; conftest.py chose GPU or interpreter.

    A page that does not show timm runs where timm cannot be imported.
    """
    commands = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    environment = os.environ | {"PATH": commands, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    if page != TIMM:
        (folder / "broken").mkdir()
        (folder / "broken" / "timm.py").write_text("raise ImportError('this page must not import timm')\n")
        paths = [str(folder / "broken"), os.environ.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return subprocess.run(
        [sys.executable, snippets.__file__, page], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=SECONDS,
    )  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_page_runs(page: Path, tmp_path: Path) -> None:
    blocks = [block for block in snippets.parse(page) if block.runs]
    if any(block.language == "sh" for block in blocks) and not shutil.which("vix", path=sysconfig.get_path("scripts")):
        pytest.skip("the package is not installed: there is no command vix")
    done = run(page, tmp_path)
    assert done.returncode == 0, f"{name(page)}\n{done.stdout}"
    if not blocks:
        pytest.skip("no snippet of this page is run")


LEFT_OUT = {f"{name(page)}:{block.line}": block.left_out for page in PAGES for block in snippets.parse(page) if block.left_out}


def test_no_address_is_a_placeholder() -> None:
    """There is no public address of this repository yet: pages tell how to install from a checkout."""
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        found = re.search(
            r"REPOSITORY|<owner>|your-org|example\.com|git clone (?!https://)|git\+(?!https://)", page.read_text()
        )
        assert not found, f"{page.name}: {found[0]}"


def test_the_first_paragraph_says_that_no_gpu_has_measured_this() -> None:
    assert "No GPU has measured this yet" in (ROOT / "README.md").read_text().split("\n\n")[1]


@pytest.mark.parametrize("where", LEFT_OUT)
def test_left_out(where: str) -> None:
    """One skip a block, so that `pytest -rs` lists what is not run, and why."""
    pytest.skip(f"{where}: {LEFT_OUT[where]}")


def written(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


def test_blocks_share_names_and_files(tmp_path: Path) -> None:
    page = written(
        tmp_path,
        """
```python title="tools/one.py"
def one():
    return 1
```

    ```python
    import sys
    sys.path.insert(0, "tools")
    from one import one
    ```

<!-- not run: it would fail -->
```python
1 / 0
```

<!-- needs: no_such_package_anywhere -->
```sh
false
```

<!-- needs: sys -->
```python
print(one() + 1, file=open("two.txt", "w"))
```

```sh
grep 2 two.txt   # a comment
test \\
    -f tools/one.py
```
""",
    )
    assert [block.left_out for block in snippets.parse(page) if block.left_out] == [
        "it would fail", "needs no_such_package_anywhere, not installed",
    ]  # fmt: skip
    done = run(page, tmp_path)
    assert (done.returncode, done.stdout) == (0, "2\n")


@pytest.mark.parametrize(
    "block, line, says",
    [
        ("```python\nx = 1\nx / 0\n```", 5, "ZeroDivisionError: division by zero"),
        ("```python\ndef f():\n    raise SystemExit(0)\n\nf()\n```", 5, "SystemExit: 0"),
        ("```python\nx = (\n```", 4, "SyntaxError"),
        ("```python\nassert 0\n```", 4, "AssertionError"),
        ("```sh\ntrue\nfalse | cat && test -f \\\n  nothing\n```", 5, "ended with status 1"),
        ("```py\nx = 1\n```", 3, "expected a block of python, sh, text, got py"),
        ("```\nx = 1\n```", 3, "got no language"),
    ],
)
def test_broken_snippets_fail(block: str, line: int, says: str, tmp_path: Path) -> None:
    done = run(written(tmp_path, f"Text.\n\n{block}\n"), tmp_path)
    assert done.returncode == 1
    assert f"page.md:{line}: " in done.stdout and says in done.stdout, done.stdout
