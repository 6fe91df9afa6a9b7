"""Data sets: a reader a file. A new format is a file here and a line in `load_dataset`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import UserError
from .cifar import cifar, find_cifar
from .dataset import Dataset, Source, pixel_statistics
from .digits import digits
from .download import SOURCES, fetched
from .folders import folders, is_folder
from .idx import idx, is_idx
from .images import HeldImages, Images
from .pack import pack

__all__ = ["NAMES", "Dataset", "HeldImages", "Images", "Source", "load_dataset", "open_dataset", "pixel_statistics"]

NAMES = ("digits", *SOURCES)
FORMATS = "a pack (.npz) or a folder with CIFAR (python or binary), idx files (MNIST), or train/ and val/ of images"


Size = int | tuple[int, int]


def load_dataset(name: str, img_size: Size | None = None, **options: Any) -> Dataset:
    """The data set of this name, or the one at this path, decoded: see `open_dataset`."""
    return open_dataset(name, img_size, **options).load()


def open_dataset(
    name: str, img_size: Size | None = None, *, data_dir: str | None = None, stream: bool | None = None, workers: int = 4
) -> Source:
    """The data set of this name, or the one at this path, before its images are decoded.

    Args:
        name: of NAMES, or a path to what FORMATS says.
        img_size: height and width in pixels that images in folders are resized to, or the side of a square; None leaves them.
        data_dir: where data sets that have a name are stored, and downloaded to; None for the user's cache.
        stream: read images in folders when they are needed, by `workers` processes; None: if they are too many to hold.

    Raises:
        UserError: it is missing, damaged, or of another format. `Source.load` raises it too.
    """
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    with _reading(name):
        source = _opened(name, size, data_dir, stream, workers)
    if size and source.shape[1:] != size:
        height, width = source.shape[1:]
        raise UserError(
            f"--img-size: {source.name} has {width} x {height} pixels; only images in folders are resized, got {img_size}"
        )
    if stream and not source.streams:
        raise UserError(f"--stream: {source.name} is read into memory; only images in folders are streamed")

    def load() -> Dataset:
        with _reading(name):
            return source.load()

    return replace(source, load=load)


def _opened(name: str, size: tuple[int, int] | None, data_dir: str | None, stream: bool | None, workers: int) -> Source:
    path = Path(name)
    if name not in NAMES and path.suffix != ".npz" and not path.is_dir():
        raise UserError(f"--dataset: expected {', '.join(NAMES)} or the path of {FORMATS}, got {name!r}")
    if name == "digits":
        return digits().source()
    if name in SOURCES:
        path = fetched(name, data_dir)
    if path.is_file() or path.suffix == ".npz":
        return pack(path)
    if found := find_cifar(path):
        return cifar(found).source()
    if is_idx(path):
        return idx(path).source()
    if is_folder(path):
        return folders(path, size, stream, workers)
    raise UserError(f"--dataset: {name} holds nothing that is known; expected {FORMATS}")


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Raise `UserError` for whatever a missing, truncated or foreign file makes its reader raise."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"--dataset: {name} needs {error.name}: pip install 'vix_kernels[train]'") from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--dataset: cannot read {name}, it is missing, damaged or no data set: {error!r}") from error
