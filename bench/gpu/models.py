"""Time inference and a training step of every model, its original implementation, and the model in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from vix_kernels.measure.models import Form, measure
from vix_kernels.models.zoo import PUBLISHED
from vix_kernels.testing.models import small_model

from .part import Job, Plan, by_job

OURS: Form = ("ours", "bf16")
# No layer of these models has more than one backend, so "plain" would run the same code as "ours" and is not measured.
ONLY_TORCH = ("vit", "hybrid_vit", "levit", "cvt", "cct", "fnet_2d")
DRY = ("vit", "vil", "vip", "levin", "cvp", "hybrid_fnet", "fnet_2d")  # all published mixers, and all backbones except CCT
LARGER = ("vit", "vil", "vip", "vin")  # also measured with 4,096 patches, where linear cost should matter


@by_job
def rows(plan: Plan) -> Iterator[Job]:
    for name, form, batch, arguments in order(plan):
        what = dict(model=name, provider=form[0], dtype=form[1], batch=batch)
        how = dict(batch=batch, rounds=1 if plan.dry else 5, arguments=arguments)
        yield Job(what | arguments, partial(measure, name, [form], plan.device, **how))


def order(plan: Plan) -> Iterator[tuple[str, Form, int, dict[str, Any]]]:
    """Yield (model, (provider, dtype), batch size, model arguments), the most important measurements first."""
    if plan.dry:
        for name in DRY:
            yield name, OURS, 2, small_model(name)
        yield "fnet", ("original", "fp32"), 1, {}
        return
    for name in PUBLISHED:
        yield name, OURS, 128, {}
    for name in LARGER:
        yield name, OURS, 32, {"img_size": 64}
    for form in (("original", "fp32"), ("original", "bf16"), ("plain", "bf16")):
        for name in PUBLISHED:
            if form[0] == "original" or name not in ONLY_TORCH:
                yield name, form, 128, {}
