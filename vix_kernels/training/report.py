"""What a run leaves for its reader: args.yaml, summary.csv and learning_curve.png."""

from __future__ import annotations

import csv
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..commands import write_atomically
from .config import Config


def write_args(path: Path, config: Config) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(yaml.safe_dump(asdict(config), sort_keys=False)))


def write_summary(path: Path, history: list[dict[str, Any]]) -> None:
    """One row an epoch. Written from the history in the checkpoint, so that both always tell the same story."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="") as file:
            rows = csv.DictWriter(file, history[0])
            rows.writeheader()
            rows.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in history)

    write_atomically(path, write)


def draw_learning_curve(path: Path, history: list[dict[str, Any]], best: dict[str, Any], title: str) -> None:
    figure = Figure(figsize=(10, 4), dpi=144, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    loss, accuracy = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]

    loss.plot(epochs, [row["train_loss"] for row in history], color="tab:gray", label="training (augmented, smoothed)")
    loss.plot(epochs, [row["eval_loss"] for row in history], color="tab:blue", label="held out")
    loss.set(ylabel="cross-entropy", ylim=(0, None))
    loss.legend(frameon=False)

    accuracy.plot(epochs, [row["eval_top1"] for row in history], color="tab:blue")
    accuracy.plot(best["epoch"], best["eval_top1"], "o", color="tab:red")
    label = f"best {best['eval_top1']:.2f} %, epoch {best['epoch']}"
    accuracy.set(ylabel="held-out top-1 (%)", ylim=(None, 100.5))
    accuracy.annotate(label, (0.97, 0.05), xycoords="axes fraction", ha="right", color="tab:red")

    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
