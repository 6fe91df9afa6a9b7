"""The documentation site: it builds without a warning, fetches nothing from elsewhere, and its tables are the measured ones."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"mkdocs": "mkdocs", "material": "mkdocs-material", "mkdocstrings_handlers": "mkdocstrings[python]"}
CHOOSING = ROOT / "docs" / "choosing.md"


class Fetched(HTMLParser):
    """What a browser fetches for a page, beyond the page; a link that is clicked is not."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("src", "srcset", "data", "poster") or (name == "href" and tag in ("link", "image", "use")):
                self.addresses.append(value or "")
            elif name == "style":
                self.addresses += imported(value or "")
            # The theme draws these by a script that it fetches from another host.
            elif name == "class" and "mermaid" in (value or "").split():
                self.addresses.append("https://unpkg.com")


def imported(style: str) -> list[str]:
    """The addresses in a style sheet."""
    return re.findall(r"""(?:url\(|@import(?!\s*url))\s*['"]?([^'")\s]+)""", style)


def fetched(site: Path) -> Iterator[tuple[str, str]]:
    for file in site.rglob("*"):
        if file.suffix in (".html", ".css"):
            text = file.read_text(encoding="utf-8")
            for address in Fetched(text).addresses if file.suffix == ".html" else imported(text):
                yield str(file.relative_to(site)), address


def test_site(tmp_path: Path) -> None:
    for module, package in PACKAGES.items():
        if not find_spec(module):
            pytest.skip(f"{package} is not installed")
    site = tmp_path / "site"
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", site]
    done = subprocess.run(build, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout

    addresses = list(fetched(site))
    assert any(address.endswith(".css") for _, address in addresses)
    foreign = [each for each in addresses if re.match(r"(\w+:)?//", each[1])]
    assert not foreign

    # What stands in docstrings is on the pages.
    page = (site / "ops" / "attention" / "index.html").read_text(encoding="utf-8")
    assert 'id="vix_kernels.performer_attention"' in page and "phi_j(x) = exp(c w_j . x" in page


def test_what_fetches_from_elsewhere_is_found() -> None:
    page = """<link href="https://a.org/x.css"><script src="//b.org/x.js"></script><div style="background: url(http://c.org)">
    <pre class="mermaid">x</pre><a href="https://d.org">clicked</a><img src="e.png">"""
    assert Fetched(page).addresses == ["https://a.org/x.css", "//b.org/x.js", "http://c.org", "https://unpkg.com", "e.png"]
    assert imported("@import 'a'; @import url(b); c { d: url( \"e.png\" ) }") == ["a", "b", "e.png"]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def two_digits(x: float) -> str:
    digits = next((digits for digits, least in enumerate((9.95, 0.995, 0.0995)) if x >= least), 3)
    return f"{x:.{digits}f}"


def test_two_digits() -> None:
    assert [two_digits(x) for x in (132.4, 34.1, 9.96, 2.73, 0.996, 0.87, 0.0996, 0.0123)] == [
        "132", "34", "10", "2.7", "1.0", "0.87", "0.10", "0.012",
    ]  # fmt: skip


def test_quality_table() -> None:
    """Every row of docs/choosing.md is of docs/quality.csv."""
    table = CHOOSING.read_text(encoding="utf-8")
    figures = {(row["tokens"], row["method"], row["slots"]): row for row in rows(ROOT / "docs" / "quality.csv")}
    for method in ("mean of v", "Nystrom, grid", "Nystrom, segments", "agents, grid", "Performer"):
        for slots in ("0",) if method == "mean of v" else ("64", "256"):
            cells = [method, slots if slots != "0" else ""]
            for tokens in ("trained tokens", "smooth field", "rough field"):
                row = figures[tokens, method, slots]
                median, low, high = (two_digits(100 * float(row[name])) for name in ("median", "low", "high"))
                cells.append(f"{median} % ({low} % to {high} %)")
            assert f"| {' | '.join(cells)} |".replace("|  |", "| |") in table


def test_table_of_lengths() -> None:
    """Every ratio of docs/choosing.md, and where ours becomes the faster one, follow from the committed sweep."""
    text = CHOOSING.read_text(encoding="utf-8")
    (path,) = (ROOT / "bench" / "results" / "epyc-1-thread").glob("*-78d4b70/tokens.csv")
    sweep = rows(path)
    ms = {(row["op"], row["direction"], row["provider"], int(row["tokens"])): float(row["device_ms"]) for row in sweep}
    lengths = sorted({int(row["tokens"]) for row in sweep})
    for op in ("linear_attention", "nystrom_attention", "performer_attention", "linformer_attention", "agent_attention"):
        ratios = {
            direction: [ms[op, direction, "torch", tokens] / ms[op, direction, "sdpa", tokens] for tokens in lengths]
            for direction in ("forward", "full")
        }
        first = (next(f"{tokens:,}" for at, tokens in enumerate(lengths) if max(each[at:]) < 1) for each in ratios.values())
        cells = [f"`{op}`", " / ".join(first)]
        cells += [" / ".join(map(two_digits, pair)) for pair in zip(*ratios.values(), strict=True)]
        assert f"| {' | '.join(cells)} |" in text
