"""The state of training, which checkpoints save and restore."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from .checkpoint import Checkpoint
from .config import Config, UserError
from .ema import Ema
from .optim import Optimizer
from .parallel import Ranks, average_batch_norm, load_placed, replicate, shard

NEVER = 2**31
History = list[dict[str, Any]]


class State:
    """The model and the rest of the training state: optimizer, loss scaler, moving average and progress.

    Random numbers need no state, because they follow from the seed and from `place`.

    Attributes:
        model: the plain module.
        call: the module to call for training. It averages the gradients over the processes.
        history: one row for each completed epoch.
        step: the completed steps of the current epoch.
        loss_sum: the sum of the losses in these steps.
        seconds: the time of these steps.
        diverged: the first step of the current epoch whose loss is not finite, else NEVER. A tensor on the device.
    """

    def __init__(self, config: Config, model: nn.Module, device: torch.device, ranks: Ranks) -> None:
        self.config, self.model, self.device, self.ranks = config, model, device, ranks
        self.ema = Ema(model, config.model_ema_decay) if config.model_ema else None
        for module in filter(None, (model, self.ema and self.ema.model)):
            if config.channels_last and not config.fsdp:  # FSDP2 needs contiguous weights; only images change
                module.to(memory_format=torch.channels_last)
            if config.compile:
                module.compile(dynamic=True)  # batches have two sizes
            if config.fsdp:
                shard(module, device)
        if config.grad_checkpointing:
            model.set_grad_checkpointing()
        self.call = replicate(model, device) if ranks.world > 1 and not config.fsdp else model
        self.optimizer = Optimizer(model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp and config.amp_dtype == "float16")
        self.history: History = []
        self.start_epoch()

    def start_epoch(self) -> None:
        self.step, self.seconds = 0, 0.0
        self.loss_sum = torch.zeros((), device=self.device)
        self.diverged = torch.full((), NEVER, device=self.device)

    @property
    def place(self) -> tuple[int, int, int]:
        """Seed, epoch and step. They determine the next random numbers."""
        return self.config.seed, len(self.history), self.step

    @property
    def tested(self) -> nn.Module:
        """The model to evaluate: the moving average if there is one."""
        return self.ema.model if self.ema else self.model

    def checkpoint(self, model_kwargs: dict[str, Any], data: dict[str, Any]) -> Checkpoint:
        """Return the checkpoint of this state. All processes must call it."""
        average_batch_norm(self.model, self.ranks)  # all processes continue with the statistics that are saved
        return {
            "config": asdict(self.config),
            "model_kwargs": model_kwargs,
            "data": data,
            "epoch": len(self.history),
            "step": self.step,
            "loss_sum": self.ranks.sum(self.loss_sum).item(),
            "seconds": self.seconds,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.model.state_dict() if self.ema else {},
            "ema_updates": self.ema.updates if self.ema else 0,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore the state from `checkpoint`. If it has no moving average, the average starts from its weights.

        Raises:
            UserError: the checkpoint does not fit the model.
        """
        try:
            load_placed(self.model, checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            if checkpoint["scaler"] and self.scaler.is_enabled():
                self.scaler.load_state_dict(checkpoint["scaler"])
            if self.ema:
                load_placed(self.ema.model, checkpoint["ema"] or checkpoint["model"])
                self.ema.updates = checkpoint["ema_updates"]
            self.history, self.step, self.seconds = checkpoint["history"], checkpoint["step"], checkpoint["seconds"]
            if self.ranks.first:  # the sum over all processes
                self.loss_sum += checkpoint["loss_sum"]
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--resume: the checkpoint does not fit the model: {error}") from error
