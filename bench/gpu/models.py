"""A training step of every model: its kernels against plain PyTorch, and both beside softmax attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from vix_kernels.models import Backbone, create_model
from vix_kernels.models.zoo import PUBLISHED
from vix_kernels.testing.models import small_model
from vix_kernels.timing import wall_time

from .plan import Plan, Row, failed, ok, skipped

# Nothing in them has another backend.
OF_TORCH = ("vit", "hybrid_vit", "levit", "cvt", "cct", "fnet_2d")


@dataclass(frozen=True)
class Size:
    """How many images and steps, of which models, and with which arguments instead of the published ones."""

    batch: int
    steps: int
    names: tuple[str, ...] = PUBLISHED
    arguments: Callable[[str], dict[str, Any]] = lambda name: {}


# 1,024 tokens; 4,096, where linear cost should tell
SIZES = (Size(128, 10), Size(32, 5, ("vit", "vil", "vip", "vin"), lambda name: {"img_size": 64}))
TINY = (Size(2, 1, arguments=small_model),)


def rows(plan: Plan) -> Iterator[Row]:
    for size in TINY if plan.dry else SIZES:
        for name in size.names:
            for backend in ("auto", "reference"):
                if backend == "reference" and name in OF_TORCH:
                    continue
                what = dict(model=name, backend=backend, batch=size.batch, dtype="bf16 autocast", **size.arguments(name))
                if plan.late:
                    yield skipped("out of time", **what)
                    continue
                try:
                    yield ok(**what, **step_figures(name, backend, size, plan))
                except torch.OutOfMemoryError as error:
                    yield skipped(error, **what)
                except Exception as error:
                    yield failed(error, **what)
                    plan.wait()
                plan.free()


def step_figures(name: str, backend: str, size: Size, plan: Plan) -> dict[str, float | None]:
    torch.manual_seed(0)
    model = create_model(name, backend=backend, **size.arguments(name)).to(plan.device)
    step = training_step(model, size, plan)
    first = step()
    if not plan.dry:
        torch.cuda.reset_peak_memory_stats()
    milliseconds = wall_time(step, calls=size.steps)
    peak = None if plan.dry else torch.cuda.max_memory_allocated() / 2**20
    last = step()
    if not torch.isfinite(first) or not torch.isfinite(last):
        raise ValueError(f"the loss went from {first.item():.4g} to {last.item():.4g}")
    return dict(
        step_ms=milliseconds, images_per_second=1e3 * size.batch / milliseconds, peak_mib=peak,
        loss_before=first.item(), loss_after=last.item(),
    )  # fmt: skip


def training_step(model: Backbone, size: Size, plan: Plan) -> Callable[[], torch.Tensor]:
    """Forward, backward and AdamW on one fixed random batch, so that the loss has to fall."""
    images = torch.randn(size.batch, model.in_chans, *model.img_size, device=plan.device)
    labels = torch.randint(model.num_classes, (size.batch,), device=plan.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> torch.Tensor:
        with torch.autocast(plan.device, torch.bfloat16):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
