"""Write the output files of a GPU run: a summary, all results as JSON, tables as CSV, and zip archives of plots and logs."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vix_kernels.commands import figure, markdown, write_atomically, write_csv
from vix_kernels.measure.operators import Row
from vix_kernels.measure.pictures import draw

KEPT = 2**20  # bytes kept at each end of a log


@dataclass(frozen=True)
class Outcome:
    """The result of one part of the GPU run, such as "timing".

    `why` is the reason for "failed" or "skipped". For "ok", it is the number of skipped rows, or "" if there are none.
    """

    part: str
    status: str  # "ok" | "failed" | "skipped"
    why: str
    seconds: float
    rows: list[Row]

    def count(self, status: str) -> int:
        return sum(row["status"] == status for row in self.rows)


def write(folder: Path, machine: Row, outcomes: list[Outcome], work: Path) -> str:
    """Write all output files except the pictures, and return the summary. If one file cannot be written, write the others."""
    problems: list[str] = []
    rows = {outcome.part: outcome.rows for outcome in outcomes}
    everything = dict(machine=machine, parts=[asdict(outcome) for outcome in outcomes])
    results = json.dumps(everything, indent=1, default=str) + "\n"
    attempt(problems, write_atomically, folder / "results.json", lambda path: path.write_text(results))
    checks = [dict(part=part, **row) for part in ("correctness", "suite", "sanitizer") for row in rows.get(part, [])]
    tables = dict(timing=[row for row in rows.get("timing", []) if "figure" not in row], models=rows.get("models", []))
    for name, lines in (tables | dict(correctness=checks, tune=rows.get("tune", []))).items():
        if lines:
            attempt(problems, write_csv, folder / f"{name}.csv", lines)
    attempt(problems, write_atomically, folder / "logs.zip", lambda path: archive(path, work / "logs"))
    try:
        text = summary(machine, outcomes, problems)
    except Exception as error:  # an unexpected row must not end the run
        text = f"the summary failed: {type(error).__name__}: {error}; see results.json\n"
    attempt(problems, write_atomically, folder / "summary.md", lambda path: path.write_text(text))
    return text


def write_pictures(folder: Path, outcomes: list[Outcome], work: Path) -> str:
    """Write pictures.zip. Return the reason if it could not be written, otherwise ""."""
    problems: list[str] = []

    def draw_and_archive(path: Path) -> None:
        pictures = work / "pictures"
        pictures.mkdir(exist_ok=True)
        draw_times(pictures, [row for outcome in outcomes if outcome.part == "timing" for row in outcome.rows])
        archive(path, pictures)

    attempt(problems, write_atomically, folder / "pictures.zip", draw_and_archive)
    return "".join(problems)


def attempt(problems: list[str], write: Callable[[Path, Any], None], path: Path, content: Any) -> None:
    try:
        write(path, content)
    except Exception as error:  # for example, the disk is full or a library is missing; the other files are still written
        problems.append(f"{path.name}: {type(error).__name__}: {error}")


def archive(path: Path, folder: Path) -> None:
    """Write the files in `folder` to the zip file `path`. Only the beginning and the end of a long text file are kept."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for each in sorted(folder.iterdir()):
            data = each.read_bytes()
            if len(data) > 2 * KEPT and each.suffix != ".png":
                data = data[:KEPT] + f"\n... {len(data) - 2 * KEPT} bytes ...\n".encode() + data[-KEPT:]
            file.writestr(each.name, data)


def draw_times(folder: Path, rows: list[Row]) -> None:
    """Plot time against the number of tokens, with one curve per provider.

    Rows with head width 32 are skipped. For each number of tokens, only the largest batch is shown.
    """
    timed = [row for row in rows if row.get("device_ms") is not None and row["width"] != 32]
    fullest = {tokens: max(row["batch"] for row in timed if row["tokens"] == tokens) for tokens in {r["tokens"] for r in timed}}
    draw(folder, [row for row in timed if row["batch"] == fullest[row["tokens"]]], "tokens", formats=("png",))


# The summary

TIMES = ("op", "dtype", "batch", "tokens", "width", "direction")


def summary(machine: Row, outcomes: list[Outcome], problems: list[str]) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in machine.items() if name not in ("gpu", "status", "why"))
    lines = [f"# {machine['gpu']}", "", facts, "", "## Parts", ""]
    lines += markdown(
        ["part", "status", "seconds", "ok", "failed", "skipped", "why"],
        [
            [o.part, o.status.upper() if o.status == "failed" else o.status, f"{o.seconds:.0f}",
             *(str(o.count(s)) for s in ("ok", "failed", "skipped")), o.why]
            for o in outcomes
        ],
    )  # fmt: skip
    lines += [f"- not written: {problem}" for problem in problems]
    rows = {outcome.part: outcome.rows for outcome in outcomes}
    lines += ["", "## Device time, ms", "", "Measured on random inputs with a cold L2 cache. `sdpa` is softmax attention.", ""]
    if any(o.part in ("compile", "correctness", "suite") and o.status == "failed" for o in outcomes):
        lines += ["**Some checks failed or did not run (see Failed): do not quote these times.**", ""]
    lines += times(rows.get("timing", []))
    lines += tuned(rows.get("tune", []))
    for part in ("timing", "models", "training", "correctness", "suite", "sanitizer"):
        chosen = [r for r in rows.get(part, []) if r["status"] == "ok" and (part != "timing" or "figure" in r)]
        if chosen:
            columns = [c for c in dict.fromkeys(name for row in chosen for name in row) if c not in ("status", "why")]
            heading = "Rates of this machine" if part == "timing" else part.capitalize()
            lines += ["", f"## {heading}", "", *markdown(columns, [[figure(row.get(c), 4) for c in columns] for row in chosen])]
    for status in ("failed", "skipped"):
        named = [
            f"- {outcome.part}: {label(row)}: {row['why']}"
            for outcome in outcomes
            for row in outcome.rows
            if row["status"] == status
        ]
        if named:
            lines += ["", f"## {status.capitalize()}", "", *named]
    return "\n".join(lines) + "\n"


def tuned(rows: list[Row]) -> list[str]:
    """Return a Markdown table with one row per launch-table key.

    The last column contains the best tile if it differs from the current one.
    """
    body = []
    for row in (row for row in rows if row["status"] == "ok"):
        tile = " ".join(f"{name}={value}" for name, value in row["best"].items()) if row["best"] != row["present"] else ""
        figures = (figure(row[name], 4) for name in ("present_ms", "best_ms", "tried"))
        body.append([f"{row['kernel']} {row['bits']} {row['width']}", *figures, tile])
    headings = ["kernel, bits, width", "current ms", "best ms", "tried", "best tile"]
    return ["", "## Tuning", "", *markdown(headings, body)] if body else []


def times(rows: Iterable[Row]) -> list[str]:
    """Return a Markdown table of device times in milliseconds.

    It has one row per operator, dtype, shape and direction, and one column per provider (see measure/providers.py).
    """
    timed = [row for row in rows if row.get("device_ms") is not None]
    providers = list(dict.fromkeys(row["provider"] for row in timed))
    found = {(*(row[name] for name in TIMES), row["provider"]): row for row in timed}
    shapes = dict.fromkeys(tuple(row[name] for name in TIMES) for row in timed)
    body = [
        [*map(str, shape), *(figure(found.get((*shape, provider), {}).get("device_ms"), 4) for provider in providers)]
        for shape in shapes
    ]
    return markdown([*TIMES, *providers], body) if body else ["none"]


def label(row: Row) -> str:
    return " ".join(str(v) for k, v in row.items() if k not in ("status", "why") and v not in ("", None)) or "all of it"
