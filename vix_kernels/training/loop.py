"""The training loop: steps, epochs and evaluation on held-out images."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .augment import mix, random_erasing, random_resized_crop
from .config import Config, SharedError
from .data import Dataset, HeldImages, Images
from .draws import Draws, seed_torch, shuffled
from .optim import learning_rate
from .parallel import Ranks, average_batch_norm, local_parameters, no_gradient_sync
from .state import NEVER, State
from .trivial import trivial_augment

Batch = tuple[Tensor, Tensor]
EVAL_BATCH = 512
WATCH_STEPS = 50  # steps between checks for a finite loss; each check waits for the device


def train_epoch(state: State, dataset: Dataset, after_step: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Train for one epoch, or for the rest of an interrupted epoch.

    Returns:
        A dict with the mean training loss "train_loss", the learning rate "lr" of the last step, and "images_per_second".
    """
    config, ranks, images = state.config, state.ranks, len(dataset.train)
    seed, epoch, _ = state.place
    steps = config.steps(images)
    batches = shuffled(seed, epoch, images=images).tensor_split(steps)[state.step :]
    shares = [ranks.share(len(batch)) for batch in batches]
    local = [batch if share is None else batch[share] for batch, share in zip(batches, shares, strict=True)]
    loader = dataset.train.batches(local, replace_unreadable=True)
    start = time.perf_counter() - state.seconds
    state.call.train()
    for batch, share, (pixels, labels) in zip(batches, shares, synchronized(loader, dataset.train, ranks), strict=True):
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
    """Augment and normalize uint8 images.

    Returns:
        The inputs for the model and the targets. The targets are the labels, or class probabilities (batch, classes) if images
        are mixed.
    """
    images = pixels.float() / dataset.max_value
    if config.crop_scale < 1:
        images = random_resized_crop(images, draws, scale=config.crop_scale)
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
    """Run one training step.

    Args:
        inputs, targets: this process's part of the batch.
        lr: the learning rate.
        batch: the number of images in the batch, over all processes.

    Returns:
        The sum of the losses of this process's images.
    """
    config, ranks = state.config, state.ranks
    state.optimizer.zero_grad()
    total = torch.zeros((), device=inputs.device)
    parts = list(zip(inputs.tensor_split(config.grad_accum_steps), targets.tensor_split(config.grad_accum_steps), strict=True))
    for number, (part_inputs, part_targets) in enumerate(parts, start=1):
        with no_gradient_sync(state.call) if number < len(parts) else nullcontext():
            with autocast(config, inputs.device):
                logits = state.call(in_memory_format(part_inputs, config))
            loss = F.cross_entropy(logits.float(), part_targets, label_smoothing=config.smoothing, reduction="sum")
            if state.teacher:
                distance = state.teacher.distance(part_inputs, logits.float())
                loss = (1 - config.distill_weight) * loss + config.distill_weight * distance
            # DDP and FSDP2 average gradients over processes. With this factor, the average is the gradient of the mean loss.
            state.scaler.scale(loss * (ranks.world / batch)).backward()
        total += loss.detach()
    state.diverged = torch.where(total.isfinite(), state.diverged, state.diverged.clamp(max=state.step + 1))
    state.optimizer.step(lr, state.scaler, config.clip_grad)
    if state.ema:
        state.ema.update(state.model)
    return total


def redraw_features(state: State) -> None:
    """Redraw the random features of all Performer attention layers.

    All processes draw the same features, because the features of a module depend only on its seed and the number of redraws.
    """
    for model in filter(None, (state.model, state.ema and state.ema.model)):
        for module in model.modules():
            if hasattr(module, "redraw_projection"):
                module.redraw_projection()


def check_finite(state: State, eval_loss: float = 0.0) -> None:
    """Raise `SharedError` if any weight, the loss of any step in this epoch, or `eval_loss` is not finite."""
    what, step = "", -state.ranks.largest(-int(state.diverged))
    if step < NEVER:
        what = f"the loss of step {step} of epoch {len(state.history) + 1}"
    elif not math.isfinite(eval_loss):
        what = f"the held-out loss of epoch {len(state.history) + 1}"
    elif state.ranks.largest(not all(norm.isfinite() for norm in torch._foreach_norm(local_parameters(state.model)))):
        what = f"a weight after step {state.step} of epoch {len(state.history) + 1}"
    if what:
        raise SharedError(f"{what} is not finite: try a lower --lr; the last checkpoint is from an earlier step")


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Dataset, config: Config, ranks: Ranks | None = None) -> dict[str, float]:
    """Evaluate `model` on all held-out images. All processes must call this function.

    Returns:
        A dict with the mean loss "eval_loss", and the accuracies "eval_top1" and "eval_top5" in percent.
    """
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
    """For each batch of this process's held-out images, yield the uint8 images, the labels and the logits (images, classes)."""
    ranks = ranks or Ranks()
    model.eval()
    images = len(dataset.test)
    batches = torch.arange(images).tensor_split(math.ceil(images / (EVAL_BATCH * ranks.world)))
    local = [batch.tensor_split(ranks.world)[ranks.rank] for batch in batches]
    for pixels, labels in synchronized(dataset.test.batches(local), dataset.test, ranks):
        with autocast(config, labels.device):
            scores = model(in_memory_format(dataset.inputs(pixels), config))
        yield pixels, labels, scores.float()


def synchronized(batches: Iterator[Batch], images: Images, ranks: Ranks) -> Iterator[Batch]:
    """Iterate over this process's batches. If loading a batch fails in one process, raise the error in all processes.

    Images in memory cannot fail to load, so their batches need no synchronization.
    """
    return batches if isinstance(images, HeldImages) else ranks.each(batches)


def autocast(config: Config, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=getattr(torch, config.amp_dtype), enabled=config.amp)


def in_memory_format(images: Tensor, config: Config) -> Tensor:
    return images.to(memory_format=torch.channels_last) if config.channels_last else images
