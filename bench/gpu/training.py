"""Train for a short time on each available dataset: digits, and the .npz files in the checkout's data/ folder."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from vix_kernels.measure.operators import Row, failed, ok, skipped

from .part import Job, Plan, by_job

ROOT = Path(__file__).resolve().parents[2]
PICTURES = Path("pictures")  # relative to the working folder, which part.py sets


@by_job
def rows(plan: Plan) -> Iterator[Job]:
    data = ["digits", *map(str, sorted(ROOT.glob("data/*.npz")))]
    return (Job(dict(dataset=Path(each).stem), partial(run, each, plan)) for each in data)


def run(dataset: str, plan: Plan) -> Iterator[Row]:
    try:
        from vix_kernels.training import Config, UserError
        from vix_kernels.training.recipes import RECIPES
        from vix_kernels.training.report import best_epoch
        from vix_kernels.training.run import train
    except ModuleNotFoundError as error:
        yield skipped(f"training needs {error.name}, which is not installed")
        return
    how = dict(amp=True) if dataset == "digits" else RECIPES["fast"] | dict(epochs=10, batch_size=512, dataset=dataset)
    if plan.dry:
        how |= dict(epochs=1, warmup_epochs=0, model_kwargs=dict(depth=1, embed_dim=16, num_heads=2, patch_size=4))
    with tempfile.TemporaryDirectory() as folder:
        config = Config(**how, output=f"{folder}/run")
        what = dict(model=config.model, epochs=config.epochs, batch=config.batch_size)
        start = time.perf_counter()
        try:
            history, output = train(config)
        except UserError as error:  # the files of a dataset, or a package that reads them, may be missing
            yield skipped(error, **what) if "dataset" in str(error) else failed(error, **what)
            return
        PICTURES.mkdir(exist_ok=True)
        shutil.copy(output / "learning_curve.png", PICTURES / f"training_{Path(dataset).stem}.png")
    best, last = best_epoch(history), history[-1]
    figures = {name: last[name] for name in ("images_per_second", "train_loss")}
    seconds = time.perf_counter() - start
    yield ok(**what, seconds=seconds, best_top1=best["eval_top1"], last_top1=last["eval_top1"], **figures)
