"""Data sets: a reader a file. A new format is a file here and a line in `load_dataset`."""

from __future__ import annotations

from pathlib import Path

from ..config import UserError
from .cifar import cifar, find_cifar
from .dataset import Dataset, pixel_statistics
from .digits import digits
from .download import SOURCES, fetched
from .folders import folders, is_folder
from .idx import idx, is_idx
from .images import HeldImages, Images
from .pack import pack

__all__ = ["NAMES", "Dataset", "HeldImages", "Images", "load_dataset", "pixel_statistics"]

NAMES = ("digits", *SOURCES)
FORMATS = "a pack (.npz) or a folder with CIFAR (python or binary), idx files (MNIST), or train/ and val/ of images"


def load_dataset(
    name: str, img_size: int | None = None, *, data_dir: str | None = None, stream: bool | None = None, workers: int = 4
) -> Dataset:
    """The data set of this name, or the one at this path.

    Args:
        name: of NAMES, or a path to what FORMATS says.
        img_size: side in pixels that images in folders are resized to; None leaves them.
        data_dir: where data sets lie that have a name, and are downloaded to; None for the user's cache.
        stream: read images in folders when they are needed, by `workers` processes; None: if they are too many to hold.

    Raises:
        UserError: it is not there, damaged, or of another format.
    """
    data = _loaded(name, img_size, data_dir, stream, workers)
    if img_size and data.train.shape[1:] != (img_size, img_size):
        height, width = data.train.shape[1:]
        raise UserError(
            f"--img-size: {data.name} has {width} x {height} pixels; only images in folders are resized, got {img_size}"
        )
    if stream and isinstance(data.train, HeldImages):
        raise UserError(f"--stream: {data.name} is read into memory; only images in folders are streamed")
    return data


def _loaded(name: str, img_size: int | None, data_dir: str | None, stream: bool | None, workers: int) -> Dataset:
    path = Path(name)
    if name not in NAMES and path.suffix != ".npz" and not path.is_dir():
        raise UserError(f"--dataset: expected {', '.join(NAMES)} or the path of {FORMATS}, got {name!r}")
    try:
        if name == "digits":
            return digits()
        if name in SOURCES:
            path = fetched(name, data_dir)
        if path.is_file() or path.suffix == ".npz":
            return pack(path)
        if found := find_cifar(path):
            return cifar(found)
        if is_idx(path):
            return idx(path)
        if is_folder(path):
            return folders(path, img_size, stream, workers)
    except ModuleNotFoundError as error:
        raise UserError(f"--dataset: {name} needs {error.name}: pip install 'vix_kernels[train]'") from error
    except UserError:
        raise
    except Exception as error:  # whatever a missing, truncated or foreign file makes its reader raise
        raise UserError(f"--dataset: cannot read {name}, it is missing, damaged or no data set: {error!r}") from error
    raise UserError(f"--dataset: {name} holds nothing that is known; expected {FORMATS}")
