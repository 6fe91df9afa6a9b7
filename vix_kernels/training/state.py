"""The training state, which is saved in checkpoints."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .checkpoint import Checkpoint
from .config import Config, UserError
from .ema import Ema
from .optim import Optimizer
from .parallel import Ranks, average_batch_norm, load_placed, replicate, shard

if TYPE_CHECKING:
    from .teacher import Teacher

NEVER = 2**31
History = list[dict[str, Any]]


class State:
    """The training state: the model, the optimizer, the loss scaler, the moving average and the progress.

    Random number generators are not part of the state, because all random numbers are derived from `place`.

    Attributes:
        model: the module without the DDP wrapper.
        call: the module to call for training. It averages the gradients over all processes.
        history: one row for each completed epoch.
        step: the number of completed steps in the current epoch.
        loss_sum: the sum of losses over this process's images in the completed steps of the current epoch.
        seconds: the time that the completed steps of the current epoch took.
        teacher: the model to learn from, or None.
        diverged: the first step in the current epoch whose loss was not finite, or NEVER. It is a tensor on the device.
    """

    def __init__(self, config: Config, model: nn.Module, device: torch.device, ranks: Ranks) -> None:
        self.config, self.model, self.device, self.ranks = config, model, device, ranks
        self.ema = Ema(model, config.model_ema_decay) if config.model_ema else None
        for module in filter(None, (model, self.ema and self.ema.model)):
            if config.channels_last and not config.fsdp:  # FSDP2 needs contiguous weights, so only the images are converted
                module.to(memory_format=torch.channels_last)
            if config.compile:
                module.compile(dynamic=True)  # not all batches have the same size
            if config.fsdp:
                shard(module, device)
        if config.grad_checkpointing:
            model.set_grad_checkpointing()
        self.call = replicate(model, device) if ranks.world > 1 and not config.fsdp else model
        self.optimizer = Optimizer(model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp and config.amp_dtype == "float16")
        self.teacher: Teacher | None = None
        self.history: History = []
        self.start_epoch()

    def start_epoch(self) -> None:
        self.step, self.seconds = 0, 0.0
        self.loss_sum = torch.zeros((), device=self.device)
        self.diverged = torch.full((), NEVER, device=self.device)

    @property
    def place(self) -> tuple[int, int, int]:
        """The seed, epoch and step, from which the next random numbers are derived."""
        return self.config.seed, len(self.history), self.step

    @property
    def tested(self) -> nn.Module:
        """The model to evaluate: the moving average if there is one."""
        return self.ema.model if self.ema else self.model

    def checkpoint(self, model_kwargs: dict[str, Any], data: dict[str, Any]) -> Checkpoint:
        """Return this state as a checkpoint. All processes must call this method."""
        average_batch_norm(self.model, self.ranks)  # so that all processes continue with the saved statistics
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
        """Restore the state from `checkpoint`. Without a saved moving average, the average starts from the saved weights.

        Raises:
            UserError: the checkpoint does not match the model.
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
            if self.ranks.first:  # the saved value is the sum over all processes
                self.loss_sum += checkpoint["loss_sum"]
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--resume: the checkpoint does not fit the model: {error}") from error
