"""Checkpoints that a crash cannot damage, that run no code when they are read, and that fit any number of processes.

A checkpoint is one file. Where the model is divided among processes (FSDP2), every process writes its shards of the tensors to
a folder beside it, by torch.distributed.checkpoint, and the file, written last, names that folder.
"""

from __future__ import annotations

import re
import shutil
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ..commands import write_atomically
from .config import UserError
from .parallel import Ranks
from .unpickle import Unpickler

Checkpoint = dict[str, Any]
_PARTS = {
    "config": dict, "model_kwargs": dict, "data": dict, "epoch": int, "step": int, "history": list, "model": dict,
    "optimizer": dict, "ema": dict,
}  # fmt: skip
_PARTS_WITH_TENSORS = ("model", "optimizer", "ema")
SHARDS = "shards"


def save_checkpoint(path: Path, checkpoint: Checkpoint, ranks: Ranks, sharded: bool = False) -> None:
    """Called by all processes. Whoever reads `path` meanwhile, or after a crash, finds the old checkpoint or the new one."""
    if sharded:
        shards = path.parent / SHARDS / f"{path.stem}-{ranks.largest(time.time_ns())}"
    try:
        if sharded:
            checkpoint = _write_shards(shards, checkpoint) | {"shards": shards.name}
        if ranks.first:
            write_atomically(path, lambda temporary: _write(temporary, checkpoint))
    except OSError:
        if sharded and ranks.first:  # a part of them would fill the disk, and no file names them
            shutil.rmtree(shards, ignore_errors=True)
        raise
    if sharded and ranks.first:
        _remove_shards(path, besides=shards)


def remove_leftovers(folder: Path) -> None:
    """What runs have left that were killed while they wrote to `folder`."""
    for left in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.(pt|csv|yaml|png)\.\d+\.tmp", left.name):
            left.unlink()


def remove_checkpoint(path: Path) -> None:
    path.unlink(missing_ok=True)
    _remove_shards(path)


def _remove_shards(path: Path, besides: Path | None = None) -> None:
    for folder in (path.parent / SHARDS).glob(f"{path.stem}-*"):
        if folder != besides:
            shutil.rmtree(folder)


def _write_shards(folder: Path, checkpoint: Checkpoint) -> Checkpoint:
    """Write this process's shards of the tensors; returns the checkpoint without them."""
    tensors, rest = {}, dict(checkpoint)
    for part in _PARTS_WITH_TENSORS:
        rest[part] = {name: x for name, x in checkpoint[part].items() if not isinstance(x, Tensor)}
        tensors |= {f"{part}/{name}": x for name, x in checkpoint[part].items() if isinstance(x, Tensor)}
    try:
        dcp.save(tensors, checkpoint_id=folder)
    except CheckpointException as error:  # not an Exception to Python, and what all processes met in one
        raise OSError(f"{folder}: {next(iter(error.failures.values()))[0]}") from error
    return rest


def _write(path: Path, checkpoint: Checkpoint) -> None:
    try:
        with open(path, "wb") as file:  # given a path, torch turns a full disk into a RuntimeError
            torch.save(checkpoint, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # after a write that failed, torch cannot end its archive either
            raise error.__context__ from None
        raise


def load_checkpoint(path: str | Path, flag: str = "--resume") -> Checkpoint:
    """Read a checkpoint, or the `last.pt` of a run's folder, whole, onto the CPU. Errors speak of `flag`."""
    path = existing_checkpoint(path, flag)
    try:
        if not zipfile.is_zipfile(path):  # torch would take it for a format of its own that is older than this library
            raise ValueError("not a zip archive")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(checkpoint, dict) and "shards" in checkpoint:
            _read_shards(path.parent / SHARDS / Path(checkpoint.pop("shards")).name, checkpoint)
    except (Exception, CheckpointException) as error:  # pickle, zip and torch each have their own word for a damaged file
        raise UserError(f"{flag}: {path} is damaged, or no checkpoint of vix train ({type(error).__name__})") from error
    if (
        not isinstance(checkpoint, dict)
        or not all(isinstance(checkpoint.get(name), kind) for name, kind in _PARTS.items())
        or not all(map(_is_row, checkpoint["history"]))
    ):
        raise UserError(f"{flag}: {path} is no checkpoint of vix train")
    return checkpoint


def _is_row(row: Any) -> bool:
    """Of a history."""
    if not isinstance(row, dict) or not row.keys() >= {"epoch", "eval_top1", "eval_loss", "seconds"}:
        return False
    return all(isinstance(name, str) and isinstance(value, (int, float)) for name, value in row.items())


def checkpoint_path(path: str | Path) -> Path:
    path = Path(path)
    return path / "last.pt" if path.is_dir() else path


def existing_checkpoint(path: str | Path, flag: str = "--resume") -> Path:
    """Raises `UserError` where there is none."""
    path = checkpoint_path(path)
    if not path.is_file():
        raise UserError(f"{flag}: no checkpoint at {path}")
    return path


def _read_shards(folder: Path, checkpoint: Checkpoint) -> None:
    """Put the tensors of `folder` into the parts of `checkpoint` that they were taken from."""
    reader = _Reader(folder)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)  # torch unpickles anything else without a check
    }
    with warnings.catch_warnings():  # that this process reads alone
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    for place, value in tensors.items():
        part, _, name = place.partition("/")
        checkpoint[part][name] = value


class _Reader(dcp.FileSystemReader):
    """The original unpickles whatever it finds."""

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        metadata = Unpickler((Path(self.path) / ".metadata").read_bytes(), _METADATA).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


_METADATA = {
    *((Metadata.__module__, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((Metadata.__module__, name) for name in ("TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata")),
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    ("torch", "Size"), ("torch.serialization", "_get_layout"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
}  # fmt: skip
