"""Datasets. Each format has one module in this folder. To add a format, add a module and call its reader in `_opened`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from vix_kernels.models.arguments import pair

from ..config import UserError
from .cifar import cifar, find_cifar
from .dataset import Dataset, Source, pixel_statistics, suited_patch_size
from .digits import digits
from .download import SOURCES, fetched
from .folders import folders, is_folder
from .idx import idx, is_idx
from .images import HeldImages, Images
from .pack import pack

__all__ = ["NAMES", "Dataset", "HeldImages", "Images", "Source", "load_dataset", "open_dataset", "pixel_statistics"]

NAMES = ("digits", *SOURCES)
FORMATS = "a pack (.npz) or a folder with CIFAR files (Python or binary), idx files (MNIST), or images in train/ and val/"


Size = int | tuple[int, int]


def load_dataset(name: str, img_size: Size | None = None, **options: Any) -> Dataset:
    """Open a dataset with `open_dataset`, and load its images."""
    return open_dataset(name, img_size, **options).load()


def open_dataset(
    name: str, img_size: Size | None = None, *, data_dir: str | None = None, stream: bool | None = None, workers: int = 4
) -> Source:
    """Open a dataset by its name or path.

    `Source.load` decodes the images in packs (.npz files) and folders, except streamed images, which are decoded on demand.

    Args:
        name: a name from NAMES, or the path of a pack or folder in one of FORMATS.
        img_size: (height, width) in pixels to which the images are resized and cropped. An integer means a square. If None, the
            images keep their size.
        data_dir: the folder that contains named datasets, and to which they are downloaded. If None, a folder in the
            user's cache is used.
        stream: whether to decode images in folders on demand instead of in advance. If None, they are decoded on demand if
            they would take more than 4 GiB of memory.
        workers: the number of processes that decode streamed images. If 0, this process decodes them.

    Raises:
        UserError: if the dataset is missing, damaged, or in an unknown format, or if it does not support `stream`.
            `Source.load` also raises this error.
        ValueError: if `img_size` is not a positive integer or a pair of positive integers.
    """
    size = None if img_size is None else pair("img_size", img_size)
    with _reading(name):
        source = _opened(name, size, data_dir, stream, workers)
    if stream and not source.streams:
        raise UserError(f"--stream: {source.name} is read into memory; only images in folders are streamed")

    shape = (source.shape[0], *(size or source.shape[1:]))
    if shape != source.shape:
        source = replace(source, shape=shape, model_kwargs={"patch_size": suited_patch_size(shape)})

    def load() -> Dataset:
        with _reading(name):
            dataset = source.load()
            if size in (None, dataset.train.shape[1:]):
                return dataset
            return replace(_resized(dataset, size), model_kwargs=source.model_kwargs)

    return replace(source, load=load)


def _opened(name: str, size: tuple[int, int] | None, data_dir: str | None, stream: bool | None, workers: int) -> Source:
    path = Path(name)
    if name not in NAMES and path.suffix != ".npz" and not path.is_dir():
        raise UserError(f"--dataset: expected {', '.join(NAMES)} or a path to {FORMATS}, got {name!r}")
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
    raise UserError(f"--dataset: unknown format of {name}; expected {FORMATS}")


def _resized(dataset: Dataset, size: tuple[int, int]) -> Dataset:
    """Return a copy of `dataset` whose batches are resized to `size`. The mean and std of the original images are kept."""
    train, test = (replace(part, size=size, max_value=dataset.max_value) for part in (dataset.train, dataset.test))
    return replace(dataset, train=train, test=test)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Convert all exceptions to `UserError`. A reader may raise any exception for a damaged file or an unknown format."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"--dataset: {name} needs {error.name}: pip install 'vix_kernels[train]'") from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--dataset: cannot read {name}, which is missing, damaged or not a dataset: {error!r}") from error
