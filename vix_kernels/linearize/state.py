"""Checkpoints of a conversion. They are written atomically, and loading a checkpoint executes no code from the file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..commands import write_atomically
from ..integrations.speed import tensors
from ..training.parallel import Ranks

FILE = "linearize.pt"
INTERVAL = 50  # steps between checkpoints
STAGES = ("fit", "finetune")


class Progress:
    """The state of a conversion, saved so that an interrupted conversion can continue. Without a folder, nothing is saved."""

    def __init__(self, folder: Path | None, settings: dict[str, Any], ranks: Ranks) -> None:
        self.path = folder and folder / FILE
        self.settings, self.ranks = settings, ranks
        self.saved: dict[str, Any] = {}

    @classmethod
    def open(cls, folder: str | Path | None, settings: dict[str, Any], ranks: Ranks, overwrite: bool) -> Progress:
        """Return the state in `folder`, or a new one.

        Raises:
            ValueError: the folder contains other files, a damaged checkpoint, or a conversion with different settings.
        """
        if folder is not None and not isinstance(folder, str | PathLike):
            raise TypeError(f"output: expected a path, got {folder!r}")
        progress = cls(None if folder is None else Path(folder), settings, ranks)
        if folder is None:
            return progress
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"output: expected a folder, got {folder}, which is a file")
        if overwrite:
            if ranks.first:
                progress.path.unlink(missing_ok=True)
            return progress
        if not progress.path.is_file():
            if folder.is_dir() and any(folder.iterdir()):
                raise ValueError(f"output: expected a new folder, or overwrite=True, got {folder}, which is not empty")
            return progress
        try:
            saved = torch.load(progress.path, map_location="cpu", weights_only=True)
            different = saved["settings"] != settings
        except Exception as error:  # torch, pickle and zip raise different errors for a damaged file
            raise ValueError(f"output: {progress.path} is damaged ({type(error).__name__}): use overwrite=True") from error
        if different:
            names = [name for name in settings if settings[name] != saved["settings"].get(name)]
            raise ValueError(f"output: {folder} contains a conversion with different {', '.join(names)}: use overwrite=True")
        progress.saved = saved
        return progress

    def restore(self, stage: str, tensors: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> int:
        """Load the saved tensors and optimizer of a stage. Return the number of completed steps, or 0 if nothing is saved."""
        part = self.saved.get(stage) if stage == STAGES[0] else self.saved.pop(stage, None)
        if part is None:
            return 0
        with torch.no_grad():
            for tensor, value in zip(tensors, part["tensors"], strict=True):
                tensor.copy_(value)
        optimizer.load_state_dict(part["optimizer"])
        return part["step"]

    def after_step(
        self, stage: str, step: int, steps: int, tensors: Sequence[Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        """Write a checkpoint every INTERVAL steps, and after the last of `steps` steps."""
        if self.path is None or (step % INTERVAL and step < steps):
            return
        part = {"step": step, "tensors": [x.detach().cpu().clone() for x in tensors], "optimizer": optimizer.state_dict()}
        # Keep the part of the first stage, because checkpoints of the second stage also contain it. Parts of the second stage
        # are not kept in memory, because they are too large.
        if stage == STAGES[0]:
            self.saved[stage] = part
        if self.ranks.first:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = self.saved | {stage: part, "settings": self.settings}
            write_atomically(self.path, lambda temporary: torch.save(content, temporary))


def fingerprint(model: nn.Module, batch: Any) -> tuple[str, str]:
    """Return a digest of the weights of a model and a digest of a batch, which identify an interrupted conversion."""

    def digest(named: Iterable[tuple[Any, Any]]) -> str:
        lines = []
        for name, x in named:
            sums = x.detach().double() if isinstance(x, Tensor) and not x.is_complex() else torch.zeros(())
            lines.append(
                f"{name} {getattr(x, 'dtype', '')} {tuple(sums.shape)} {sums.sum().item()} {sums.square().sum().item()}"
            )
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return digest([*model.state_dict().items(), (repr(trained), None)]), digest(enumerate(tensors(batch)))
