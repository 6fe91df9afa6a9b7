"""Compare the accuracy of this library's models and the original models after a few minutes of training on one CPU core.

    python -m bench.training cifar10_jpeg.npz --output DIR

The two models of a pair have the same architecture and about the same number of parameters. The original is the published
model in plain PyTorch. It is trained in float32 with the recipe of the original scripts, but with this library's training loop
and data loading. This library's model is trained in bfloat16 with `--recipe fast`. Both models are trained at the same time,
each on a separate core, so that other load on the machine affects both.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vix_kernels.commands import Parser, figure, print_table, write_csv
from vix_kernels.measure.machine import commit, device_name
from vix_kernels.measure.models import CCT, VIX
from vix_kernels.models import create_model
from vix_kernels.models.originals import build, drawn
from vix_kernels.training import Config
from vix_kernels.training.data import Dataset, HeldImages, load_dataset
from vix_kernels.training.draws import seed_torch
from vix_kernels.training.loop import evaluate, train_epoch
from vix_kernels.training.parallel import Ranks
from vix_kernels.training.recipes import RECIPES
from vix_kernels.training.state import State

HYBRID = VIX | dict(dim=64, depth=3, mlp_dim=128, heads=2, dim_head=32)
SMALL_CCT = CCT | dict(img_size=32, num_classes=10, embedding_dim=64, num_layers=2, num_heads=2)
OURS = dict(img_size=32, num_classes=10, embed_dim=64, num_heads=2)
# For each pair: the arguments of this library's model, and the label and arguments of the original. Each model has about 0.2
# million parameters.
PAIRS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "hybrid_vip": (OURS | dict(depth=3), "HybridViP", HYBRID),
    "hybrid_vin": (OURS | dict(depth=3), "HybridViN", HYBRID),
    "ccn": (OURS | dict(depth=2, mlp_ratio=4.0), "CCN", SMALL_CCT),
}
CORES = (0, 1)
TRIAL = 0.05  # length of the trial run, relative to the full run; the trial estimates how many images the full run can process
BATCH = 128


class TimeUp(Exception):
    pass


def make(name: str, provider: str) -> nn.Module:
    ours, label, original = PAIRS[name]
    if provider == "ours":
        return create_model(name, **ours)
    model = drawn(build(label, original, backend="reference"))
    # The training loop calls these methods, which the original models lack. no_weight_decay() returns an empty set, because the
    # original scripts apply weight decay to all parameters. The optimizer still exempts biases and norms.
    model.no_weight_decay, model.get_classifier = set, nn.Identity
    return model


def trained(name: str, provider: str, path: str, minutes: float, core: int) -> dict[str, Any]:
    """Train one model on one core for `minutes`, and return its row of the results table."""
    if hasattr(os, "sched_setaffinity") and core in os.sched_getaffinity(0):
        os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    dataset = load_dataset(path)
    seed_torch(0)
    config = Config(**RECIPES["fast" if provider == "ours" else "original"] | dict(model=name, batch_size=BATCH))
    trial, _ = run(config, make(name, provider), dataset, TRIAL * 60 * minutes)
    fitting = int(trial / TRIAL)  # images that the full run can process; the schedule needs the number of epochs in advance
    model, data = make(name, provider), dataset
    if provider == "ours":
        epochs = -(-fitting // len(dataset.train))
        config = replace(config, epochs=epochs, warmup_epochs=0.1 * epochs)
        data = replace(dataset, train=some_of(dataset.train, fitting // epochs))
    start = time.perf_counter()
    images, state = run(config, model, data, 60 * minutes)
    seconds = time.perf_counter() - start
    result = evaluate(state.tested, dataset, config)
    return dict(
        model=name, provider=provider, parameters=sum(p.numel() for p in model.parameters()), minutes=seconds / 60,
        images=images, images_per_second=images / seconds, top1=result["eval_top1"], top5=result["eval_top5"],
        eval_loss=result["eval_loss"], device=device_name("cpu"), commit=commit(),
    )  # fmt: skip


def some_of(images: HeldImages, count: int) -> HeldImages:
    """Return `count` random images. The first `count` images of a sorted dataset could all belong to one class."""
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    return HeldImages(images.images[drawn], images.labels[drawn])


def run(config: Config, model: nn.Module, dataset: Dataset, seconds: float) -> tuple[int, State]:
    """Train for `seconds` or until the schedule ends. Return the number of processed images and the final state."""
    state = State(config, model, torch.device("cpu"), Ranks())
    end, images, steps = time.perf_counter() + seconds, 0, -(-len(dataset.train) // config.batch_size)

    def count() -> None:
        nonlocal images
        images += len(dataset.train) // steps
        if time.perf_counter() > end:
            raise TimeUp

    try:
        while len(state.history) < config.epochs:
            state.history.append(train_epoch(state, dataset, count))
            state.start_epoch()
    except TimeUp:
        pass
    return images, state


def main(argv: list[str] | None = None) -> int:
    parser = Parser.of("python -m bench.training", __doc__)
    parser.add_argument("dataset", help="CIFAR-10: the path or name of the dataset, as in `vix train`")
    parser.add_argument("--models", nargs="+", choices=PAIRS, default=list(PAIRS), metavar="NAME", help="default: all")
    parser.add_argument("--minutes", type=float, default=8.0, metavar="M", help="minutes per run (default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for training.csv (default: only print)")
    options = parser.parse_args(argv)
    results: list[dict[str, Any]] = []
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for name in options.models:
            forms = zip(("ours", "original"), CORES, strict=True)
            runs = [pool.submit(trained, name, form, options.dataset, options.minutes, core) for form, core in forms]
            results += [each.result() for each in runs]
            print(f"{name}: {results[-2]['top1']:.2f} % and {results[-1]['top1']:.2f} %", file=sys.stderr)
    print_table(results[0], ([figure(value, 4) for value in row.values()] for row in results))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        write_csv(options.output / "training.csv", results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
