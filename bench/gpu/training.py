"""A short real training run on every data set at hand: those of `vix train`, and packs in data/ of the checkout."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from vix_kernels.measure.operators import Row, failed, ok, skipped

from .plan import Plan

ROOT = Path(__file__).resolve().parents[2]
PICTURES = Path("pictures")  # in the working folder of the part


def rows(plan: Plan) -> Iterator[Row]:
    try:
        from vix_kernels.training import Config, UserError
        from vix_kernels.training.recipes import RECIPES
        from vix_kernels.training.report import best_epoch
        from vix_kernels.training.run import train
    except ModuleNotFoundError as error:
        yield skipped(f"training needs {error.name}, which is not installed")
        return
    configs = [Config(amp=True)]  # on digits
    fast = Config(**RECIPES["fast"] | dict(epochs=10, batch_size=512))
    configs += [replace(fast, dataset=str(path)) for path in sorted(ROOT.glob("data/*.npz"))]
    for config in plan.jobs(configs, lambda config: f"{config.model} {Path(config.dataset).stem}"):
        if plan.dry:
            tiny = dict(depth=1, embed_dim=16, num_heads=2, patch_size=4)
            config = replace(config, epochs=1, warmup_epochs=0, model_kwargs=tiny)
        name = Path(config.dataset).stem
        what = dict(model=config.model, dataset=name, epochs=config.epochs, batch=config.batch_size)
        if plan.late:
            yield skipped("out of time", **what)
            continue
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            try:
                history, output = train(replace(config, output=f"{folder}/run"))
            except UserError as error:  # what a data set needs, files or a reader, may not be here
                yield skipped(error, **what) if "dataset" in str(error) else failed(error, **what)
                continue
            except Exception as error:
                yield failed(error, **what)
                continue
            PICTURES.mkdir(exist_ok=True)
            shutil.copy(output / "learning_curve.png", PICTURES / f"training_{name}.png")
        best, last = best_epoch(history), history[-1]
        yield ok(
            **what,
            seconds=time.perf_counter() - start,
            best_top1=best["eval_top1"],
            last_top1=last["eval_top1"],
            images_per_second=last["images_per_second"],
            train_loss=last["train_loss"],
        )
