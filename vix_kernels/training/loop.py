"""The training loop: AdamW, warm-up and cosine, label smoothing, bf16 autocast, checkpoints that resume exactly."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from vix_kernels.models import create_model
from vix_kernels.models.zoo import preset, takes

from .augment import mix, random_erasing
from .checkpoint import checkpoint_path, load_checkpoint, save_checkpoint
from .config import Config, UserError
from .data import DATASETS, Dataset, load_dataset
from .ema import Ema
from .report import draw_learning_curve, write_args, write_summary

History = list[dict[str, Any]]
EVAL_BATCH = 512
CURVE_SECONDS = 30  # between two drawings of the learning curve: at 0.3 s each they cost a run at most one per cent
RUN_FILES = ("args.yaml", "summary.csv", "last.pt", "best.pt", "learning_curve.png")


def train(config: Config) -> tuple[History, Path]:
    """Train, or continue, the run that `config` describes; returns one row an epoch and the folder of the run.

    Nothing is written before every input has been checked. Raises `UserError` for what the user can put right.
    """
    config.check()
    checkpoint = load_checkpoint(config.resume) if config.resume else None
    output = _output_folder(config)
    device = _device(config.device)
    torch.backends.cudnn.deterministic = True  # convolutions too give the same bits on every run
    dataset = load_dataset(config.dataset, config.img_size).to(device)
    if config.dataset not in DATASETS:  # a path, to be found again from wherever the run is resumed
        config = replace(config, dataset=os.path.abspath(config.dataset))
    model, model_kwargs = _build_model(config, dataset, device)
    optimizer = torch.optim.AdamW(_parameter_groups(model, config.weight_decay), lr=config.lr)
    ema = Ema(model, config.model_ema_decay) if config.model_ema else None
    history: History = []
    if checkpoint is not None:
        _restore(checkpoint, config, model_kwargs, dataset, model, optimizer, ema)
        history = checkpoint["history"]
    new = output is None or not (output / "last.pt").exists()
    reached = _best_of(config.resume, history) if new and history else None

    def state() -> dict[str, Any]:
        return {
            "config": asdict(config),
            "model_kwargs": model_kwargs,
            "data": dataset.description(),
            "epoch": len(history),
            "history": history,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "ema": ema and ema.state_dict(),
        }

    def draw() -> None:
        title = f"{config.model} on {dataset.name}"
        draw_learning_curve(output / "learning_curve.png", history, best_epoch(history), title)

    try:
        if output is None:
            output = _claim_folder(f"{config.model}-{dataset.name}")
        output.mkdir(parents=True, exist_ok=True)
        config = replace(config, output=str(output))
        if new:
            if reached:  # a branch of another run, which takes along what that one has reached
                save_checkpoint(output / "best.pt", reached)
            if history:
                write_summary(output / "summary.csv", history)
            save_checkpoint(output / "last.pt", state())
        write_args(output / "args.yaml", config)
    except OSError as error:
        raise UserError(f"--output: cannot start {output}: {error}") from error

    parameters = sum(p.numel() for p in model.parameters())
    images = f"{len(dataset.train_labels):,} training and {len(dataset.test_labels):,} held-out images"
    print(f"{config.model} on {dataset.name}: {parameters:,} parameters, {images}, {device}, output {output}")
    if dataset.unreadable:
        names = ", ".join(dataset.unreadable[:3]) + ", ..." * (len(dataset.unreadable) > 3)
        print(f"left out, because they cannot be decoded: {len(dataset.unreadable)} images: {names}")
    steps = math.ceil(len(dataset.train_labels) / config.batch_size)
    drawn = time.perf_counter()
    progress = tqdm(total=config.epochs * steps, initial=len(history) * steps, unit="step", leave=False, disable=None)
    try:
        for epoch in range(len(history), config.epochs):
            row = {"epoch": epoch + 1} | train_epoch(model, optimizer, dataset, config, epoch, progress, ema)
            if not math.isfinite(row["train_loss"]):
                raise UserError(f"the loss is {row['train_loss']} in epoch {epoch + 1}: try a lower --lr")
            row |= evaluate(ema.model if ema else model, dataset, config)
            history.append(row)
            if best_epoch(history) is row:
                save_checkpoint(output / "best.pt", state())
            save_checkpoint(output / "last.pt", state())
            write_summary(output / "summary.csv", history)
            if time.perf_counter() > drawn + CURVE_SECONDS:
                draw()
                drawn = time.perf_counter()
            progress.write(
                f"epoch {row['epoch']:3}/{config.epochs}  train loss {row['train_loss']:.4f}  held-out loss "
                f"{row['eval_loss']:.4f}  top-1 {row['eval_top1']:6.2f} %  top-5 {row['eval_top5']:6.2f} %  "
                f"{row['images_per_second']:,.0f} images/s"
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted in epoch {len(history) + 1}, go on with --resume {output}") from None
    finally:
        progress.close()
        if history:
            draw()
    return history, output


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    dataset: Dataset,
    config: Config,
    epoch: int,
    progress: tqdm,
    ema: Ema | None = None,
) -> dict[str, float]:
    # All that is random in an epoch follows from the seed and its number: a resumed run repeats the straight one to
    # the bit without a saved generator state, on any device.
    torch.manual_seed((config.seed * 1_000_003 + epoch + 1) % 2**63)
    start = time.perf_counter()
    images, labels = dataset.train_images, dataset.train_labels
    batches = list(_batches(torch.randperm(len(labels)).to(labels.device), config.batch_size))
    loss_sum = torch.zeros((), device=labels.device)
    model.train()
    for step, index in enumerate(batches, start=epoch * len(batches)):
        lr = learning_rate(step, len(batches), config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        inputs, targets = dataset.inputs(images[index], augment=True), labels[index]
        if config.reprob:
            inputs = random_erasing(inputs, config.reprob)
        if config.mixup or config.cutmix:
            inputs, targets = mix(inputs, targets, len(dataset.classes), mixup=config.mixup, cutmix=config.cutmix)
        with _autocast(config, labels.device):
            logits = model(inputs)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=config.smoothing)
        optimizer.zero_grad()
        loss.backward()
        if config.clip_grad:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        optimizer.step()
        if ema:
            ema.update(model)
        loss_sum += loss.detach() * len(index)
        progress.update()
    train_loss = loss_sum.item() / len(labels)
    return {"train_loss": train_loss, "lr": lr, "images_per_second": len(labels) / (time.perf_counter() - start)}


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Dataset, config: Config) -> dict[str, float]:
    """Loss, top-1 and top-5 in per cent, over every held-out image."""
    model.eval()
    labels = dataset.test_labels
    logits = []
    for images in _batches(dataset.test_images, EVAL_BATCH):
        with _autocast(config, labels.device):
            logits.append(model(dataset.inputs(images)).float())
    scores = torch.cat(logits)
    hits = scores.topk(min(5, len(dataset.classes))).indices == labels[:, None]
    return {
        "eval_loss": F.cross_entropy(scores, labels).item(),
        "eval_top1": 100 * hits[:, 0].sum().item() / len(labels),
        "eval_top5": 100 * hits.sum().item() / len(labels),
    }


def learning_rate(step: int, steps_per_epoch: int, config: Config) -> float:
    """Linear from 0 to `lr` over the warm-up, then half a cosine down to `min_lr`."""
    warmup, total = config.warmup_epochs * steps_per_epoch, config.epochs * steps_per_epoch
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * done)) / 2


def best_epoch(history: History) -> dict[str, Any]:
    """The first row with the highest top-1; among equals, the one with the lowest loss."""
    return max(history, key=lambda row: (row["eval_top1"], -row["eval_loss"]))


def _batches(items: Tensor, size: int) -> Iterator[Tensor]:
    """Batches of nearly equal length, so that batch norm never meets a last batch of one image."""
    return iter(items.tensor_split(math.ceil(len(items) / size)))


def _autocast(config: Config, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=getattr(torch, config.amp_dtype), enabled=config.amp)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Biases, norms and the model's own exceptions are not decayed."""
    exempt = model.no_weight_decay()
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        (free if parameter.ndim <= 1 or name in exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]  # torch goes on with all the devices there are, or with CUDA's advice
        raise UserError(f"--device: cannot use {name!r}: {reason}") from error
    if device.type == "meta":
        raise UserError("--device: cannot use 'meta': its tensors hold no values")
    return device


def _build_model(config: Config, dataset: Dataset, device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """The model and the arguments that made it, those the user left out taken from the data set."""
    _, channels, height, width = dataset.train_images.shape
    shape = {"img_size": (height, width), "in_chans": channels, "num_classes": len(dataset.classes)}
    if "backend" in config.model_kwargs:
        raise UserError("--model-kwargs: backend has a flag of its own, --backend")
    try:  # the patches that suit the images, unless the model has none, or is a preset with its own
        suited = dataset.model_kwargs.keys() & takes(config.model) - preset(config.model).keys()
    except ValueError as error:
        raise UserError(str(error)) from error
    kwargs = shape | {key: dataset.model_kwargs[key] for key in suited} | config.model_kwargs
    for name, value in shape.items():
        if kwargs[name] != value:
            raise UserError(f"--model-kwargs: {name}: the images of {dataset.name} have {value}, got {kwargs[name]}")
    torch.manual_seed(config.seed)
    try:
        model = create_model(config.model, **kwargs, backend=config.backend).to(device)
        with torch.no_grad():
            model.eval()(dataset.inputs(dataset.test_images[:2]))
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(str(error)) from error
    images = len(dataset.train_labels)
    if images // math.ceil(images / config.batch_size) == 1:  # the smallest batch; with one value a channel batch norm fails
        try:
            deepcopy(model).train()(dataset.inputs(dataset.train_images[:1]))
        except ValueError as error:
            message = f"--batch-size: {config.model} cannot train on a batch of one image: {error}"
            raise UserError(message) from error
    return model, kwargs


def _restore(
    checkpoint: dict[str, Any],
    config: Config,
    model_kwargs: dict[str, Any],
    dataset: Dataset,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
) -> None:
    """Load the weights, the optimizer and the average of `checkpoint`, which must be of the same model, data and seed."""
    saved = checkpoint["config"] | {"model_kwargs": checkpoint["model_kwargs"]}
    wanted = {"model": config.model, "seed": config.seed, "model_kwargs": model_kwargs}
    for name, value in wanted.items():
        if saved.get(name) != value:
            raise UserError(f"--resume: the checkpoint has {name} {saved.get(name)!r}, this run has {value!r}")
    # Of the data not the path counts, which may have changed, and not the statistics, which follow the JPEG decoder.
    description = dataset.description()
    if any(checkpoint["data"].get(name) != description[name] for name in ("classes", "train_images", "test_images")):
        raise UserError(f"--resume: the checkpoint has other classes or numbers of images than dataset {config.dataset}")
    if config.epochs < len(checkpoint["history"]):
        done = len(checkpoint["history"])
        raise UserError(f"--epochs: expected at least the {done} that the checkpoint has behind it, got {config.epochs}")
    try:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if ema and checkpoint.get("ema"):
            ema.load_state_dict(checkpoint["ema"])
        elif ema:  # from here on
            ema.model.load_state_dict(checkpoint["model"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"--resume: the checkpoint does not fit the model: {error}") from error


def _best_of(resume: str, history: History) -> dict[str, Any] | None:
    """The checkpoint of the best epoch in `history`, if it lies beside the one that is resumed.

    The run may have gone on since, or be another one: a best.pt with another history is left out.
    """
    path = checkpoint_path(resume).with_name("best.pt")
    best = load_checkpoint(path) if path.is_file() else None
    return best if best and best["history"] == history[: best_epoch(history)["epoch"]] else None


def _output_folder(config: Config) -> Path | None:
    """A folder that holds no run yet, or the one of the run that is continued; None leaves it to `_claim_folder`."""
    if config.resume:
        resumed = checkpoint_path(config.resume)
        folder = Path(config.output) if config.output else resumed.parent
        if resumed.resolve() == (folder / "last.pt").resolve():
            return folder
    elif config.output:
        folder = Path(config.output)
    else:
        return None
    if any((folder / name).exists() for name in RUN_FILES):
        raise UserError(f"--output: {folder} holds a run already: continue it with --resume {folder}, or name another")
    return folder


def _claim_folder(name: str) -> Path:
    """Make runs/NAME, or the first of NAME-2, NAME-3, ... that is free. Of runs started at once only one can make it."""
    runs = Path("runs")
    runs.mkdir(exist_ok=True)
    for number in count(1):
        folder = runs / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
