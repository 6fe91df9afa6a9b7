"""Test that the site builds and loads nothing from other hosts, that links resolve, and that tables match result files."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from statistics import mean

import pytest

import bench.break_even
from bench.linearize import METHODS
from vix_kernels.measure import break_even

ROOT = Path(__file__).parents[1]
PACKAGES = {"mkdocs": "mkdocs", "material": "mkdocs-material", "mkdocstrings_handlers": "mkdocstrings[python]"}
DOCS = ROOT / "docs"
CHOOSING = DOCS / "choosing.md"
BENCHMARKS = DOCS / "benchmarks.md"
RESULTS = ROOT / "bench" / "results"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


class Fetched(HTMLParser):
    """Collects the URLs that a browser loads to show a page. Links that a reader clicks are not included."""

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
            # The theme draws Mermaid diagrams with a script from a different host.
            elif name == "class" and "mermaid" in (value or "").split():
                self.addresses.append("https://unpkg.com")


def imported(style: str) -> list[str]:
    """Return the URLs that a style sheet loads."""
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

    # This page contains docstrings from the code.
    page = (site / "ops" / "attention" / "index.html").read_text(encoding="utf-8")
    assert 'id="vix_kernels.performer_attention"' in page and "phi_j(x) = exp(c w_j . x" in page


def test_addresses_on_other_hosts_are_found() -> None:
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
    """Test that the accuracy table in docs/choosing.md matches docs/quality.csv."""
    table = CHOOSING.read_text(encoding="utf-8")
    figures = {(row["tokens"], row["method"], row["slots"]): row for row in rows(DOCS / "quality.csv")}
    for method in ("mean of v", "Nystrom, grid", "Nystrom, segments", "agents, grid", "Performer"):
        for slots in ("0",) if method == "mean of v" else ("64", "256"):
            cells = [method, slots if slots != "0" else ""]
            for tokens in ("trained tokens", "smooth field", "rough field"):
                row = figures[tokens, method, slots]
                median, low, high = (two_digits(100 * float(row[name])) for name in ("median", "low", "high"))
                cells.append(f"{median} % ({low} % to {high} %)")
            assert f"| {' | '.join(cells)} |".replace("|  |", "| |") in table


def test_table_of_lengths() -> None:
    """Test that docs/choosing.md matches tokens.csv: the ratios, and the length from which each op is faster than SDPA."""
    text = CHOOSING.read_text(encoding="utf-8")
    (path,) = (RESULTS / "epyc-1-thread").glob("*-78d4b70/tokens.csv")
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


def test_break_even_lengths() -> None:
    """Test that the table of break-even lengths follows from the result files, and that docs/choosing.md shows it."""
    (folder,) = (RESULTS / "break-even").iterdir()
    tables = [bench.break_even.table(rows(folder / name)) for name in ("times.csv", "predicted.csv")]
    assert list(break_even.rows()) == sum(tables, [])
    found = {(row.kind, row.op, row.direction, row.width): row.rounded for row in break_even.rows()}
    names = {"nystrom": "nystrom_attention", "fourier": "fourier_mixing"}
    cells = []
    for op in dict.fromkeys(op for _, op, _, _ in found):
        measured = [[found["measured", op, way, width] for way in ("forward", "full")] for width in (32, 64)]
        predicted = [found["predicted", op, "forward", width] for width in (32, 64)]
        lengths = [" / ".join(pair) for pair in measured] + predicted
        cells.append([f"`{names.get(op, f'{op}_attention')}`", *lengths])
    assert sorted(table(CHOOSING, "Break-even lengths")) == sorted(cells)


def slug(heading: str) -> str:
    """Return the anchor that GitHub and mkdocs generate for a heading."""
    text = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text).strip().lower().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links(page: Path) -> None:
    """Test that every relative link leads to a file in the repository and, if it has an anchor, to a heading in that file."""
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file() and file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in map(slug, re.findall(r"(?m)^#+ (.*)", file.read_text(encoding="utf-8"))), target


def table(page: Path, heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without the header rows."""
    section = page.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("heading, name", [("Operators", "operators.md"), ("Models", "models.md")])
def test_tables_of_operators_and_models(heading: str, name: str) -> None:
    (path,) = (RESULTS / "epyc-1-thread").glob(f"*-78d4b70/{name}")
    measured = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert [f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in table(BENCHMARKS, heading)] == [
        line.replace("|  |", "| |") for line in measured
    ]


def conversions(path: Path, digits: dict[str, str]) -> list[list[str]]:
    """Return the expected cells of a table in linearize.md.

    Each pair of numbers contains the means over the seeds, without and with exact attention for the class token.
    """
    study, cells = rows(path), []
    for method in dict.fromkeys(name for name, *_ in METHODS):
        chosen = [row for row in study if row["method"] == method]
        for slots in sorted({int(row["slots"]) for row in chosen}):
            values = [
                " / ".join(
                    format(mean(float(x[name]) for x in chosen if (int(x["slots"]), x["exact"]) == (slots, exact)), kind)
                    for exact in ("False", "True")
                )
                for name, kind in digits.items()
            ]
            cells.append([method, str(slots), *values])
    return cells


def test_tables_of_conversions() -> None:
    (path,) = (RESULTS / "linearize").glob("*/linearize.csv")
    page, digits = DOCS / "linearize.md", {"agreement": ".1f", "accuracy": ".1f", "kl": ".2g"}
    assert table(page, "Results with 257 tokens") == conversions(path, digits)
    assert table(page, "Results with 65 tokens") == conversions(path.with_name("class-token.csv"), digits | {"seconds": ".0f"})
    times: dict[tuple[str, str], list[str]] = {}
    for row in rows(path.with_name("linearize-time.csv")):
        times.setdefault((row["method"], row["slots"]), []).append(f"{float(row['ratio']):.2f}")
    expected = [[method, slots.replace("0", ""), *ratios] for (method, slots), ratios in times.items() if method != "softmax"]
    assert table(page, "Time per image") == expected


def test_table_of_training() -> None:
    (path,) = (RESULTS / "epyc-1-thread").glob("*-3648800/training.csv")
    found = {(row["model"], row["provider"]): row for row in rows(path)}
    cells = []
    for model in dict.fromkeys(name for name, _ in found):
        library, baseline = found[model, "ours"], found[model, "original"]
        speed, top1 = ([float(row[column]) for row in (library, baseline)] for column in ("images_per_second", "top1"))
        cells.append([
            f"`{model}`", f"{speed[0]:.1f}", f"{speed[1]:.1f}", f"{speed[0] / speed[1]:.1f}",
            f"{top1[0]:.1f} %", f"{top1[1]:.1f} %", f"{top1[0] - top1[1]:.2f} points",
        ])  # fmt: skip
    assert table(BENCHMARKS, "Training") == cells


def test_table_of_integrations() -> None:
    (path,) = (RESULTS / "epyc-1-thread").glob("*-8152bd1/*.csv")
    cells = [
        [
            "{:.2f} ({:.2f} to {:.2f})".format(*(float(row[f"{direction}_{name}"]) for name in ("ratio", "low", "high")))
            for direction in ("forward", "full")
        ]
        for row in rows(path)
    ]
    assert [line[2:] for line in table(BENCHMARKS, "Integrations")] == cells


def test_table_of_traffic() -> None:
    (path,) = (RESULTS / "traffic").glob("*-eeef746/traffic.txt")
    measured = {}
    for run in path.read_text(encoding="utf-8").split("$ vix dev traffic")[1:]:
        tokens, unsplit = re.search(r"tokens (\d+), width", run)[1], "--unsplit" in run.splitlines()[0]
        for op, direction, ratio in re.findall(
            r"(?ms)^(\w+) (forward|backward)$.*?in (?:all|total), ([\d.]+) (?:of the least|times the minimum)", run
        ):
            measured[op, f"{int(tokens):,}", unsplit, direction] = ratio
    for name, tokens, *ratios in table(BENCHMARKS, "Memory traffic"):
        key = name.split("`")[1], tokens, "in one chunk" in name
        assert ratios == [measured[(*key, direction)] for direction in ("forward", "backward")]


def test_figures_of_the_readme() -> None:
    """Test that the ratios in the README equal the ratios in the linked tables."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    timm, nystromformer = (line[2].split()[0] for line in table(BENCHMARKS, "Integrations")[:2])
    assert f"[{timm} times as long](docs/benchmarks.md#integrations)" in text
    assert f"a layer takes [{nystromformer} times as long](docs/benchmarks.md#integrations)" in text
    nystrom = next(line for line in table(CHOOSING, "Speed") if line[0] == "`nystrom_attention`")
    fraction = float(nystrom[-1].split(" / ")[0])
    assert f"[{100 * fraction:.1f} % of the CPU time of softmax attention](docs/choosing.md#speed)" in text
    page = DOCS / "linearize.md"
    learned, nystrom = (
        next(cells[2].split(" / ")[1] for cells in table(page, "Results with 257 tokens") if cells[:2] == [method, "16"])
        for method in ("learned features", "Nystrom, grid")
    )
    assert f"as before for {learned} % of\n3,000" in text and f"for {nystrom} % with 16 Nystrom landmarks" in text
    ratios = sorted(cells[-1] for cells in table(page, "Time per image") if cells[1])
    assert f"[{ratios[0]} to {ratios[-1]} times as long](docs/linearize.md#time-per-image)" in text
    memory = re.findall(r"([\d.]+ to [\d.]+) times", text.split("their peak memory is")[1])
    section = BENCHMARKS.read_text(encoding="utf-8").replace("\n", " ")
    low, high = memory[1].split(" to ")
    assert f"need {memory[0]} times SDPA's peak memory" in section and f"the factor is {low} to" in section
    assert f"and {high} with Nystrom attention" in section
