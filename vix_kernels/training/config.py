"""What a run is made of. The command line takes its defaults from here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


class UserError(Exception):
    """Something that the user can put right: one line, shown without a traceback."""


@dataclass
class Config:
    model: str = "hybrid_vip"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset: str = "digits"
    img_size: int | None = None
    epochs: int = 20
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup_epochs: int = 3
    min_lr: float = 1e-5
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    reprob: float = 0.0
    clip_grad: float = 1.0
    model_ema: bool = False
    model_ema_decay: float = 0.999
    amp: bool = False
    amp_dtype: str = "bfloat16"
    seed: int = 0
    device: str = "auto"
    backend: str = "auto"
    output: str | None = None
    resume: str | None = None

    def check(self) -> None:
        for name in ("epochs", "batch_size", "lr"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')}: expected a finite number above 0, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup_epochs", "min_lr", "clip_grad", "seed", "mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')}: expected a finite number of 0 or more, got {getattr(self, name)}")
        if self.img_size is not None and self.img_size < 1:
            raise UserError(f"--img-size: expected a whole number above 0, got {self.img_size}")
        if self.seed >= 2**63:
            raise UserError(f"--seed: expected less than 2**63, got {self.seed}")
        if not 0 <= self.smoothing < 1:
            raise UserError(f"--smoothing: expected a number in [0, 1), got {self.smoothing}")
        if not 0 <= self.model_ema_decay < 1:
            raise UserError(f"--model-ema-decay: expected a number in [0, 1), got {self.model_ema_decay}")
        if not 0 <= self.reprob <= 1:
            raise UserError(f"--reprob: expected a probability, got {self.reprob}")
