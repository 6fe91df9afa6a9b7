"""A training step of every model: its kernels against plain PyTorch, and both beside softmax attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vix_kernels.models import create_model, list_models
from vix_kernels.timing import wall_time

from .plan import Plan, Row, failed, ok, skipped


@dataclass(frozen=True)
class Size:
    """Images of size x size pixels, one token a pixel."""

    size: int
    batch: int
    steps: int
    names: str = "*"


SIZES = (Size(32, 128, 10), Size(64, 32, 5, "vi?"))  # 1,024 tokens; 4,096, where linear cost should tell
TINY = (Size(4, 2, 1),)


def rows(plan: Plan) -> Iterator[Row]:
    for size in TINY if plan.dry else SIZES:
        for name in list_models(size.names):
            for backend in ("auto", "reference"):
                if backend == "reference" and name.endswith("vit"):  # softmax attention is torch's own either way
                    continue
                what = dict(model=name, backend=backend, tokens=size.size**2, batch=size.batch, dtype="bf16 autocast")
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
    small = dict(depth=1, embed_dim=16, num_heads=2) if plan.dry else {}
    model = create_model(name, img_size=size.size, backend=backend, **small).to(plan.device)
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


def training_step(model: torch.nn.Module, size: Size, plan: Plan) -> Callable[[], torch.Tensor]:
    """Forward, backward and AdamW on one fixed random batch, so that the loss has to fall."""
    images = torch.randn(size.batch, 3, size.size, size.size, device=plan.device)
    labels = torch.randint(10, (size.batch,), device=plan.device)
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
