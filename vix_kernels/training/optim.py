"""The optimizer, and its learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .config import Config, UserError
from .parallel import placed_like


class Optimizer:
    """AdamW, with "muon" only where Muon cannot be used: it takes the matrices, except the head.

    Biases, norms and the model's own exceptions are not decayed. Muon (https://kellerjordan.github.io/posts/muon) is scaled to
    the size of AdamW's steps (arXiv:2502.16982), so that both have one learning rate.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        exempt = model.no_weight_decay()
        head = {id(parameter) for parameter in model.get_classifier().parameters()}
        matrices, decayed, free = [], [], []
        for parameter, name in self.names.items():
            if parameter.ndim <= 1 or name in exempt:
                free.append(parameter)
            elif config.opt == "muon" and parameter.ndim == 2 and id(parameter) not in head:
                matrices.append(parameter)
            else:
                decayed.append(parameter)
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
        self.parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=config.lr)]
        if matrices:
            muon = dict(lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
            self.parts.append(torch.optim.Muon(matrices, **muon))

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self, lr: float, scaler: torch.amp.GradScaler, clip_grad: float) -> None:
        """Unscale the gradients, clip their norm (0: do not), and change the weights."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            scaler.unscale_(part)
        if clip_grad:
            nn.utils.clip_grad_norm_(self.names, clip_grad)
        for part in self.parts:
            scaler.step(part)
        scaler.update()

    def state_dict(self) -> dict[str, Tensor]:
        """`PARAMETER:NAME` -> tensor. By names, not places, so that it fits any division among processes."""
        return {
            f"{self.names[parameter]}:{key}": value
            for part in self.parts
            for parameter, state in part.state.items()
            for key, value in state.items()
        }

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Raises `UserError` where `saved` is of other parameters or of another optimizer."""
        parameters = {name: parameter for parameter, name in self.names.items()}
        owners = {p: part for part in self.parts for group in part.param_groups for p in group["params"]}
        for part in self.parts:
            part.state.clear()
        for place, value in saved.items():
            name, _, key = place.rpartition(":")
            parameter = parameters.get(name)
            if parameter is None or value.shape not in (parameter.shape, ()):
                raise UserError(f"--resume: the checkpoint does not fit the model: it has optimizer state for {place}")
            if (key == "momentum_buffer") != isinstance(owners[parameter], torch.optim.Muon):
                raise UserError("--resume: the checkpoint is of a run with another --opt")
            owners[parameter].state[parameter][key] = placed_like(parameter, value)


def learning_rate(step: int, steps_per_epoch: int, config: Config) -> float:
    """Linear from 0 to `lr` over the warm-up; then constant, or half a cosine to `end_lr`, where the cool-down stays."""
    warmup, end = (round(n * steps_per_epoch) for n in (config.warmup_epochs, config.epochs - config.cooldown_epochs))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.sched == "constant":
        return config.lr
    done = min(1.0, (step - warmup) / max(1, end - warmup))
    return config.end_lr + (config.lr - config.end_lr) * (1 + math.cos(math.pi * done)) / 2
