"""Checkpoints that a crash cannot damage and that run no code when they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..commands import write_atomically
from .config import UserError

_PARTS = {"config": dict, "model_kwargs": dict, "data": dict, "epoch": int, "history": list, "model": dict, "optimizer": dict}


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # given a path, torch turns a full disk into a RuntimeError
            torch.save(checkpoint, file)

    write_atomically(path, write)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, or the `last.pt` of a run's folder."""
    path = checkpoint_path(path)
    if not path.is_file():
        raise UserError(f"--resume: no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each have their own word for a damaged file
        raise UserError(f"--resume: {path} is damaged, or no checkpoint of vix train ({type(error).__name__})") from error
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(name), kind) for name, kind in _PARTS.items()):
        raise UserError(f"--resume: {path} is no checkpoint of vix train")
    return checkpoint


def checkpoint_path(path: str | Path) -> Path:
    path = Path(path)
    return path / "last.pt" if path.is_dir() else path
