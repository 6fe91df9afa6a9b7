"""Set up the device, the model and the folder of a run. All checks are made before the first file of the run is written."""

from __future__ import annotations

import os
import zlib
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vix_kernels.models.arguments import pair
from vix_kernels.models.zoo import preset, takes

from .checkpoint import Checkpoint, checkpoint_path, existing_checkpoint, load_checkpoint
from .config import Config, UserError
from .data import Dataset, Source
from .draws import seed_torch
from .hosts import accepts_size, make_model
from .initial import load_initial
from .parallel import Ranks
from .report import best_epoch

RUN_FILES = ("args.yaml", "summary.csv", "last.pt", "best.pt", "learning_curve.png", "confusion.png", "mistakes.png")


def located(config: Config) -> tuple[str | None, Path | None]:
    """Return the checkpoint or run folder to resume from, and the folder to write to.

    If torchrun has restarted this run and --output contains last.pt, the run resumes from that file. Otherwise, it resumes from
    --resume, if given. The folder to write to is --output, or by default the folder of the resumed checkpoint. Without --output
    and --resume, the returned folder is None, and `claim_folder` creates a folder later.
    """
    if config.output and _restarted() and (Path(config.output) / "last.pt").exists():
        return config.output, Path(config.output)
    resumed = existing_checkpoint(config.resume).parent if config.resume else None
    return config.resume, Path(config.output) if config.output else resumed


def resumes(folder: Path, resume: str | None) -> bool:
    """Return whether `resume` names last.pt in `folder`. If so, the run in `folder` continues.

    Raises:
        UserError: `resume` is None or names another checkpoint, and `folder` contains a run that torchrun has not restarted.
    """
    if resume and checkpoint_path(resume).resolve() == (folder / "last.pt").resolve():
        return True
    if any((folder / name).exists() for name in RUN_FILES) and not _restarted():  # a restarted run may have no checkpoint yet
        raise UserError(f"--output: {folder} contains a run: continue it with --resume {folder}, or name another folder")
    return False


def _restarted() -> bool:
    """Return whether torchrun has restarted this run after a process failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def device_of(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":  # one GPU per process
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]  # the other lines list devices or give advice on CUDA
        raise UserError(f"--device: cannot use {name!r}: {reason}") from error
    if device.type == "meta":
        raise UserError("--device: cannot use 'meta': its tensors have no values")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def check_tensorboard() -> None:
    """Raise `UserError` if TensorBoard cannot be imported. The import takes about a second."""
    try:
        import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise UserError(f"--log-tensorboard: cannot import tensorboard ({error}): pip install tensorboard") from error


def check_processes(config: Config, ranks: Ranks) -> None:
    """Raise `UserError` for --fsdp with one process, and for several processes with neither --output nor --resume."""
    if config.fsdp and ranks.world == 1:
        advice = "resume with --no-fsdp" if config.resume else "start several with torchrun --nproc-per-node N -m vix_kernels"
        raise UserError(f"--fsdp: expected several processes, got one: {advice}")
    if ranks.world > 1 and not config.output and not config.resume:
        raise UserError("--output: expected a folder, because all processes and any restart must use the same one, got none")


def check_shared_data(dataset: Dataset, ranks: Ranks) -> None:
    """Raise `UserError` if a process has different data from process 0.

    The classes, the numbers of images, and checksums of the labels are compared.
    """

    def contents() -> dict[str, Any]:
        parts = {"training": dataset.train, "held-out": dataset.test}
        checksums = {f"{name} labels": zlib.crc32(part.labels.cpu().numpy().tobytes()) for name, part in parts.items()}
        return {"classes": dataset.classes} | {f"{name} images": len(part) for name, part in parts.items()} | checksums

    first = ranks.decided(contents)
    with ranks.agreed():
        if different := [name for name, value in contents().items() if value != first[name]]:
            raise UserError(f"--dataset: {dataset.name} differs from that of process 0 in its {', '.join(different)}")


def check_batches(config: Config, ranks: Ranks, images: int) -> None:
    """Raise `UserError` if a process can get fewer than --grad-accum-steps images from the smallest batch."""
    smallest = images // config.steps(images)
    if ranks.least(smallest) < config.grad_accum_steps:
        processes = f"{ranks.world} processes, which get" if ranks.world > 1 else "one process, which gets"
        parts = f"{processes} pairs of images, and --grad-accum-steps {config.grad_accum_steps}"
        raise UserError(f"--batch-size: the smallest batch has {smallest} images, too few for {parts}")


def build_model(config: Config, source: Source, device: torch.device, fresh: bool = True) -> tuple[nn.Module, dict[str, Any]]:
    """Create the model, and check its output shape. If `fresh` is False, do not load pretrained or initial weights.

    The image shape and the number of classes come from the dataset. For this library's models, the patch size also comes from
    the dataset, unless --model-kwargs or the model's preset sets it.

    Returns:
        The model and its arguments.
    """
    channels, height, width = source.shape
    shape = {"img_size": (height, width), "in_chans": channels, "num_classes": len(source.classes)}
    for name, flag in {"backend": "--backend", "drop_path_rate": "--drop-path"}.items():
        if name in config.model_kwargs:
            raise UserError(f"--model-kwargs: {name}: use the flag {flag}")
    if config.model.startswith("timm:"):
        kwargs = {name: shape[name] for name in ("num_classes", "in_chans")} | config.model_kwargs
        if accepts_size(config.model.removeprefix("timm:")):
            kwargs = {"img_size": shape["img_size"]} | kwargs
    else:
        kwargs = _zoo_arguments(config, source, shape)
    if config.drop_path is not None:
        kwargs["drop_path_rate"] = config.drop_path
    for name, value in shape.items():
        if kwargs.get(name, value) != value:
            raise UserError(f"--model-kwargs: {name}: the images of {source.name} have {value}, got {kwargs[name]}")
    seed_torch(config.seed)
    options = {} if config.model.startswith("timm:") else {"backend": config.backend}
    try:
        model = make_model(asdict(config), kwargs | options, source.shape, config.pretrained and fresh)
        if config.initial_checkpoint and fresh:
            load_initial(model, config.initial_checkpoint, source.classes)
        if config.redraw_interval and fresh and not any(hasattr(each, "redraw_projection") for each in model.modules()):
            raise UserError(
                "--redraw-interval: expected 0 for a model without random features that can be redrawn, "
                f"got {config.redraw_interval}"
            )
        model = model.to(device)
        with torch.no_grad():
            logits = model.eval()(torch.zeros(2, channels, height, width, device=device))
        if logits.shape != (2, len(source.classes)):
            expected = f"logits of shape (batch, {len(source.classes)})"
            raise UserError(f"--model: expected {expected}, got {tuple(logits.shape)} for 2 images; global_pool must not be ''")
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise UserError(str(error)) from error
    return model, kwargs


def _zoo_arguments(config: Config, source: Source, shape: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments for one of this library's models. A preset overrides the patch size that `source` suggests."""
    try:
        applicable = source.model_kwargs.keys() & takes(config.model) - preset(config.model).keys()
        kwargs = shape | {key: source.model_kwargs[key] for key in applicable} | config.model_kwargs
        kwargs["img_size"] = pair("img_size", kwargs["img_size"])
    except ValueError as error:
        raise UserError(str(error)) from error
    return kwargs


def check_smallest_batch(config: Config, model: nn.Module, ranks: Ranks, images: int) -> None:
    """Raise `UserError` if a process can get a batch of one image and the model cannot train on such a batch.

    Batch norm fails if a channel has only one value.
    """
    if ranks.least(images // config.steps(images)) // config.grad_accum_steps > 1:
        return
    one = torch.zeros(1, model.in_chans, *model.img_size, device=next(model.parameters()).device)
    try:
        deepcopy(model).train()(one)
    except ValueError as error:
        raise UserError(f"--batch-size: {config.model} cannot train on a batch of one image: {error}") from error


def check_same_run(checkpoint: Checkpoint, config: Config, model_kwargs: dict[str, Any], source: Source) -> None:
    """Raise `UserError` if the run of `checkpoint` differs from this run, or has started more epochs than --epochs.

    The model and its arguments, --attention, the seed, the initial weights, the image shape and the classes are compared.

    If the checkpoint was saved in the middle of an epoch, its batch size must also equal the batch size of this run.
    """
    saved = checkpoint["config"] | {"model_kwargs": checkpoint["model_kwargs"]}
    wanted = {"model": config.model, "attention": config.attention, "seed": config.seed, "model_kwargs": model_kwargs}
    if checkpoint["step"]:  # in the middle of an epoch
        wanted["batch_size"] = config.batch_size
    for name, value in wanted.items():
        if saved.get(name) != value:
            raise UserError(f"--resume: the checkpoint has {name} {saved.get(name)!r}, this run has {value!r}")
    for name in ("initial_checkpoint", "pretrained"):
        value, before = getattr(config, name), saved.get(name)
        is_path = name == "initial_checkpoint" and value and before
        same = os.path.realpath(value) == os.path.realpath(before) if is_path else value == before
        if value and not same:
            got = f"expected {before} as in the run, or none with --resume" if before else "expected none with --resume"
            raise UserError(f"--{name.replace('_', '-')}: {got}, got {value}")
    shape = list(source.shape)
    if (saved_shape := checkpoint["data"].get("shape", shape)) != shape:
        raise UserError(f"--resume: the checkpoint has images of shape {saved_shape}, this run has {shape}: set --img-size")
    if checkpoint["data"].get("classes") != list(source.classes):
        raise UserError(f"--resume: the checkpoint has different classes from dataset {config.dataset}")
    begun = len(checkpoint["history"]) + bool(checkpoint["step"])
    if config.epochs < begun:
        raise UserError(f"--epochs: expected at least the {begun} that the checkpoint has started, got {config.epochs}")


def check_same_data(checkpoint: Checkpoint, config: Config, dataset: Dataset) -> None:
    """Raise `UserError` if the run of `checkpoint` had a different number of training or held-out images.

    The path of the dataset and the pixel statistics are not compared. The path may have changed, and the statistics depend on
    the JPEG decoder.
    """
    description = dataset.description()
    if any(checkpoint["data"].get(name) != description[name] for name in ("train_images", "test_images")):
        raise UserError(f"--resume: the checkpoint has different numbers of images from dataset {config.dataset}")


def best_of(resume: str, history: list[dict[str, Any]]) -> Checkpoint | None:
    """Load best.pt from the folder of the resumed checkpoint.

    Return None if best.pt is missing, or if it is not from the best epoch in `history`.
    """
    path = checkpoint_path(resume).with_name("best.pt")
    best = load_checkpoint(path) if path.is_file() else None
    return best if best and best["history"] == history[: best_epoch(history)["epoch"]] else None


def claim_folder(name: str) -> Path:
    """Create and return the folder runs/NAME, or the first of NAME-2, NAME-3, ... that does not exist.

    Concurrent runs get different folders.
    """
    runs = Path("runs")
    runs.mkdir(exist_ok=True)
    for number in count(1):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
