"""Write the settings, summary, plots and TensorBoard files of a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..commands import write_atomically, write_csv
from .config import Config

if TYPE_CHECKING:
    from .data import Dataset
    from .trained import Evaluation, Trained

PLAIN = {"parse_math": False}  # otherwise, a $ in a name would start a formula


def best_epoch(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of `history` with the highest top-1 accuracy. Ties go to the lowest loss, then to the earliest epoch."""
    return max(history, key=lambda row: (row["eval_top1"], -row["eval_loss"]))


def skipped(unreadable: Sequence[str]) -> str:
    """Return a message with the number of files that cannot be decoded, and a list of at most 20 of these files."""
    more = [f"and {len(unreadable) - 20} more"] if len(unreadable) > 20 else []
    return "\n  ".join([f"skipped, because they cannot be decoded: {len(unreadable)}", *unreadable[:20], *more])


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of the tensors on a GPU, or of the process on a CPU, in bytes. Return 0 if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Board:
    """Writes TensorBoard files with one point per epoch."""

    TAGS = {
        "train_loss": "loss/training", "eval_loss": "loss/held out", "eval_top1": "accuracy/top-1",
        "eval_top5": "accuracy/top-5", "lr": "learning rate", "images_per_second": "images per second",
        "peak_memory_mb": "peak memory (MiB)",
    }  # fmt: skip

    def __init__(self, folder: Path, epochs: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=epochs + 1)

    def add(self, row: dict[str, Any]) -> None:
        for name, tag in self.TAGS.items():
            self.writer.add_scalar(tag, row[name], row["epoch"])

    def close(self) -> None:
        self.writer.close()


def write_args(path: Path, config: Config) -> None:
    write_atomically(path, lambda temporary: temporary.write_text(yaml.safe_dump(asdict(config), sort_keys=False)))


def write_summary(path: Path, history: list[dict[str, Any]]) -> None:
    """Write `history` to a CSV file with one row per epoch."""
    write_csv(path, history)


def draw_learning_curve(path: Path, history: list[dict[str, Any]], best: dict[str, Any], title: str) -> None:
    figure = _titled(title, 10, 4, layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]

    marker = "o" if len(history) == 1 else ""  # a single point needs a marker to be visible
    loss.plot(epochs, [row["train_loss"] for row in history], marker, color="tab:gray", label="training (augmented, smoothed)")
    loss.plot(epochs, [row["eval_loss"] for row in history], marker, color="tab:blue", label="held out")
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


def draw_evaluation(folder: Path, trained: Trained, evaluation: Evaluation, dataset: Dataset) -> None:
    """Save two plots to `folder`: the confusion matrix (confusion.png) and the misclassified images (mistakes.png)."""
    title = f"{trained.config.model} on {dataset.name}, top-1 {evaluation.top1:.2f} %"
    draw_confusion(folder / "confusion.png", evaluation.confusion, dataset.classes, title)
    draw_mistakes(folder / "mistakes.png", evaluation, dataset.classes, dataset.max_value, title)


def draw_confusion(path: Path, confusion: Tensor, classes: Sequence[str], title: str) -> None:
    """Save a plot of the confusion matrix. Rows are true classes, and columns are predicted classes.

    Colors show percentages of the images of each true class.
    """
    few = len(classes) <= 20
    side = max(5.0, 0.4 * len(classes) + 2.5) if few else 9.0
    figure = _titled(title, side, side, layout="constrained")
    axes = figure.subplots()
    percent = 100 * confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)
    drawn = axes.imshow(percent.numpy(), cmap="Blues", vmin=0, vmax=100)
    axes.set(xlabel="predicted class", ylabel="class")
    if few:
        axes.set_xticks(range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 2 else 0, **PLAIN)
        axes.set_yticks(range(len(classes)), classes, **PLAIN)
        for row in range(len(classes)):
            for column in range(len(classes)):
                if value := int(confusion[row, column]):
                    color = "white" if percent[row, column] > 60 else "black"
                    axes.text(column, row, str(value), ha="center", va="center", fontsize=7, color=color)
    else:
        figure.colorbar(drawn, label="percentage of the class", shrink=0.7)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def draw_mistakes(path: Path, evaluation: Evaluation, classes: Sequence[str], max_value: int, title: str) -> None:
    """Save a plot of the misclassified images of `evaluation` in descending order of predicted probability."""
    number = len(evaluation.mistakes)
    columns, rows = 6, max(1, -(-number // 6))
    width, height, top = 9.0, 1.9 * rows + 0.5, 0.5  # inches
    figure = _titled(title if number else f"{title}: no mistakes", width, height, y=1 - 0.15 / height)
    axes = figure.add_axes((0, 0, 1, 1))  # the same axes for all images, because creating axes takes 40 ms
    axes.axis("off")
    for index in range(number):
        row, column = divmod(index, columns)
        left, bottom = column * width / columns + 0.1, height - top - (row + 1) * 1.9 + 0.1
        _show(axes, evaluation.mistakes[index].float() / max_value, extent=(left, left + 1.3, bottom, bottom + 1.3))
        label, predicted = classes[evaluation.labels[index]], classes[evaluation.predicted[index]]
        text = f"{label}, predicted as\n{predicted} ({100 * evaluation.probability[index]:.0f} %)"
        axes.text(left + 0.65, bottom + 1.36, text, ha="center", fontsize=7.5, **PLAIN)
    axes.set(xlim=(0, width), ylim=(0, height), aspect="auto")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def draw_attention(path: Path, image: Tensor, weights: Tensor, title: str) -> None:
    """Save a plot of the image and a copy overlaid with `weights` (rows, columns), the class token's attention weights."""
    figure = _titled(title, 8, 4.2, layout="constrained")
    plain, over = figure.subplots(1, 2)
    height, width = image.shape[1:]
    for axes in (plain, over):
        _show(axes, image)
        axes.axis("off")
    weights = (weights - weights.min()) / (weights.max() - weights.min()).clamp(min=1e-12)
    over.imshow(
        weights.numpy(), cmap="inferno", alpha=0.65, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation="bilinear"
    )
    over.set_title("attention of the class token", fontsize=9)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))


def _titled(title: str, width: float, height: float, *, y: float | None = None, layout: str | None = None) -> Figure:
    """Return a figure with a title. `width` and `height` are in inches."""
    figure = Figure(figsize=(width, height), dpi=144, layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(title, y=y, va="top", fontsize=12, fontweight="bold", **PLAIN)
    return figure


def _show(axes: Axes, image: Tensor, extent: tuple[float, float, float, float] | None = None) -> None:
    """Draw a float image (channels, height, width) in [0, 1]."""
    if image.shape[0] == 3:
        axes.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), extent=extent)
    else:
        axes.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1, extent=extent)
