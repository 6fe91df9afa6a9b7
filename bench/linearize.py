"""Convert a trained softmax model with several attentions, and compare the accuracy: `make linearize`.

The teacher is a run of `vix train` on a data set with labels. For every attention and number of features, with and without
exact rows, and for every seed, the script converts the teacher on training images, and then evaluates it once on all held-out
images: agreement with the teacher, accuracy, mean Kullback-Leibler divergence, and the seconds of the conversion. It writes
linearize.csv after every conversion, continues an interrupted run, and draws linearize.png.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vix_kernels.commands import write_atomically, write_csv
from vix_kernels.linearize import linearize
from vix_kernels.training.data import Dataset, open_dataset
from vix_kernels.training.trained import Trained, load_trained

SEEDS = (0, 1, 2)
STEPS, BATCH, IMAGES = 400, 16, 512
# name, op, options, numbers of features or landmarks, steps of distillation
METHODS: tuple[tuple[str, str, dict[str, Any], tuple[int, ...], int], ...] = (
    ("random features", "performer", {}, (16, 32, 64, 128), 0),
    ("learned features", "feature", {}, (16, 32, 64, 128), 0),
    ("features and distillation", "feature", {}, (16, 32), 400),
    ("Nystrom, grid", "nystrom", {"landmarks": "grid"}, (16, 36), 0),
    ("Nystrom, segments", "nystrom", {"landmarks": "segment"}, (16, 32), 0),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="a run of vix train with softmax attention")
    parser.add_argument("--dataset", help="default: the data set of the run")
    parser.add_argument("--output", type=Path, required=True, help="folder for linearize.csv and linearize.png")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--counts", type=int, nargs="+", help="only these numbers of features and landmarks")
    parser.add_argument("--methods", nargs="+", help="only methods whose names contain one of these texts")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "linearize.csv"
    rows: list[dict[str, Any]] = list(csv.DictReader(path.open())) if path.is_file() else []
    done = {(row["method"], row["slots"], row["exact"], row["seed"]) for row in rows}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_trained(options.teacher, device)
    dataset = open_dataset(options.dataset or teacher.config.dataset).load().to(device)
    expected = logits(teacher.model, dataset, teacher)
    has_prefix = teacher.model.num_prefix_tokens > 0
    print(f"teacher: {accuracy(expected, dataset):.2f} % of {len(dataset.test):,} held-out images", flush=True)
    for method, op, settings, counts, finetune in METHODS:
        if options.methods and not any(text in method for text in options.methods):
            continue
        for slots in options.counts or counts:
            for exact in (False, True) if has_prefix else (False,):
                for seed in options.seeds if op != "nystrom" else options.seeds[:1]:
                    if (method, str(slots), str(exact), str(seed)) in done:
                        continue
                    row = convert(options.teacher, dataset, op, settings, slots, exact, seed, finetune, device)
                    found = compare(row.pop("logits"), expected, dataset)
                    rows.append(dict(method=method, slots=slots, exact=exact, seed=seed) | found | row)
                    print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
                    write_csv(path, rows)
    draw(options.output / "linearize.png", rows, accuracy(expected, dataset))


def convert(
    run: str, dataset: Dataset, op: str, settings: dict[str, Any], slots: int, exact: bool, seed: int, finetune: int,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    trained = load_trained(run, device)
    name = "num_landmarks" if op == "nystrom" else "num_features"
    more = {} if op == "nystrom" else {"seed": seed}
    start = time.perf_counter()
    report = linearize(
        trained.model, lambda: batches(dataset, trained, seed), op=op, steps=STEPS, finetune_steps=finetune, eval_samples=64,
        exact_prefix=exact, progress=False, **settings, **more, **{name: slots},
    )  # fmt: skip
    seconds = time.perf_counter() - start
    errors = [each.after for each in report.layers.values()]
    return {"logits": logits(trained.model, dataset, trained), "seconds": seconds, "error": statistics.mean(errors)}


def batches(dataset: Dataset, trained: Trained, seed: int) -> Iterator[Tensor]:
    """Yield training images in batches. Each seed selects different images."""
    order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(seed))[:IMAGES]
    for pixels, _ in dataset.train.batches(list(order.split(BATCH))):
        yield trained.inputs(pixels.float() / dataset.max_value)


@torch.inference_mode()
def logits(model: nn.Module, dataset: Dataset, trained: Trained) -> Tensor:
    order = list(torch.arange(len(dataset.test)).split(250))
    return torch.cat([model(trained.inputs(x.float() / dataset.max_value)).float() for x, _ in dataset.test.batches(order)])


def accuracy(scores: Tensor, dataset: Dataset) -> float:
    return 100 * (scores.argmax(1) == dataset.test.labels).double().mean().item()


def compare(scores: Tensor, expected: Tensor, dataset: Dataset) -> dict[str, float]:
    agreement = 100 * (scores.argmax(1) == expected.argmax(1)).double().mean().item()
    divergence = F.kl_div(scores.log_softmax(1), expected.log_softmax(1), log_target=True, reduction="batchmean").item()
    return {"agreement": agreement, "accuracy": accuracy(scores, dataset), "kl": divergence}


def draw(path: Path, rows: list[dict[str, Any]], teacher: float) -> None:
    """Draw accuracy and agreement against the number of slots, the mean over the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, 2), ("agreement", "accuracy"), strict=True):
        for color, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            for exact, style in (("True", "-"), ("False", ":")):
                chosen = [row for row in rows if row["method"] == method and str(row["exact"]) == exact]
                counts = sorted({int(row["slots"]) for row in chosen})
                means = [statistics.mean(float(row[name]) for row in chosen if int(row["slots"]) == count) for count in counts]
                if counts:
                    label = f"{method}{', exact class token' * (exact == 'True')}"
                    axes.plot(counts, means, style, marker="o", markersize=4, color=f"C{color}", label=label)
        if name == "accuracy":
            axes.axhline(teacher, color="black", linewidth=1, label="softmax (the teacher)")
            axes.legend(frameon=False, fontsize=8)
        axes.set_xscale("log", base=2)
        ticks = sorted({int(row["slots"]) for row in rows})
        axes.set_xticks(ticks, [str(count) for count in ticks])
        axes.set(xlabel="features or landmarks", ylabel=f"{name} (%)")
        axes.spines[["top", "right"]].set_visible(False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


if __name__ == "__main__":
    main()
