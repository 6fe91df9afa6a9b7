"""Test that the code blocks in the README and in docs/ run, and that their output matches the pages."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest
import snippets

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
SECONDS = 300  # time limit for each page
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def imports_timm(page: Path) -> bool:
    return any("import timm" in block.text for block in snippets.parse(page))


def make_photos(folder: Path) -> None:
    """Crop the two photographs that are included in scikit-learn, and write the crops to photos/train and photos/val."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    for name, photo in zip(("temple", "flower"), load_sample_images().images, strict=True):
        for split, columns in (("train", range(0, 360, 24)), ("val", range(448, 570, 40))):
            (folder / "photos" / split / name).mkdir(parents=True)
            for x in columns:
                for y in range(0, 360, 40):
                    crop = Image.fromarray(photo[y : y + 64, x : x + 64])
                    crop.save(folder / "photos" / split / name / f"{x}_{y}.jpg")


def run(page: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the code blocks of a page in a separate process, with `folder` as the working directory.

    PATH includes the scripts folder of this Python environment. If the page does not import timm, any import of timm fails.
    """
    commands = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    environment = os.environ | {"PATH": commands, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    if page == README and find_spec("sklearn") and find_spec("PIL"):
        make_photos(folder)
    if not imports_timm(page):
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
        pytest.skip("no code block of this page is run")


SKIPPED = {f"{name(page)}:{block.line}": block.skipped for page in PAGES for block in snippets.parse(page) if block.skipped}


def test_no_address_is_a_placeholder() -> None:
    """Test that no page contains a placeholder URL. This repository has no public URL yet."""
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        found = re.search(
            r"REPOSITORY|<owner>|your-org|example\.com|git clone (?!https://)|git\+(?!https://)", page.read_text()
        )
        assert not found, f"{page.name}: {found[0]}"


def test_the_readme_is_short_and_begins_with_the_status() -> None:
    text = README.read_text(encoding="utf-8")
    assert "Not yet run on a GPU" in text.partition("\n## ")[0]
    assert len(text.splitlines()) <= 150


@pytest.mark.parametrize("where", SKIPPED)
def test_skipped_block(where: str) -> None:
    """Skip a test for each skipped block, so that `pytest -rs` lists the blocks that are not run and the reasons."""
    pytest.skip(f"{where}: {SKIPPED[where]}")


def write_page(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


def test_blocks_share_names_and_files(tmp_path: Path) -> None:
    page = write_page(
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
    assert [block.skipped for block in snippets.parse(page) if block.skipped] == [
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
        ('```python\nprint(12)\n```\n\n```text title="output"\n13\n```', 7, "expected the output\n13\ngot\n12"),
    ],
)
def test_broken_snippets_fail(block: str, line: int, says: str, tmp_path: Path) -> None:
    done = run(write_page(tmp_path, f"Text.\n\n{block}\n"), tmp_path)
    assert done.returncode == 1
    assert f"page.md:{line}: " in done.stdout and says in done.stdout, done.stdout


def test_outputs_are_compared(tmp_path: Path) -> None:
    page = write_page(
        tmp_path,
        """
```python
print("a \\nb")
```

```text title="output"
a
b
```

```sh
echo one 1.25
echo two
```

```text title="output"
one ...
two
```

<!-- needs: no_such_package_anywhere -->
```python
print("skipped")
```

```text title="output"
not compared
```
""",
    )
    done = run(page, tmp_path)
    assert (done.returncode, done.stdout) == (0, "a \nb\none 1.25\ntwo\n")
    assert snippets.matches("a ... d\n", "a b\nc d") and not snippets.matches("a ... d\n", "a b\nc d e")
