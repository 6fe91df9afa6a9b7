"""Recipes: named sets of training settings for `vix train --recipe`."""

from __future__ import annotations

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    # The settings of the original Vision Xformers scripts: no augmentation, no schedule.
    "original": dict(
        epochs=40, lr=1e-3, weight_decay=0.01, sched="constant", warmup_epochs=0, smoothing=0.0, clip_grad=0.0, aug=False
    ),
    # The 300-epoch recipe of Compact Convolutional Transformers (CCT) for CIFAR-10, with TrivialAugment and random shifts
    # instead of RandAugment and random resized crops.
    "cct": dict(
        epochs=300, batch_size=128, lr=5.5e-4, weight_decay=0.06, warmup_epochs=10, cooldown_epochs=10,
        smoothing=0.1, clip_grad=0.0, aa="trivial", mixup=0.8, cutmix=1.0, mixup_off_epoch=175, amp=True, channels_last=True,
    ),
    # A recipe for high accuracy after few epochs.
    "fast": dict(
        opt="muon", batch_size=128, lr=4e-3, weight_decay=0.05, warmup_epochs=1, smoothing=0.1, clip_grad=1.0, amp=True,
        channels_last=True, model_ema=True,
    ),
}  # fmt: skip
