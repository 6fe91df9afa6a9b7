"""Labelled images, held in memory or read when they are needed."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from ..config import UserError
from ..draws import sent

if TYPE_CHECKING:
    from PIL import Image

MOST_UNREADABLE = 0.01  # of all images; more is a damaged copy, not a few bad files


class Images(Protocol):
    """uint8 images of one `shape` (channels, height, width), and their int64 `labels` (n,)."""

    labels: Tensor
    shape: tuple[int, int, int]
    unreadable: Set[str]  # files that could not be decoded so far, each with the reason

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> Images: ...

    def batches(self, order: Sequence[Tensor], *, replace_unreadable: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """The images at the places that each item of `order` lists, and their labels.

        An image that cannot be decoded is skipped, or with `replace_unreadable` replaced by the next one.
        """
        ...


@dataclass(frozen=True)
class HeldImages:
    """All in one tensor (n, channels, height, width), on the device that computes."""

    images: Tensor
    labels: Tensor
    unreadable = frozenset()  # `folders` skips them

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.images.shape[1:])

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> HeldImages:
        return HeldImages(self.images.to(device), self.labels.to(device))

    def batches(self, order: Sequence[Tensor], *, replace_unreadable: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        for index in order:
            index = sent(index, self.labels.device)
            yield self.images[index], self.labels[index]


@dataclass(frozen=True)
class StreamedImages:
    """Files that worker processes decode when they are needed."""

    files: tuple[Path, ...]
    labels: Tensor
    size: tuple[int, int]  # height and width
    workers: int
    device: torch.device = torch.device("cpu")
    unreadable: set[str] = field(default_factory=set)  # as far as they have been met

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, *self.size

    def __len__(self) -> int:
        return len(self.files)

    def to(self, device: torch.device) -> StreamedImages:
        return replace(self, device=device)

    def batches(self, order: Sequence[Tensor], *, replace_unreadable: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        from torch.utils.data import DataLoader

        loader = DataLoader(
            _Decoder(self, replace_unreadable),
            batch_sampler=[index.tolist() for index in order],
            num_workers=self.workers,
            collate_fn=_stack,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_ignore_signals,
        )
        for images, index, unreadable in loader:
            self.unreadable.update(unreadable)
            if len(self.unreadable) > max(1, MOST_UNREADABLE * len(self)):
                example = min(self.unreadable)
                raise UserError(f"--dataset: {len(self.unreadable)} of {len(self)} images cannot be decoded, such as {example}")
            if len(index):
                yield images.to(self.device, non_blocking=True), self.labels[index].to(self.device, non_blocking=True)


@dataclass(frozen=True)
class _Decoder(torch.utils.data.Dataset):
    images: StreamedImages
    replace_unreadable: bool

    def __getitem__(self, index: int) -> tuple[np.ndarray | None, int, list[str]]:
        unreadable = []
        for at in (*range(index, len(self.images)), *range(index)):
            path = self.images.files[at]
            pixels = decode(path, self.images.size)
            if not isinstance(pixels, Exception):
                return pixels, at, unreadable
            unreadable.append(with_reason(path, pixels))
            if not self.replace_unreadable:
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


def decode(path: Path, size: tuple[int, int] | None) -> np.ndarray | Exception:
    """RGB (3, height, width), or why it cannot be read.

    Args:
        size: height and width to resize to, after cutting what is too long or too wide; None keeps the size of the file.
    """
    from PIL import Image, ImageOps

    try:
        check_regular(path)
        with Image.open(path) as file:  # raises for more than twice the limit of pixels, only warns below
            if Image.MAX_IMAGE_PIXELS and file.width * file.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(
                    f"expected at most {Image.MAX_IMAGE_PIXELS:,} pixels, got {file.width} x {file.height}"
                )
            if size:
                file.draft("RGB", (2 * size[1], 2 * size[0]))  # JPEG alone: decodes no finer than is needed
            image = _rgb(ImageOps.exif_transpose(file), file.format)
        if size:
            image = ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)
        return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:  # Pillow has a kind of its own for every format: OSError, SyntaxError, ValueError, ...
        return error


def with_reason(path: Path, error: Exception) -> str:
    """A file and why it cannot be decoded."""
    return f"{path}: {str(error) or repr(error)}"


def check_regular(path: Path) -> None:
    """Refuse what `open` would wait for, such as a FIFO."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a FIFO" if stat.S_ISFIFO(mode) else "a device or a socket"
        link = f" through a symbolic link to {path.resolve()}" if path.is_symlink() else ""
        raise OSError(f"expected a regular file, got {kind}{link}")


def _rgb(image: Image.Image, format: str | None) -> Image.Image:
    """In 8 bits a channel. Pillow's own conversion clips pixels of 16 and 32 bits to 255."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and format in ("PNG", "PPM")):  # both from 0 to 65535
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # the high byte, as Pillow reads 16-bit colours
    elif image.mode in ("I", "F"):
        kind = "integers" if image.mode == "I" else "floats"
        raise ValueError(f"expected pixels of 8 or 16 bits, got 32-bit {kind} (mode {image.mode}), whose range is unknown")
    return image.convert("RGB")
