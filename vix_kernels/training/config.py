"""What a run is made of. The command line takes its defaults from here."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from .recipes import RECIPES


class UserError(Exception):
    """Something that the user can put right: one line, shown without a traceback."""


class SharedError(UserError):
    """A `UserError` that is raised in all processes of a run, whichever of them met it."""


CHOICES = {
    "backend": ("auto", "triton", "torch", "reference"),
    "aa": ("none", "trivial"),
    "recipe": tuple(RECIPES),
    "opt": ("adamw", "muon"),
    "sched": ("cosine", "constant"),
    "amp_dtype": ("bfloat16", "float16"),
}
DEFAULT_MIN_LR = 1e-5
_KINDS = {"int": int, "float": (int, float), "bool": bool, "str": str, "dict[str, Any]": dict}


def is_reached(time_to: float | None, history: list[dict[str, Any]]) -> bool:
    """Whether the last epoch has the accuracy that a run is to end at."""
    return bool(time_to and history) and history[-1]["eval_top1"] >= time_to


@dataclass
class Config:
    model: str = "hybrid_vip"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    drop_path: float | None = None
    dataset: str = "digits"
    data_dir: str | None = None
    img_size: int | None = None
    stream: bool | None = None
    workers: int = 4
    recipe: str | None = None
    epochs: int = 20
    batch_size: int = 64
    grad_accum_steps: int = 1
    opt: str = "adamw"
    lr: float = 2e-3
    weight_decay: float = 0.05
    sched: str = "cosine"
    warmup_epochs: float = 3
    cooldown_epochs: float = 0
    min_lr: float | None = None
    smoothing: float = 0.1
    aug: bool = True
    aa: str = "none"
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_off_epoch: int = 0
    reprob: float = 0.0
    clip_grad: float = 1.0
    redraw_interval: int = 0
    model_ema: bool = False
    model_ema_decay: float = 0.999
    amp: bool = False
    amp_dtype: str = "bfloat16"
    compile: bool = False
    channels_last: bool = False
    grad_checkpointing: bool = False
    fsdp: bool = False
    seed: int = 0
    device: str = "auto"
    backend: str = "auto"
    output: str | None = None
    resume: str | None = None
    checkpoint_hist: int = 0
    recovery_interval: int = 0
    time_to: float | None = None
    log_tensorboard: bool = False
    progress: bool | None = None

    def steps(self, images: int) -> int:
        """Of an epoch. Its batches are of nearly equal length, so that batch norm never meets a last batch of one image."""
        return math.ceil(images / self.batch_size)

    @property
    def end_lr(self) -> float:
        """Learning rate at the end of the cosine."""
        return min(DEFAULT_MIN_LR, self.lr) if self.min_lr is None else self.min_lr

    def check(self) -> None:
        """Raises `UserError` for the first value that makes no sense."""
        for each in fields(self):  # not of a flag: of a file
            kind, value = _KINDS[each.type.removesuffix(" | None")], getattr(self, each.name)
            if value is None and each.type.endswith(" | None"):
                continue
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise UserError(f"--{each.name.replace('_', '-')}: expected {each.type}, got {value!r}")
        for name, choices in CHOICES.items():
            self._expect(name, f"one of {', '.join(choices)}", lambda x, choices=choices: x in choices)
        positive = ("epochs", "batch_size", "grad_accum_steps", "lr", "img_size")
        not_negative = (
            "weight_decay", "warmup_epochs", "cooldown_epochs", "min_lr", "clip_grad", "seed", "mixup", "cutmix",
            "mixup_off_epoch", "redraw_interval", "checkpoint_hist", "recovery_interval", "workers",
        )  # fmt: skip
        for name in positive:
            self._expect(name, "a finite number above 0", lambda x: 0 < x < math.inf)
        for name in not_negative:
            self._expect(name, "a finite number of 0 or more", lambda x: 0 <= x < math.inf)
        for name in ("smoothing", "model_ema_decay", "drop_path"):
            self._expect(name, "a number in [0, 1)", lambda x: 0 <= x < 1)
        self._expect("reprob", "a probability", lambda x: 0 <= x <= 1)
        self._expect("time_to", "a percentage", lambda x: 0 < x <= 100)
        if self.opt == "muon" and self.amp and self.amp_dtype == "float16":
            raise UserError("--opt: muon has no loss scale in common with AdamW, which float16 needs: use --amp-dtype bfloat16")
        if self.fsdp and self.amp and self.amp_dtype == "float16":
            raise UserError("--fsdp: divided models have no loss scale, which float16 needs: use --amp-dtype bfloat16")
        self._expect("min_lr", f"at most --lr {self.lr:g}", lambda x: x <= self.lr)
        self._expect("seed", "less than 2**63", lambda x: x < 2**63)
        self._expect("grad_accum_steps", f"at most --batch-size {self.batch_size}", lambda x: x <= self.batch_size)

    def _expect(self, name: str, expected: str, holds: Any) -> None:
        value = getattr(self, name)
        if value is not None and not holds(value):
            raise UserError(f"--{name.replace('_', '-')}: expected {expected}, got {value}")
