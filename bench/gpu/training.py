"""A short real training run on every data set whose files are at hand."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .plan import Plan, Row, failed, ok, skipped

ROOT = Path(__file__).resolve().parents[2]
PICTURES = Path("pictures")  # in the working folder of the part


def rows(plan: Plan) -> Iterator[Row]:
    try:
        from vix_kernels.training import Config, UserError
        from vix_kernels.training.data import DATASETS, load_dataset
        from vix_kernels.training.loop import best_epoch, train
    except ModuleNotFoundError as error:
        yield skipped(f"training needs {error.name}, which is not installed")
        return
    for pack in sorted(ROOT.glob("data/*.npz")):
        if not any(name.partition("_")[0] in pack.stem for name in DATASETS):
            yield skipped(f"no data set of `vix train` reads {pack.relative_to(ROOT)}", dataset=pack.stem)
    for name in DATASETS:
        what = dict(model="hybrid_vip", dataset=name, epochs=1 if plan.dry else 20)
        if plan.late:
            yield skipped("out of time", **what)
            continue
        try:
            load_dataset(name)
        except UserError as error:  # its files or its reader are not here
            yield skipped(str(error), **what)
            continue
        small = dict(depth=1, embed_dim=16, num_heads=2, patch_size=4) if plan.dry else {}
        with tempfile.TemporaryDirectory() as folder:
            config = Config(
                model=what["model"], model_kwargs=small, dataset=name, epochs=what["epochs"], warmup_epochs=min(3, what["epochs"]),
                amp=not plan.dry, output=f"{folder}/run",
            )  # fmt: skip
            start = time.perf_counter()
            try:
                history, output = train(config)
            except Exception as error:
                yield failed(error, **what)
                continue
            PICTURES.mkdir(exist_ok=True)
            shutil.copy(output / "learning_curve.png", PICTURES / f"training_{name}.png")
            best, last = best_epoch(history), history[-1]
            yield ok(
                **what, seconds=time.perf_counter() - start, best_top1=best["eval_top1"], last_top1=last["eval_top1"],
                images_per_second=last["images_per_second"], train_loss=last["train_loss"],
            )  # fmt: skip
