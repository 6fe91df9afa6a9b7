"""From a `Config` to the device, the model and the folder of a run, all checked before anything is written."""

from __future__ import annotations

import os
import zlib
from contextlib import suppress
from copy import deepcopy
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vix_kernels.models import create_model
from vix_kernels.models.zoo import preset, takes

from .checkpoint import Checkpoint, checkpoint_path, existing_checkpoint, load_checkpoint
from .config import Config, UserError
from .data import Dataset
from .draws import seed_torch
from .parallel import Ranks
from .report import best_epoch

RUN_FILES = ("args.yaml", "summary.csv", "last.pt", "best.pt", "learning_curve.png", "confusion.png", "mistakes.png")


def located(config: Config) -> tuple[str | None, Path | None]:
    """The checkpoint to go on from, if any, and the folder to write to; None leaves that to `claim_folder`.

    The checkpoint is that of --resume, unless torchrun has restarted this run and it has one of its own.
    """
    if config.output and _restarted() and (Path(config.output) / "last.pt").exists():
        return config.output, Path(config.output)
    resumed = existing_checkpoint(config.resume).parent if config.resume else None
    return config.resume, Path(config.output) if config.output else resumed


def goes_on(folder: Path, resume: str | None) -> bool:
    """Whether the run in `folder` is the one that is resumed. Raises `UserError` where `folder` holds another run."""
    if resume and checkpoint_path(resume).resolve() == (folder / "last.pt").resolve():
        return True
    if any((folder / name).exists() for name in RUN_FILES) and not _restarted():  # before it had a checkpoint
        raise UserError(f"--output: {folder} holds a run already: continue it with --resume {folder}, or name another")
    return False


def _restarted() -> bool:
    """By torchrun, after a process failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def device_of(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":  # of several processes on a machine, each has its own
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]  # torch goes on with all the devices there are, or with CUDA's advice
        raise UserError(f"--device: cannot use {name!r}: {reason}") from error
    if device.type == "meta":
        raise UserError("--device: cannot use 'meta': its tensors hold no values")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def check_tensorboard() -> None:
    """Whether it can be imported, which takes a second."""
    try:
        import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise UserError(f"--log-tensorboard: tensorboard is missing ({error}): pip install tensorboard") from error


def check_processes(config: Config, ranks: Ranks) -> None:
    """What the number of processes makes impossible."""
    if config.fsdp and ranks.world == 1:
        alone = "--no-fsdp goes on in one" if config.resume else "torchrun --nproc-per-node N -m vix_kernels starts N"
        raise UserError(f"--fsdp: divides a model among processes, and there is one: {alone}")
    if ranks.world > 1 and not config.output and not config.resume:
        raise UserError("--output: name it, so that all processes, and those of a restart, have the same folder")


def check_same_data(dataset: Dataset, ranks: Ranks) -> None:
    """That all processes have the images that the first one has, as far as their labels tell."""

    def contents() -> dict[str, Any]:
        parts = {"training": dataset.train, "held-out": dataset.test}
        checksums = {f"{name} labels": zlib.crc32(part.labels.cpu().numpy().tobytes()) for name, part in parts.items()}
        return {"classes": dataset.classes} | {f"{name} images": len(part) for name, part in parts.items()} | checksums

    first = ranks.decided(contents)
    with ranks.agreed():
        if others := [name for name, value in contents().items() if value != first[name]]:
            raise UserError(f"--dataset: {dataset.name} differs from that of process 0 in its {', '.join(others)}")


def check_batches(config: Config, ranks: Ranks, images: int) -> None:
    """That every process has an image for each part of every batch."""
    smallest = images // config.steps(images)
    if ranks.least(smallest) < config.grad_accum_steps:
        parts = f"{ranks.world} processes, which get images by pairs, and --grad-accum-steps {config.grad_accum_steps}"
        raise UserError(f"--batch-size: {parts} divide a batch, the smallest of which has {smallest} images: too few")


def build_model(config: Config, dataset: Dataset, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """The model and the arguments that made it, those the user left out taken from the data set."""
    channels, height, width = dataset.train.shape
    shape = {"img_size": (height, width), "in_chans": channels, "num_classes": len(dataset.classes)}
    for name, flag in {"backend": "--backend", "drop_path_rate": "--drop-path"}.items():
        if name in config.model_kwargs:
            raise UserError(f"--model-kwargs: {name} has a flag of its own, {flag}")
    try:  # the patches that suit the images, unless the model has none, or is a preset with its own
        suited = dataset.model_kwargs.keys() & takes(config.model) - preset(config.model).keys()
    except ValueError as error:
        raise UserError(str(error)) from error
    kwargs = shape | {key: dataset.model_kwargs[key] for key in suited} | config.model_kwargs
    if config.drop_path is not None:
        kwargs["drop_path_rate"] = config.drop_path
    for name, value in shape.items():
        if kwargs[name] != value:
            raise UserError(f"--model-kwargs: {name}: the images of {dataset.name} have {value}, got {kwargs[name]}")
    seed_torch(config.seed)
    try:
        model = create_model(config.model, **kwargs, backend=config.backend).to(device)
        with torch.no_grad():
            model.eval()(torch.zeros(2, channels, height, width, device=device))
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(str(error)) from error
    return model, kwargs


def check_smallest_batch(config: Config, model: nn.Module, ranks: Ranks, images: int) -> None:
    """Where a process may get a batch of one image: with one value a channel, batch norm fails."""
    if ranks.least(images // config.steps(images)) // config.grad_accum_steps > 1:
        return
    one = torch.zeros(1, model.in_chans, *model.img_size, device=next(model.parameters()).device)
    try:
        deepcopy(model).train()(one)
    except ValueError as error:
        raise UserError(f"--batch-size: {config.model} cannot train on a batch of one image: {error}") from error


def check_same_run(checkpoint: Checkpoint, config: Config, model_kwargs: dict[str, Any], dataset: Dataset) -> None:
    """That `checkpoint` is of the same model, data and seed, and at a place that this run passes."""
    saved = checkpoint["config"] | {"model_kwargs": checkpoint["model_kwargs"]}
    wanted = {"model": config.model, "seed": config.seed, "model_kwargs": model_kwargs}
    if checkpoint["step"]:  # in the middle of an epoch
        wanted["batch_size"] = config.batch_size
    for name, value in wanted.items():
        if saved.get(name) != value:
            raise UserError(f"--resume: the checkpoint has {name} {saved.get(name)!r}, this run has {value!r}")
    # Of the data not the path counts, which may have changed, and not the statistics, which follow the JPEG decoder.
    description = dataset.description()
    if any(checkpoint["data"].get(name) != description[name] for name in ("classes", "train_images", "test_images")):
        raise UserError(f"--resume: the checkpoint has other classes or numbers of images than dataset {config.dataset}")
    begun = len(checkpoint["history"]) + bool(checkpoint["step"])
    if config.epochs < begun:
        raise UserError(f"--epochs: expected at least the {begun} that the checkpoint has behind it, got {config.epochs}")


def best_of(resume: str, history: list[dict[str, Any]]) -> Checkpoint | None:
    """The checkpoint of the best epoch in `history`, if it lies beside the one that is resumed.

    The run may have gone on since, or be another one: a best.pt with another history is left out.
    """
    path = checkpoint_path(resume).with_name("best.pt")
    best = load_checkpoint(path) if path.is_file() else None
    return best if best and best["history"] == history[: best_epoch(history)["epoch"]] else None


def claim_folder(name: str) -> Path:
    """Make runs/NAME, or the first of NAME-2, NAME-3, ... that is free. Of runs started at once only one can make it."""
    runs = Path("runs")
    runs.mkdir(exist_ok=True)
    for number in count(1):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
