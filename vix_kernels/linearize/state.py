"""Checkpoints of a conversion. They are written atomically, and loading a checkpoint executes no code from the file."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..commands import write_atomically
from ..integrations.linearized import CONFIG, PROGRESS
from ..training.checkpoint import write
from ..training.parallel import Ranks
from .batches import checksum

INTERVAL = 50  # steps between checkpoints
STAGES = ("fit", "finetune")


class Progress:
    """The saved state from which `linearize` continues an interrupted conversion. If `folder` is None, nothing is saved."""

    def __init__(self, folder: Path | None, settings: dict[str, Any], ranks: Ranks) -> None:
        self.path = folder and folder / PROGRESS
        self.settings, self.ranks = settings, ranks
        self.saved: dict[str, Any] = {}
        self.batches = 0  # checksum of the batches of this stage
        self.completed: tuple[int, int | None] = 0, None  # completed steps in the checkpoint, checksum of their batches

    @classmethod
    def open(cls, folder: str | Path | None, settings: dict[str, Any], ranks: Ranks, overwrite: bool) -> Progress:
        """Return the state that is saved in `folder`, or a new state if nothing is saved or `overwrite` is set.

        Raises:
            TypeError: `folder` is not a path.
            ValueError: `folder` is a file; or `overwrite` is not set and the folder contains a damaged checkpoint, a
                conversion with different settings, or files but no checkpoint.
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
            return progress
        if not progress.path.is_file():
            names = {each.name for each in folder.iterdir() if not each.name.startswith(".")} if folder.is_dir() else set()
            if names - {CONFIG}:  # without weights, CONFIG is from an interrupted `save_linearized`
                raise ValueError(f"output: expected a new folder, or overwrite=True, got {folder}, which is not empty")
            return progress
        try:
            saved = torch.load(progress.path, map_location="cpu", weights_only=True)
            different = [name for name in settings if settings[name] != saved["settings"].get(name)]
        except Exception as error:  # torch, pickle and zip raise different errors for a damaged file
            raise ValueError(f"output: {progress.path} is damaged ({type(error).__name__}): use overwrite=True") from error
        if "eval_batches" not in saved["settings"]:
            raise ValueError(f"output: {progress.path} was written by an earlier version of this library: use overwrite=True")
        if different == ["max_error"] and STAGES[1] not in saved:
            different = []  # max_error has no effect on the first stage
        if different:
            raise ValueError(
                f"output: {folder} contains a conversion with different {', '.join(different)}: use overwrite=True"
            )
        progress.saved = saved
        return progress

    def begin(self) -> None:
        """Create the folder. If this conversion does not continue a saved one, remove the old checkpoint."""
        if self.path is None or not self.ranks.first:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.saved:
                self.path.unlink(missing_ok=True)
        except OSError as error:
            raise ValueError(
                f"output: expected a folder that can be written, got {self.path.parent} ({error.strerror})"
            ) from error

    def restore(self, stage: str, tensors: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> int:
        """Load the tensors and optimizer state of a stage. Return the number of completed steps, or 0 if nothing is saved."""
        part = self.saved.get(stage) if stage == STAGES[0] else self.saved.pop(stage, None)
        self.batches, self.completed = 0, (0, None)
        if part is None:
            return 0
        with torch.no_grad():
            for tensor, value in zip(tensors, part["tensors"], strict=True):
                tensor.copy_(value)
        optimizer.load_state_dict(part["optimizer"])
        self.completed = part["step"], part.get("batches")
        return part["step"]

    def following(self, batches: Iterator[Any], steps: int) -> Iterator[Any]:
        """Skip the batches of the completed steps (see `restore`), and yield the batches of the remaining steps up to `steps`.

        Raises:
            ValueError: the skipped batches differ from those before the interruption.
        """
        count, expected = self.completed
        for step, batch in enumerate(islice(batches, steps), start=1):
            if self.path is not None:
                self.batches = checksum([batch], self.batches)
            if step == count and expected not in (None, self.batches):
                raise ValueError(
                    "batches: expected the same batches as before the interruption, got others: use overwrite=True"
                )
            if step > count:
                yield batch

    def after_step(
        self, stage: str, step: int, steps: int, tensors: Sequence[Tensor], optimizer: torch.optim.Optimizer
    ) -> None:
        """Write a checkpoint every INTERVAL steps, and after the last of `steps` steps."""
        if self.path is None or (step % INTERVAL and step < steps):
            return
        copies = [x.detach().cpu().clone() for x in tensors]
        part = {"step": step, "tensors": copies, "optimizer": optimizer.state_dict(), "batches": self.batches}
        # Keep the state of the first stage, because checkpoints of the second stage also contain it. The state of the second
        # stage is not kept in memory, because it is too large.
        if stage == STAGES[0]:
            self.saved[stage] = part
        if self.ranks.first:
            content = self.saved | {stage: part, "settings": self.settings}
            write_atomically(self.path, lambda temporary: write(temporary, content))


def weights_checksum(model: nn.Module) -> int:
    """Return a checksum of the names, values and requires_grad of the parameters and buffers."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return checksum([[x for _, x in named]], zlib.crc32(repr([(name, x.requires_grad) for name, x in named]).encode()))


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy the parameters and buffers of `source` to `target`, a model with the same modules."""
    pairs = zip((*source.parameters(), *source.buffers()), (*target.parameters(), *target.buffers()), strict=True)
    for x, y in pairs:
        if checksum([x]) != checksum([y]):  # an expanded buffer never differs, and writing to it would raise an error
            y.copy_(x)
