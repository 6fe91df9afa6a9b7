"""Plot time and memory against the swept size.

There is one figure per operator and dtype, and one figure per dtype that compares all operators of this library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .operators import Row
from .providers import OURS

NAMES = {"forward": "forward", "full": "forward and backward", "backward": "backward"}
SDPA = dict(color="black", linestyle="--", marker="o")  # the baseline
LOOKS = {
    "triton": dict(color="C0", marker="o", linewidth=2.2),
    "torch": dict(color="C1", marker="o", linewidth=2.2),
    "reference": dict(color="C2", marker="."),
    "compiled": dict(color="C3", marker="."),
    "sdpa": SDPA,
}


def draw(folder: Path, rows: Iterable[Row], sweep: str, formats: Iterable[str] = ("png", "svg")) -> None:
    """Write a figure OP_DTYPE.EXTENSION for every operator and dtype to `folder`, with a line per provider.

    For every dtype, also write all_DTYPE.EXTENSION, with a line per operator and one for SDPA. This figure is skipped if it
    would have fewer than three lines. `sweep` is the name of the column on the horizontal axis, such as "tokens".
    """
    timed = [row for row in rows if row["status"] == "ok" and row.get("device_ms") is not None]
    figures = {}
    for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in timed):
        chosen = [row for row in timed if (row["op"], row["dtype"]) == (op, dtype)]
        providers = dict.fromkeys(row["provider"] for row in chosen)
        curves = {name: [row for row in chosen if row["provider"] == name] for name in providers}
        figures[f"{op}_{dtype}"] = _figure(f"{op}, {dtype}", curves, sweep, LOOKS)
    for dtype in dict.fromkeys(row["dtype"] for row in timed):
        ours = [row for row in timed if row["dtype"] == dtype and row["provider"] in OURS]
        ours = [row for row in ours if row["provider"] == ours[0]["provider"]]
        curves = {op: [row for row in ours if row["op"] == op] for op in dict.fromkeys(row["op"] for row in ours)}
        softmax = [row for row in timed if row["dtype"] == dtype and row["provider"] == "sdpa"]
        curves |= {"softmax (SDPA)": [row for row in softmax if row["op"] == softmax[0]["op"]]} if softmax else {}
        if len(curves) > 2:
            figures[f"all_{dtype}"] = _figure(dtype, curves, sweep, {"softmax (SDPA)": SDPA})
    for name, figure in figures.items():
        for extension in formats:
            figure.savefig(folder / f"{name}.{extension}", format=extension)


def _figure(title: str, curves: Mapping[str, list[Row]], sweep: str, looks: Mapping[str, dict[str, Any]]) -> Any:
    """Return a figure with a panel for the times of each measured direction (see NAMES), and a panel for memory.

    Axes are logarithmic. `curves` maps line names to rows.
    """
    from matplotlib.figure import Figure

    rows = [row for curve in curves.values() for row in curve]
    panels = [(each, "device_ms", f"{name}, ms") for each, name in NAMES.items() if any(r["direction"] == each for r in rows)]
    memory = [each for each in ("full", "forward") if any(row["direction"] == each and row.get("peak_mib") for row in rows)]
    panels += [(each, "peak_mib", f"memory of {NAMES[each]}, MiB") for each in memory[:1]]
    figure = Figure(figsize=(4.2 * len(panels), 4), dpi=120, layout="constrained")
    values = sorted({row[sweep] for row in rows})
    shown = {}
    for axes, (direction, quantity, heading) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, curve in curves.items():
            points = sorted((row[sweep], row[quantity]) for row in curve if row["direction"] == direction and row.get(quantity))
            if points:
                look = dict(marker=".", markersize=5) | looks.get(name, {})
                (shown[name],) = axes.plot(*zip(*points, strict=True), **look)
        axes.set(title=heading, xlabel=sweep, xscale="log", yscale="log")
        axes.set_xticks(values, [f"{value:,}" for value in values], rotation=45 if len(values) > 5 else 0)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.25)
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=min(5, len(shown)), frameon=False)
    same = [name for name in ("batch", "heads", "tokens", "width", "features") if len({row[name] for row in rows}) == 1]
    figure.suptitle(f"{title}, {', '.join(f'{name} {rows[0][name]}' for name in same)}\n{rows[0]['device']}", fontsize=10)
    return figure
