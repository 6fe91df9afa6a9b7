"""Time and memory against what was swept, one picture an operator and dtype."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .measure import Row
from .providers import OURS

NAMES = {"forward": "forward", "full": "forward and backward", "backward": "backward"}
LINES = {"triton": "C0", "torch": "C1", "reference": "C2", "compiled": "C3", "sdpa": "black"}  # peers take what is left


def draw(folder: Path, rows: Iterable[Row], sweep: str, formats: Iterable[str] = ("png", "svg")) -> list[Path]:
    """Pictures of the rows that have times; returns their paths."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [row for row in rows if row["status"] == "ok" and row.get("device_ms") is not None]
    written = []
    for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in timed):
        chosen = [row for row in timed if (row["op"], row["dtype"]) == (op, dtype)]
        directions = [each for each in NAMES if any(row["direction"] == each for row in chosen)]
        panels = [(f"{NAMES[each]}, ms", each, "device_ms") for each in directions]
        for direction in ("full", "forward"):
            if any(row["direction"] == direction and row.get("peak_mib") for row in chosen):
                panels.append((f"memory of {NAMES[direction]}, MiB", direction, "peak_mib"))
                break
        figure = Figure(figsize=(4.2 * len(panels), 3.9), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        providers = list(dict.fromkeys(row["provider"] for row in chosen))
        colours = dict(zip((p for p in providers if p not in LINES), ("C4", "C5", "C6", "C8"), strict=False)) | LINES
        for axes, (title, direction, figure_of) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for provider in providers:
                points = sorted(
                    (row[sweep], row[figure_of])
                    for row in chosen
                    if (row["provider"], row["direction"]) == (provider, direction) and row.get(figure_of)
                )
                if points:
                    style = "o-" if provider in OURS else "o--" if provider == "sdpa" else ".-"
                    look = dict(color=colours[provider], linewidth=2.2 if "o" in style else 1.2, markersize=4)
                    axes.plot(*zip(*points, strict=True), style, label=provider, **look)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            values = sorted({row[sweep] for row in chosen})
            axes.set_xticks(values, [f"{value:,}" for value in values], rotation=45 if len(values) > 5 else 0, minor=False)
            axes.minorticks_off()
            axes.set(title=title, xlabel=sweep)
            axes.grid(alpha=0.25)
        handles = {
            label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=len(handles), frameon=False)
        some = chosen[0]
        same = [name for name in ("batch", "heads", "tokens", "width", "features") if len({row[name] for row in chosen}) == 1]
        figure.suptitle(f"{op}, {dtype}, {', '.join(f'{name} {some[name]}' for name in same)}\n{some['device']}", fontsize=10)
        for extension in formats:
            written.append(folder / f"{op}_{dtype}.{extension}")
            figure.savefig(written[-1], format=extension)
    return written
