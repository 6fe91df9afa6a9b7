"""Data sets held in memory as tensors: a reader a file. A new format is a file here and a line in `load_dataset`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..config import UserError
from .cifar import cifar, find_cifar
from .dataset import Dataset, pixel_statistics
from .digits import digits
from .folders import folders, is_folder
from .idx import idx, is_idx
from .pack import pack

__all__ = ["DATASETS", "Dataset", "load_dataset", "pixel_statistics"]

DATASETS: dict[str, Callable[[], Dataset]] = {"digits": digits}
FORMATS = "a pack (.npz) or a folder with CIFAR (python or binary), idx files (MNIST), or train/ and val/ of images"


def load_dataset(name: str, img_size: int | None = None) -> Dataset:
    """The data set of this name, or the one at this path.

    Args:
        name: of DATASETS, or a path to what FORMATS says.
        img_size: side in pixels that images in folders are resized to; None leaves them.

    Raises:
        UserError: it is not there, damaged, or of another format.
    """
    path = Path(name)
    if name not in DATASETS and path.suffix != ".npz" and not path.is_dir():
        raise UserError(f"--dataset: expected {', '.join(DATASETS)} or the path of {FORMATS}, got {name!r}")
    try:
        if name in DATASETS:
            return DATASETS[name]()
        if path.is_file() or path.suffix == ".npz":
            return pack(path)
        if found := find_cifar(path):
            return cifar(found)
        if is_idx(path):
            return idx(path)
        if is_folder(path):
            return folders(path, img_size)
    except ModuleNotFoundError as error:
        raise UserError(f"--dataset: {name} needs {error.name}: pip install 'vix_kernels[train]'") from error
    except Exception as error:  # whatever a missing, truncated or foreign file makes its reader raise
        raise UserError(f"--dataset: cannot read {name}, it is missing, damaged or no data set: {error!r}") from error
    raise UserError(f"--dataset: {name} holds nothing that is known; expected {FORMATS}")
