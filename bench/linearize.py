"""Convert a trained transformer to several attention methods, and compare the accuracies. `make linearize` runs this script.

The teacher is a model trained by `vix train` on a labeled dataset. The script converts the teacher to every method with every
number of features or landmarks, with and without exact softmax attention for the class token, and with every seed. Conversions
to Nystrom attention use only the first seed. The script evaluates each converted model once on all held-out images. Each row of
linearize.csv contains the agreement with the teacher, the accuracy, the mean Kullback-Leibler divergence, and the conversion
time in seconds. The first row is the teacher. The script writes the file after every conversion, and continues an interrupted
run. At the end, it draws linearize.png, with the times measured by bench/linearize_time.py if their CSV file is in the same
folder.
"""

from __future__ import annotations

import csv
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.linearize_time import FILE as TIMES
from vix_kernels.commands import Parser, figure, write_atomically, write_csv
from vix_kernels.linearize import linearize
from vix_kernels.measure.machine import commit, device_name
from vix_kernels.training.data import Dataset, open_dataset
from vix_kernels.training.trained import Trained, load_trained

FILE = "linearize.csv"
SEEDS = (0, 1, 2)
BATCH, IMAGES = 16, 512
# Name, op, options, numbers of features or landmarks, and whether all weights are then trained to match the teacher
METHODS: tuple[tuple[str, str, dict[str, Any], tuple[int, ...], bool], ...] = (
    ("random features", "performer", {}, (16, 32, 64, 128), False),
    ("learned features", "feature", {}, (16, 32, 64, 128), False),
    ("Nystrom, grid", "nystrom", {"landmarks": "grid"}, (16, 36, 64), False),
    ("Nystrom, segments", "nystrom", {"landmarks": "segment"}, (16, 32, 64), False),
    ("features and distillation", "feature", {}, (16, 32), True),
)
TEACHER = "softmax (the teacher)"
SHOWN = 6  # the largest loss of accuracy that the figure shows, in percentage points


def main(argv: list[str] | None = None) -> None:
    parser = Parser.of("bench.linearize", __doc__)
    parser.add_argument("--teacher", required=True, help="folder of a run of vix train with softmax attention")
    parser.add_argument("--dataset", help="default: the dataset of the run")
    parser.add_argument("--output", type=Path, required=True, help=f"folder for {FILE} and linearize.png")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps", type=int, default=400, help="steps of the conversion and of distillation")
    parser.add_argument("--counts", type=int, nargs="+", help="only these numbers of features and landmarks")
    parser.add_argument("--methods", nargs="+", help="only methods whose names contain one of these texts")
    options = parser.parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / FILE
    rows: list[dict[str, Any]] = list(csv.DictReader(path.open())) if path.is_file() else []
    done = {(row["method"], row["slots"], row["exact"], row["seed"]) for row in rows}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_trained(options.teacher, device)
    dataset = open_dataset(options.dataset or teacher.config.dataset, teacher.config.img_size).load().to(device)
    expected = logits(teacher.model, dataset, teacher)
    has_prefix = teacher.model.num_prefix_tokens > 0
    tokens = math.prod(teacher.model.grid) + teacher.model.num_prefix_tokens
    if rows and rows[0]["tokens"] != str(tokens):
        parser.error(f"--output: expected rows of a teacher with {tokens} tokens, got {rows[0]['tokens']} in {path}")
    print(f"teacher: {tokens} tokens, {accuracy(expected, dataset):.2f} % of {len(dataset.test):,} images", flush=True)

    def add(method: str, slots: int, exact: bool, seed: int, scores: Tensor, more: dict[str, Any]) -> None:
        row = dict(method=method, slots=slots, exact=exact, seed=seed) | compare(scores, expected, dataset) | more
        where = dict(tokens=tokens, images=len(dataset.test), device=device_name(device.type), commit=commit())
        rows.append(row | where)
        print(", ".join(f"{name} {figure(value)}" for name, value in rows[-1].items()), flush=True)
        write_csv(path, rows)

    if (TEACHER, "0", "True", "0") not in done:
        add(TEACHER, 0, True, 0, expected, {})
    for method, op, settings, slots, distilled in jobs(options.methods, options.counts):
        for exact in (False, True) if has_prefix else (False,):
            for seed in options.seeds if op != "nystrom" else options.seeds[:1]:
                if (method, str(slots), str(exact), str(seed)) not in done:
                    steps = options.steps, options.steps if distilled else 0
                    row = convert(options.teacher, dataset, op, settings, slots, exact, seed, steps, device)
                    add(method, slots, exact, seed, row.pop("logits"), row)
    draw(options.output, rows)


def jobs(methods: list[str] | None, counts: list[int] | None) -> list[tuple[str, str, dict[str, Any], int, bool]]:
    """Return the chosen conversions as tuples (method, op, settings, slots, distilled).

    Conversions without distillation come first. Within each group, they are sorted by the number of features or landmarks.
    """
    found = [
        (method, op, settings, slots, distilled)
        for method, op, settings, known, distilled in METHODS
        for slots in known
        if (not methods or any(text in method for text in methods)) and (not counts or slots in counts)
    ]
    return sorted(found, key=lambda job: (job[4], job[3]))


def convert(
    run: str, dataset: Dataset, op: str, settings: dict[str, Any], slots: int, exact: bool, seed: int,
    steps: tuple[int, int], device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    trained = load_trained(run, device)
    name = "num_landmarks" if op == "nystrom" else "num_features"
    more = {} if op == "nystrom" else {"seed": seed}
    start = time.perf_counter()
    report = linearize(
        trained.model, lambda: batches(dataset, trained, seed), op=op, steps=steps[0], finetune_steps=steps[1],
        eval_samples=64, exact_prefix=exact, progress=False, **settings, **more, **{name: slots},
    )  # fmt: skip
    seconds = time.perf_counter() - start
    errors = [each.after for each in report.layers.values()]
    return {
        "logits": logits(trained.model, dataset, trained),
        "seconds": seconds,
        "error": statistics.mean(errors),
        "steps": report.steps,
    }


def batches(dataset: Dataset, trained: Trained, seed: int) -> Iterator[Tensor]:
    """Yield training images in batches. Each seed selects different images."""
    order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(seed))[:IMAGES]
    for pixels, _ in dataset.train.batches(list(order.split(BATCH))):
        yield trained.inputs(pixels.float() / dataset.max_value)


@torch.inference_mode()
def logits(model: nn.Module, dataset: Dataset, trained: Trained) -> Tensor:
    order = list(torch.arange(len(dataset.test)).split(100))
    return torch.cat([model(trained.inputs(x.float() / dataset.max_value)).float() for x, _ in dataset.test.batches(order)])


def accuracy(scores: Tensor, dataset: Dataset) -> float:
    return 100 * (scores.argmax(1) == dataset.test.labels).double().mean().item()


def compare(scores: Tensor, expected: Tensor, dataset: Dataset) -> dict[str, float]:
    agreement = 100 * (scores.argmax(1) == expected.argmax(1)).double().mean().item()
    divergence = F.kl_div(scores.log_softmax(1), expected.log_softmax(1), log_target=True, reduction="batchmean").item()
    return {"agreement": agreement, "accuracy": accuracy(scores, dataset), "kl": divergence}


def draw(output: Path, rows: list[dict[str, Any]]) -> None:
    """Plot disagreement and accuracy (means over seeds) against the number of features or landmarks.

    If TIMES exists in the output folder, also plot the times.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator

    times = list(csv.DictReader((output / TIMES).open())) if (output / TIMES).is_file() else []
    colors = {method: f"C{i}" for i, (method, *_) in enumerate(METHODS)}
    figure = Figure(figsize=(15 if times else 10, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    disagreement, accuracy, *rest = figure.subplots(1, 3 if times else 2)
    for method, color in colors.items():
        for exact, style in (("True", "-"), ("False", ":")):
            chosen = [row for row in rows if row["method"] == method and str(row["exact"]) == exact]
            counts = sorted({int(row["slots"]) for row in chosen})
            means = [
                [statistics.mean(float(row[name]) for row in chosen if int(row["slots"]) == count) for count in counts]
                for name in ("agreement", "accuracy")
            ]
            options = dict(marker="o", markersize=4, color=color, markerfacecolor=color if exact == "True" else "white")
            least = 50 / int(rows[0]["images"])  # half an image, because a logarithmic axis has no 0
            disagreement.plot(counts, [max(100 - value, least) for value in means[0]], style, **options)
            accuracy.plot(counts, means[1], style, **options)
    teacher = next(row for row in rows if row["method"] == TEACHER)
    accuracy.axhline(float(teacher["accuracy"]), color="black", linewidth=1)
    disagreement.set(yscale="log", ylabel="images classified differently from the teacher (%)")
    accuracy.set(ylabel="accuracy (%)")
    least = float(teacher["accuracy"]) - SHOWN
    if any(float(row["accuracy"]) < least for row in rows):
        accuracy.set_ylim(bottom=least)
        accuracy.set_title(f"below {least:.0f} % not shown", loc="left", fontsize=9)
    for axes in (disagreement, accuracy):
        axes.set(xscale="log", xlabel=f"features or landmarks ({teacher['tokens']} tokens)")
        ticks = sorted({int(row["slots"]) for row in rows if int(row["slots"])})
        axes.set_xticks(ticks, [str(count) for count in ticks])
    for axes in rest:
        draw_times(axes, times, colors)
    for axes in (disagreement, accuracy, *rest):
        if axes is not accuracy:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    drawn = {row["method"] for row in rows}
    lines = [Line2D([], [], color=color, label=method) for method, color in colors.items() if method in drawn]
    lines += [Line2D([], [], color="black", label="softmax (the teacher)")]
    lines += [
        Line2D([], [], color="0.5", marker="o", markersize=4, label="exact class token"),
        Line2D([], [], color="0.5", linestyle=":", marker="o", markersize=4, markerfacecolor="white", label="not exact"),
    ]
    figure.legend(handles=lines, frameon=False, loc="outside lower center", ncols=4 if times else 3)
    write_atomically(output / "linearize.png", lambda temporary: figure.savefig(temporary, format="png", dpi=130))


def draw_times(axes: Any, times: list[dict[str, Any]], colors: dict[str, str]) -> None:
    """Plot the time per image against the number of tokens."""
    for method, slots in dict.fromkeys((row["method"], row["slots"]) for row in times):
        chosen = [row for row in times if (row["method"], row["slots"]) == (method, slots)]
        tokens, values = ([float(row[name]) for row in chosen] for name in ("tokens", "ms"))
        color = colors.get(method, "black" if method == "softmax" else "0.7")
        axes.plot(tokens, values, marker="o", markersize=4, color=color, linewidth=0.8 if slots == "16" else 1.8)
        if slots == "0":
            at, above = len(tokens) // 2, method == "softmax"
            offset = dict(xytext=(-6, 6) if above else (6, -12), textcoords="offset points", ha="right" if above else "left")
            axes.annotate(method, (tokens[at], values[at]), color=color, **offset)
    axes.set_title("thick lines: 64 features or landmarks; thin lines: 16", loc="left", fontsize=9)
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="milliseconds per image, one CPU thread")
    ticks = sorted({int(row["tokens"]) for row in times})
    axes.set_xticks(ticks, [f"{count:,}" for count in ticks])


if __name__ == "__main__":
    main()
