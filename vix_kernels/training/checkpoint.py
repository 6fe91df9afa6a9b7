"""Checkpoints of a run.

A crash cannot damage a checkpoint. Loading a checkpoint executes no code from it. A run can be resumed with a different
number of processes.

Without FSDP2, a checkpoint is one file. With FSDP2, each process writes its shards of the tensors to a common folder with
torch.distributed.checkpoint. The file that is written last contains the rest of the checkpoint and the name of this folder.
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
    """Replace the checkpoint at `path` atomically. All processes in `ranks` must call this function.

    A reader finds either the old or the new checkpoint. With `sharded`, each process writes its shards of the tensors.
    """
    if sharded:
        shards = path.parent / SHARDS / f"{path.stem}-{ranks.largest(time.time_ns())}"
    try:
        if sharded:
            checkpoint = _write_shards(shards, checkpoint) | {"shards": shards.name}
        if ranks.first:
            write_atomically(path, lambda temporary: write(temporary, checkpoint))
    except OSError:
        if sharded and ranks.first:  # shards without a checkpoint file are useless and fill the disk
            shutil.rmtree(shards, ignore_errors=True)
        raise
    if sharded and ranks.first:
        _remove_shards(path, keep=shards)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of runs that were killed while writing to `folder`."""
    for file in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.(pt|csv|yaml|png|json|safetensors)\.\d+\.tmp", file.name):
            file.unlink()


def remove_checkpoint(path: Path) -> None:
    path.unlink(missing_ok=True)
    _remove_shards(path)


def _remove_shards(path: Path, keep: Path | None = None) -> None:
    for folder in (path.parent / SHARDS).glob(f"{path.stem}-*"):
        if folder != keep:
            shutil.rmtree(folder)


def _write_shards(folder: Path, checkpoint: Checkpoint) -> Checkpoint:
    """Write this process's shards of the tensors to `folder`, and return the checkpoint without tensors."""
    tensors, rest = {}, dict(checkpoint)
    for part in _PARTS_WITH_TENSORS:
        rest[part] = {name: x for name, x in checkpoint[part].items() if not isinstance(x, Tensor)}
        tensors |= {f"{part}/{name}": x for name, x in checkpoint[part].items() if isinstance(x, Tensor)}
    try:
        dcp.save(tensors, checkpoint_id=folder)
    except CheckpointException as error:  # a BaseException that collects the errors of all processes
        raise OSError(f"{folder}: {next(iter(error.failures.values()))[0]}") from error
    return rest


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Save `checkpoint` to `path` with `torch.save`.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        with open(path, "wb") as file:  # if torch.save gets a path, it raises RuntimeError when the disk is full
            torch.save(checkpoint, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # a write failed, and closing the archive then raised `error`
            raise error.__context__ from None
        raise


def load_checkpoint(path: str | Path, flag: str = "--resume") -> Checkpoint:
    """Load a checkpoint with all its shards onto the CPU. If `path` is a run folder, load its `last.pt`.

    Error messages start with `flag`.

    Raises:
        UserError: there is no checkpoint at `path`, or it is damaged.
    """
    path = existing_checkpoint(path, flag)
    try:
        if not zipfile.is_zipfile(path):  # otherwise, torch tries its legacy format, which this library never writes
            raise ValueError("not a zip archive")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(checkpoint, dict) and "shards" in checkpoint:
            _read_shards(path.parent / SHARDS / Path(checkpoint.pop("shards")).name, checkpoint)
    except (Exception, CheckpointException) as error:  # pickle, zip and torch raise different errors for a damaged file
        raise UserError(f"{flag}: {path} is damaged or not a checkpoint of vix train ({type(error).__name__})") from error
    if (
        not isinstance(checkpoint, dict)
        or not all(isinstance(checkpoint.get(name), kind) for name, kind in _PARTS.items())
        or not all(map(_is_row, checkpoint["history"]))
    ):
        raise UserError(f"{flag}: {path} is not a checkpoint of vix train")
    return checkpoint


def _is_row(row: Any) -> bool:
    """Return whether `row` is a valid row of a history."""
    if not isinstance(row, dict) or not row.keys() >= {"epoch", "eval_top1", "eval_loss", "seconds"}:
        return False
    return all(isinstance(name, str) and isinstance(value, (int, float)) for name, value in row.items())


def checkpoint_path(path: str | Path) -> Path:
    path = Path(path)
    return path / "last.pt" if path.is_dir() else path


def existing_checkpoint(path: str | Path, flag: str = "--resume") -> Path:
    """Return `path`, or last.pt in it if it is a folder. If the file is missing, raise a `UserError` that names `flag`."""
    path = checkpoint_path(path)
    if not path.is_file():
        raise UserError(f"{flag}: no checkpoint at {path}")
    return path


def _read_shards(folder: Path, checkpoint: Checkpoint) -> None:
    """Load the tensors in `folder` into the dicts "model", "optimizer" and "ema" of `checkpoint`."""
    reader = _Reader(folder)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)  # torch would unpickle other entries without any restriction
    }
    with warnings.catch_warnings():  # torch warns that a single process loads the checkpoint
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    for key, value in tensors.items():
        part, _, name = key.partition("/")
        checkpoint[part][name] = value


class _Reader(dcp.FileSystemReader):
    """A FileSystemReader that unpickles only the types that occur in the metadata of a checkpoint."""

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
