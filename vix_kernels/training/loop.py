"""The training loop, in plain PyTorch: steps, epochs, and the test on held-out images."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .augment import mix, random_erasing
from .config import Config, SharedError
from .data import Dataset, HeldImages, Images
from .draws import Draws, seed_torch, shuffled
from .optim import learning_rate
from .parallel import Ranks, average_batch_norm, gradients_stay, local_parameters
from .state import NEVER, State
from .trivial import trivial_augment

Batch = tuple[Tensor, Tensor]
EVAL_BATCH = 512
WATCH_STEPS = 50  # between two looks at whether the loss is finite, each of which waits for the device


def train_epoch(state: State, dataset: Dataset, after_step: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Train on every image once, or on those of the epoch under way that are left."""
    config, ranks, images = state.config, state.ranks, len(dataset.train)
    seed, epoch, _ = state.place
    steps = config.steps(images)
    batches = shuffled(seed, epoch, images=images).tensor_split(steps)[state.step :]
    shares = [ranks.share(len(batch)) for batch in batches]
    own = [batch if share is None else batch[share] for batch, share in zip(batches, shares, strict=True)]
    feed = dataset.train.batches(own, place=(seed, epoch), crop=config.aug)
    start = time.perf_counter() - state.seconds
    state.call.train()
    for batch, share, (pixels, labels) in zip(batches, shares, together(feed, dataset.train, ranks), strict=True):
        lr = learning_rate(epoch * steps + state.step, steps, config)
        draws = Draws(*state.place, images=len(batch), rows=share)
        seed_torch(*state.place, ranks.rank)
        if config.redraw_interval and (epoch * steps + state.step) % config.redraw_interval == 0:
            redraw_features(state)
        inputs, targets = augmented(dataset, pixels, labels, draws, config, epoch)
        state.loss_sum += train_step(state, inputs, targets, lr, len(batch))
        state.step += 1
        state.seconds = time.perf_counter() - start
        if state.step % WATCH_STEPS == 0:
            check_finite(state)
        after_step()
    check_finite(state)
    train_loss = ranks.sum(state.loss_sum).item() / images
    state.seconds = time.perf_counter() - start
    lr = learning_rate((epoch + 1) * steps - 1, steps, config)
    return {"train_loss": train_loss, "lr": lr, "images_per_second": images / state.seconds}


def augmented(
    dataset: Dataset, pixels: Tensor, labels: Tensor, draws: Draws, config: Config, epoch: int
) -> tuple[Tensor, Tensor]:
    """uint8 images to what the model reads, and their labels or, of mixed images, the shares of the classes."""
    images = pixels.float() / dataset.max_value
    if config.aug:
        images = dataset.augment(images, draws)
    if config.aa == "trivial":
        images = trivial_augment(images, draws)
    images = dataset.normalised(images)
    if config.reprob:
        images = random_erasing(images, draws, config.reprob)
    if (config.mixup or config.cutmix) and not 0 < config.mixup_off_epoch <= epoch:
        return mix(images, labels, draws, classes=len(dataset.classes), mixup=config.mixup, cutmix=config.cutmix)
    return images, labels


def train_step(state: State, inputs: Tensor, targets: Tensor, lr: float, batch: int) -> Tensor:
    """One step on this process's share of a batch of so many images; returns the sum of the losses of the share."""
    config, ranks = state.config, state.ranks
    state.optimizer.zero_grad()
    total = torch.zeros((), device=inputs.device)
    parts = list(zip(inputs.tensor_split(config.grad_accum_steps), targets.tensor_split(config.grad_accum_steps), strict=True))
    for number, (images, aims) in enumerate(parts, start=1):
        with gradients_stay(state.call) if number < len(parts) else nullcontext():
            with autocast(config, inputs.device):
                logits = state.call(as_laid_out(images, config))
            loss = F.cross_entropy(logits.float(), aims, label_smoothing=config.smoothing, reduction="sum")
            # The gradients of the processes are averaged: theirs together is then that of the mean loss of the batch.
            state.scaler.scale(loss * (ranks.world / batch)).backward()
        total += loss.detach()
    state.diverged = torch.where(total.isfinite(), state.diverged, state.diverged.clamp(max=state.step + 1))
    state.optimizer.step(lr, state.scaler, config.clip_grad)
    if state.ema:
        state.ema.update(state.model)
    return total


def redraw_features(state: State) -> None:
    """New random features for every Performer: the same in all processes, which draw them from their seeds."""
    for model in filter(None, (state.model, state.ema and state.ema.model)):
        for module in model.modules():
            if hasattr(module, "redraw_projection"):
                module.redraw_projection()


def check_finite(state: State, eval_loss: float = 0.0) -> None:
    """Raises `SharedError` where the loss of a step of this epoch was not, or `eval_loss`, or a weight is not."""
    what, step = "", -state.ranks.largest(-int(state.diverged))
    if step < NEVER:
        what = f"the loss of step {step} of epoch {len(state.history) + 1}"
    elif not math.isfinite(eval_loss):
        what = f"the held-out loss of epoch {len(state.history) + 1}"
    elif state.ranks.largest(not all(norm.isfinite() for norm in torch._foreach_norm(local_parameters(state.model)))):
        what = f"a weight behind step {state.step} of epoch {len(state.history) + 1}"
    if what:
        raise SharedError(f"{what} is not finite: try a lower --lr; the last checkpoint is from before")


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Dataset, config: Config, ranks: Ranks | None = None) -> dict[str, float]:
    """Loss, top-1 and top-5 in per cent, over every held-out image. With several processes, all call it."""
    ranks = ranks or Ranks()
    average_batch_norm(model, ranks)
    sums = torch.zeros(4, dtype=torch.float64)
    for _, labels, scores in tested(model, dataset, config, ranks):
        hits = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
        loss = F.cross_entropy(scores, labels, reduction="sum")
        sums += torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.tensor(len(labels), device=loss.device)]).cpu()
    loss, top1, top5, images = ranks.sum(sums).tolist()
    return {"eval_loss": loss / images, "eval_top1": 100 * top1 / images, "eval_top5": 100 * top5 / images}


@torch.no_grad()
def tested(
    model: nn.Module, dataset: Dataset, config: Config, ranks: Ranks | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The held-out images of this process, batch by batch: uint8 images, labels, scores (images, classes)."""
    ranks = ranks or Ranks()
    model.eval()
    images = len(dataset.test)
    batches = torch.arange(images).tensor_split(math.ceil(images / (EVAL_BATCH * ranks.world)))
    own = [batch.tensor_split(ranks.world)[ranks.rank] for batch in batches]
    for pixels, labels in together(dataset.test.batches(own), dataset.test, ranks):
        with autocast(config, labels.device):
            scores = model(as_laid_out(dataset.inputs(pixels), config))
        yield pixels, labels, scores.float()


def together(batches: Iterator[Batch], images: Images, ranks: Ranks) -> Iterator[Batch]:
    """The batches of this process; an error of one process is raised in all. Images in memory raise none, and need no check."""
    return batches if isinstance(images, HeldImages) else ranks.each(batches)


def autocast(config: Config, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=getattr(torch, config.amp_dtype), enabled=config.amp)


def as_laid_out(images: Tensor, config: Config) -> Tensor:
    return images.to(memory_format=torch.channels_last) if config.channels_last else images
