"""Labeled images, either in memory or decoded on demand."""

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
import torch.nn.functional as F
from torch import Tensor

from ..config import UserError
from ..draws import sent

if TYPE_CHECKING:
    from PIL import Image

MOST_UNREADABLE = 0.01  # maximum fraction of unreadable images; above it, the dataset is assumed to be damaged


class Images(Protocol):
    """uint8 images that all have the same `shape` (channels, height, width), and their int64 `labels` (n,)."""

    labels: Tensor
    shape: tuple[int, int, int]
    unreadable: Set[str]  # files found so far that cannot be decoded, each with the reason

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> Images: ...

    def batches(self, order: Sequence[Tensor], *, replace_unreadable: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a batch of images and labels for each tensor of indices in `order`.

        By default, an image that cannot be decoded is skipped. With `replace_unreadable`, it is replaced by the next image in
        the dataset that can be decoded.
        """
        ...


@dataclass(frozen=True)
class HeldImages:
    """Images in memory, in one tensor (n, channels, height, width). `to` moves them to the training device.

    Attributes:
        size: (height, width) to which each batch is resized. If None, the images keep their size.
        max_value: resized pixels are clamped to [0, max_value].
    """

    images: Tensor
    labels: Tensor
    size: tuple[int, int] | None = None
    max_value: int = 255
    unreadable = frozenset()  # the readers have already skipped files that cannot be decoded

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.images.shape[1], *(self.size or self.images.shape[2:])

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> HeldImages:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def batches(self, order: Sequence[Tensor], *, replace_unreadable: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        for index in order:
            index = sent(index, self.labels.device)
            images = self.images[index]
            yield resized(images, self.size, self.max_value) if self.size else images, self.labels[index]


@dataclass(frozen=True)
class StreamedImages:
    """Image files that worker processes decode on demand."""

    files: tuple[Path, ...]
    labels: Tensor
    size: tuple[int, int]  # height and width
    workers: int
    device: torch.device = torch.device("cpu")
    unreadable: set[str] = field(default_factory=set)  # grows while batches are read

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
    """Decodes images. An item is a tuple (pixels, index of the decoded image, files that could not be decoded).

    If `replace_unreadable` is set, an image that cannot be decoded is replaced by the next one that can. The pixels are None if
    no image could be decoded.
    """

    images: StreamedImages
    replace_unreadable: bool

    def __getitem__(self, index: int) -> tuple[np.ndarray | None, int, list[str]]:
        unreadable = []
        for i in (*range(index, len(self.images)), *range(index)):
            path = self.images.files[i]
            pixels = decode(path, self.images.size)
            if not isinstance(pixels, Exception):
                return pixels, i, unreadable
            unreadable.append(with_reason(path, pixels))
            if not self.replace_unreadable:
                break
        return None, index, unreadable


def _ignore_signals(worker: int) -> None:
    """Ignore SIGINT and SIGTERM in a worker, because they may be sent to the whole process group.

    The main process handles them: it saves the training state and then stops the workers.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _stack(items: list[tuple[np.ndarray | None, int, list[str]]]) -> tuple[Tensor, Tensor, list[str]]:
    kept = [(pixels, index) for pixels, index, _ in items if pixels is not None]
    images = torch.from_numpy(np.stack([pixels for pixels, _ in kept])) if kept else torch.empty(0)
    return images, torch.tensor([index for _, index in kept], dtype=torch.long), [name for *_, names in items for name in names]


def resized(images: Tensor, size: tuple[int, int], max_value: int) -> Tensor:
    """Resize uint8 images (batch, channels, height, width) to `size`, after a center crop to the same aspect ratio."""
    height, width = images.shape[2:]
    scale = min(height / size[0], width / size[1])
    rows, columns = (max(1, round(scale * side)) for side in size)
    top, left = (height - rows) // 2, (width - columns) // 2
    cropped = images[:, :, top : top + rows, left : left + columns].float()
    return F.interpolate(cropped, size, mode="bicubic", antialias=True).round().clamp(0, max_value).byte()


def hidden() -> bool | None:
    """Return the `disable` argument for tqdm: None to show the bar on a terminal, or True to hide it on ranks other than 0."""
    return True if int(os.environ.get("RANK", 0)) else None


def decode(path: Path, size: tuple[int, int] | None) -> np.ndarray | Exception:
    """Decode an image to RGB (3, height, width), uint8. If that fails, return the exception instead.

    Args:
        path: the image file.
        size: (height, width) to which the image is resized, after a center crop to the same aspect ratio. If None, the image
            keeps its size.
    """
    from PIL import Image, ImageOps

    try:
        check_regular(path)
        with Image.open(path) as file:  # Image.open raises an error only above twice MAX_IMAGE_PIXELS
            if Image.MAX_IMAGE_PIXELS and file.width * file.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(
                    f"expected at most {Image.MAX_IMAGE_PIXELS:,} pixels, got {file.width} x {file.height}"
                )
            if size:
                # Decode a JPEG at a reduced resolution of at least twice `size`, which is faster.
                file.draft("RGB", (2 * size[1], 2 * size[0]))
            image = _rgb(ImageOps.exif_transpose(file), file.format)
        if size:
            image = ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)
        return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:  # the type depends on the image format: OSError, SyntaxError, ValueError, ...
        return error


def with_reason(path: Path, error: Exception) -> str:
    """Return a line that names a file and the reason why it cannot be decoded."""
    return f"{path}: {str(error) or repr(error)}"


def check_regular(path: Path) -> None:
    """Raise `OSError` if `path` is not a regular file. Opening a FIFO would block."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a FIFO" if stat.S_ISFIFO(mode) else "a device or a socket"
        link = f" through a symbolic link to {path.resolve()}" if path.is_symlink() else ""
        raise OSError(f"expected a regular file, got {kind}{link}")


def _rgb(image: Image.Image, format: str | None) -> Image.Image:
    """Convert an image to RGB with 8 bits per channel. Pillow's conversion would clip 16-bit and 32-bit pixels at 255."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and format in ("PNG", "PPM")):  # values from 0 to 65535
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # the high byte, which Pillow uses for 16-bit RGB
    elif image.mode in ("I", "F"):
        kind = "integers" if image.mode == "I" else "floats"
        raise ValueError(f"expected pixels of 8 or 16 bits, got 32-bit {kind} (mode {image.mode}), whose range is unknown")
    return image.convert("RGB")
