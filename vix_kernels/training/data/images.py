"""Labelled images, held in memory or read when they are needed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..config import UserError
from ..draws import CROPS, sent

Place = tuple[int, ...] | None
MOST_UNREADABLE = 0.01  # of all images; more is a damaged copy, not a few bad files


class Images(Protocol):
    """uint8 images of one `shape` (channels, height, width), and their int64 `labels` (n,)."""

    labels: Tensor
    shape: tuple[int, int, int]
    unreadable: Set[str]  # files that could not be decoded so far

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> Images: ...

    def batches(self, order: Sequence[Tensor], place: Place = None, crop: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """The images at the places that each item of `order` lists, and their labels.

        To train with if there is a `place`, which decides what is drawn for them; `crop` allows to cut them at random.
        """
        ...


@dataclass(frozen=True)
class HeldImages:
    """All in one tensor (n, channels, height, width), on the device that computes."""

    images: Tensor
    labels: Tensor
    unreadable = frozenset()  # `folders` leaves them out

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.images.shape[1:])

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> HeldImages:
        return HeldImages(self.images.to(device), self.labels.to(device))

    def batches(self, order: Sequence[Tensor], place: Place = None, crop: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        for index in order:
            index = sent(index, self.labels.device)
            yield self.images[index], self.labels[index]


@dataclass(frozen=True)
class StreamedImages:
    """Files that worker processes decode, cut at random (arXiv:1409.4842) or as `decode` does.

    A damaged file is left out of its batch; to train with, the next file takes its place.
    """

    files: tuple[Path, ...]
    labels: Tensor
    img_size: int
    workers: int
    device: torch.device = torch.device("cpu")
    unreadable: set[str] = field(default_factory=set)  # as far as they have been met

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, self.img_size, self.img_size

    def __len__(self) -> int:
        return len(self.files)

    def to(self, device: torch.device) -> StreamedImages:
        return replace(self, device=device)

    def batches(self, order: Sequence[Tensor], place: Place = None, crop: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        from torch.utils.data import DataLoader

        loader = DataLoader(
            _Decoder(self, place, crop),
            batch_sampler=[index.tolist() for index in order],
            num_workers=self.workers,
            collate_fn=_stack,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_ignore_signals,
        )
        for images, index, unreadable in loader:
            self.unreadable.update(unreadable)
            if len(self.unreadable) > max(1, MOST_UNREADABLE * len(self)):
                names = ", ".join(sorted(self.unreadable)[:3])
                raise UserError(f"--dataset: {len(self.unreadable)} of {len(self)} images cannot be decoded, such as {names}")
            if len(index):
                yield images.to(self.device, non_blocking=True), self.labels[index].to(self.device, non_blocking=True)


@dataclass(frozen=True)
class _Decoder(torch.utils.data.Dataset):
    images: StreamedImages
    place: Place
    crop: bool

    def __getitem__(self, index: int) -> tuple[np.ndarray | None, int, list[str]]:
        unreadable = []
        for at in (*range(index, len(self.images)), *range(index)):
            path = self.images.files[at]
            draws = np.random.default_rng((CROPS, *self.place, at)) if self.crop else None
            pixels = decode(path, self.images.img_size, draws)
            if not isinstance(pixels, Exception):
                return pixels, at, unreadable
            unreadable.append(str(path))
            if self.place is None:
                break
        return None, index, unreadable


def _ignore_signals(worker: int) -> None:
    """A signal to the whole group is for the loop, which ends the workers when it has saved its state."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _stack(items: list[tuple[np.ndarray | None, int, list[str]]]) -> tuple[Tensor, Tensor, list[str]]:
    kept = [(pixels, at) for pixels, at, _ in items if pixels is not None]
    images = torch.from_numpy(np.stack([pixels for pixels, _ in kept])) if kept else torch.empty(0)
    return images, torch.tensor([at for _, at in kept], dtype=torch.long), [name for *_, names in items for name in names]


def hidden() -> bool | None:
    """Whether to hide a progress bar, as tqdm asks: of several processes one shows it, on a terminal."""
    return True if int(os.environ.get("RANK", 0)) else None


def decode(
    path: Path, img_size: int | tuple[int, int] | None, draws: np.random.Generator | None = None
) -> np.ndarray | Exception:
    """RGB (3, height, width), or why it cannot be read.

    Args:
        img_size: height and width to resize to, or the side of a square; None leaves the size.
        draws: cut a random part of 35 to 100 per cent of the area first, up to a third longer than wide. None: the middle.
    """
    from PIL import Image, ImageOps

    size = (img_size, img_size) if isinstance(img_size, int) else img_size and img_size[::-1]  # width first
    try:
        with Image.open(path) as file:
            if size:
                file.draft("RGB", (2 * size[0], 2 * size[1]))  # JPEG alone: decodes no finer than is needed
            image = ImageOps.exif_transpose(file).convert("RGB")
        if size and draws is not None:
            image = image.resize(size, Image.Resampling.BICUBIC, _random_part(image.size, draws))
        elif size:
            image = ImageOps.fit(image, size, Image.Resampling.BICUBIC)
        return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:  # Pillow has a kind of its own for every format: OSError, SyntaxError, ValueError, ...
        return error


def _random_part(size: tuple[int, int], draws: np.random.Generator) -> tuple[float, float, float, float]:
    """Left, top, right and bottom."""
    area, aspect = draws.uniform(0.35, 1) * size[0] * size[1], np.exp(draws.uniform(-1, 1) * np.log(4 / 3))
    width, height = min(size[0], (area * aspect) ** 0.5), min(size[1], (area / aspect) ** 0.5)
    left, top = draws.uniform(0, size[0] - width), draws.uniform(0, size[1] - height)
    return left, top, left + width, top + height
