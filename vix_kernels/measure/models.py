"""`vix bench --models`: inference and training steps of the models, compared with their original implementations.

If the vision_xformer 0.2.0 wheel is installed, the originals of ViL, ViP, ViN and FNet come from this wheel. All other
originals are the published models in plain PyTorch, as built by `from_original`. The output labels them "plain form". The
original training scripts apply autocast only to the loss, so they train in float32. In the bf16 rows, the forward pass of the
original also runs under autocast. Dropout rates are those of the published configurations.
"""

from __future__ import annotations

import importlib
import math
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..commands import print_table
from ..models import create_model, list_models
from ..models.originals import build, drawn
from ..models.zoo import PUBLISHED
from ..testing import kept_for_backward
from .machine import device_name
from .operators import Row, alone, failed, free, ok, out_of_memory, outcome, peak_memory, skipped
from .providers import Unavailable
from .timing import in_turns, wall_time

VIX = dict(image_size=32, patch_size=1, num_classes=10, dim=128, depth=4, mlp_dim=256)
CCT = dict(
    img_size=64, embedding_dim=128, n_conv_layers=3, kernel_size=3, stride=(2, 1, 1), padding=1, pooling_kernel_size=3,
    pooling_stride=1, pooling_padding=1, num_layers=4, num_heads=4, num_classes=200, positional_embedding="learnable",
)  # fmt: skip
LEVIT = dict(image_size=32, stages=1, num_classes=200, dim=128, depth=4, heads=4, mlp_mult=2)
CVT = dict(num_classes=200)
for stage, (stride, depth) in enumerate(((2, 1), (1, 1), (1, 2)), start=1):
    sizes = dict(
        emb_dim=128, emb_kernel=3, emb_stride=stride, proj_kernel=3, kv_proj_stride=1, heads=4, depth=depth, mlp_mult=2
    )
    CVT |= {f"s{stage}_{key}": value for key, value in sizes.items()}


class Pair(NamedTuple):
    """The arguments of this library's model, and the label and arguments of its original.

    If `wheel` is True and the vision_xformer wheel is installed, the original comes from this wheel.
    """

    ours: dict[str, Any]
    label: str
    original: dict[str, Any]
    wheel: bool = False

    @property
    def from_wheel(self) -> bool:
        return self.wheel and find_spec("vision_xformer") is not None


HEADS = dict(heads=4, dim_head=32)
DROP, DROPOUT = dict(proj_drop_rate=0.25), dict(dropout=0.25)
# The arguments `ours` make both models of a pair do the same work. The original CCT, CCN and CCP always have an MLP ratio of 4,
# and the original LeViN and LeViP have no position embeddings. levit and cvt have no originals.
PAIRS = {
    "vit": Pair({}, "ViT", VIX | HEADS),
    "vil": Pair(DROP, "ViL", VIX | HEADS | DROPOUT, wheel=True),
    "vip": Pair(DROP, "ViP", VIX | HEADS | DROPOUT, wheel=True),
    "vin": Pair({}, "ViN", VIX | HEADS | dict(num_landmarks=64), wheel=True),
    "fnet": Pair({}, "FNet", VIX, wheel=True),
    "hybrid_vit": Pair({}, "HybridViT", VIX | HEADS),
    "hybrid_vil": Pair({}, "HybridViL", VIX | HEADS),
    "hybrid_vip": Pair({}, "HybridViP", VIX | HEADS),
    "hybrid_vin": Pair(DROP, "HybridViN", VIX | HEADS | DROPOUT),
    "hybrid_fnet": Pair({}, "HybridFNet", VIX | dict(heads=4)),
    "levin": Pair(dict(position="none"), "LeViN", LEVIT),
    "levip": Pair(dict(position="none"), "LeViP", LEVIT),
    "cvn": Pair({}, "CvN", CVT),
    "cvp": Pair({}, "CvP", CVT),
    "cct": Pair(dict(mlp_ratio=4.0), "CCT", CCT),
    "ccn": Pair(dict(mlp_ratio=4.0), "CCN", CCT),
    "ccp": Pair(dict(mlp_ratio=4.0), "CCP", CCT),
    "fnet_2d": Pair({}, "wheel_FNet2D", dict(num_classes=10, dim=128, depth=5, mlp_dim=256)),
}
# A form is a provider and a dtype. The provider "ours" is this library's model, "compiled" is this model with torch.compile,
# "plain" is this model with backend="reference", and "original" is the original implementation.
FORMS = {
    "cpu": (("ours", "fp32"), ("ours", "bf16"), ("original", "fp32"), ("original", "bf16")),
    "cuda": (("ours", "bf16"), ("compiled", "bf16"), ("original", "fp32"), ("original", "bf16")),
}
PROVIDERS = ("ours", "compiled", "plain", "original")
GPU_FORMS = {("original", "fp32"), *((provider, "bf16") for provider in PROVIDERS)}
BATCH = {"cpu": 16, "cuda": 128}
Form = tuple[str, str]


def original_of(name: str) -> str:
    """Return the label and source of a model's original implementation, or "" if the model has none."""
    if name not in PAIRS:
        return ""
    return f"{PAIRS[name].label}, " + ("vision_xformer 0.2.0" if PAIRS[name].from_wheel else "plain form")


def make(name: str, provider: str, arguments: dict[str, Any], device: str) -> nn.Module:
    """Create the model `name` on `device`. `provider` selects the implementation, as in FORMS.

    `arguments` override the published arguments of the model.

    Raises:
        Unavailable: the provider is "original", and the model has no original implementation or `arguments` is not empty.
    """
    if provider != "original":
        ours = (PAIRS[name].ours if name in PAIRS else {}) | arguments
        model = create_model(name, **ours, backend="reference" if provider == "plain" else "auto").to(device)
        return torch.compile(model) if provider == "compiled" else model
    if name not in PAIRS:
        raise Unavailable("this model has no original")
    if arguments:
        raise Unavailable("the original is only measured in its published size")
    pair = PAIRS[name]
    if pair.from_wheel:
        return getattr(importlib.import_module("vision_xformer"), pair.label)(**pair.original).to(device)
    return drawn(build(pair.label, pair.original, backend="reference")).to(device)


def measure(
    name: str, forms: Sequence[Form], device: str, *, batch: int, rounds: int, arguments: dict[str, Any] | None = None
) -> list[Row]:
    """Measure one model. For each form (provider and dtype), return one row for inference and one row for a training step.

    A training step consists of the forward pass, the loss, the backward pass and an AdamW update.

    All steps use the same batch of random images. The training row is "failed" if the loss in the last step is not finite.
    """
    arguments = arguments or {}
    ours = create_model(name, **arguments)
    images = torch.randn(batch, ours.in_chans, *ours.img_size, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.arange(batch, device=device) % ours.num_classes
    rows, steps = [], {}
    for provider, dtype in forms:
        what = dict(
            model=name, provider=provider, dtype=dtype, batch=batch, device=device_name(device),
            original=original_of(name) if provider == "original" else "", **arguments,
        )  # fmt: skip
        try:
            torch.manual_seed(0)
            step = Step(make(name, provider, arguments, device), images, labels, dtype)
            if device == "cpu":
                steps[provider, dtype] = step, what
                step.train(), step.infer()  # if one of these raises an error, the form is not timed
            else:
                rows += _figures(step, what, *(wall_time(each, calls=rounds) for each in (step.infer, step.train)))
                del step
                free(device)
        except Exception as error:
            steps.pop((provider, dtype), None)
            skip = provider == "original" or isinstance(error, Unavailable) or out_of_memory(error)
            rows += [(skipped if skip else failed)(error, **what, direction=each) for each in ("inference", "training")]
            if device == "cuda":
                torch.cuda.synchronize()  # raises if a kernel made an illegal memory access
    inference = in_turns({form: step.infer for form, (step, _) in steps.items()}, rounds=rounds)
    training = in_turns({form: step.train for form, (step, _) in steps.items()}, rounds=rounds)
    for form, (step, what) in steps.items():
        rows += _figures(step, what, inference[form].median, training[form].median)
    return rows


class Step:
    """Inference and training steps of one model on one batch."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, dtype: str) -> None:
        self.model, self.images, self.labels, self.dtype = model, images, labels, dtype
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.losses: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            return self.model(images)

    def train(self) -> None:
        self.model.train()
        loss = F.cross_entropy(self.forward(self.images).float(), self.labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach())

    def infer(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.forward(self.images)

    def kept(self) -> int:
        self.model.train()
        return kept_for_backward(self.forward, (self.images,))


def _figures(step: Step, what: Row, inference: float, training: float) -> Iterator[Row]:
    device, batch = step.images.device.type, what["batch"]
    for direction, function, milliseconds in (("inference", step.infer, inference), ("training", step.train, training)):
        figures = dict(
            direction=direction, ms=milliseconds, images_per_second=1e3 * batch / milliseconds,
            peak_mib=peak_memory(function, device) / 2**20,
        )  # fmt: skip
        if direction == "training":
            first, last = step.losses[0].item(), step.losses[-1].item()
            if not math.isfinite(last):
                yield failed(f"the loss went from {first:.4g} to {last:.4g}", **what, direction=direction)
                continue
            figures |= dict(kept_mib=step.kept() / 2**20, loss_before=first, loss_after=last)
        yield ok(**what, **figures)


# The command


def run(args: Namespace, device: str, parser: ArgumentParser) -> Iterator[list[Row]]:
    """Yield one list of rows per model."""
    names = PUBLISHED if args.models == "*" else list_models(args.models)
    if not names:
        parser.error(f"--models: expected a pattern that matches a model, such as {', '.join(PUBLISHED)}, got {args.models!r}")
    forms = FORMS[device]
    if args.provider:
        forms = [each for each in product(args.provider, ("fp32", "bf16")) if device == "cpu" or each in GPU_FORMS]
    for name in names:
        start = time.perf_counter()

        def lost(why: str, name: str = name) -> list[Row]:
            return [skipped(why, model=name, provider=p, dtype=d, direction="", original="") for p, d in forms]

        yield alone(device, lost, measure, name, forms, device, batch=args.batch or BATCH[device], rounds=args.rounds)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def report(rows: list[Row]) -> None:
    figures = {"images_per_second": "images/s", "peak_mib": "peak MiB", "kept_mib": "kept MiB"}
    print_table(
        ("model", "provider", "dtype", "", *figures.values()),
        (
            [row["model"], row["original"] or row["provider"], row["dtype"], row["direction"], *outcome(row, figures, 4)]
            for row in rows
        ),
    )
