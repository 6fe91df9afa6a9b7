"""Read packs, which are .npz files that contain JPEG images of one size."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from .dataset import Dataset, Source, check_labels, integer_labels, make_dataset, suited_patch_size
from .images import HeldImages, check_regular, hidden


def pack(path: Path) -> Source:
    """Open a pack. Its JPEG images all have the same size and are decoded to RGB.

    The JPEG file of image i is `headers[header_offsets[h] : header_offsets[h + 1]] + scans[offsets[i] : offsets[i + 1]]`, with
    `h = header_id[i]`. Images share headers, because the header of a small image can be larger than its data. `labels[i]` is an
    index into `classes`. `split[i]` is 0 for a training image and 1 for a test image.
    """
    check_regular(path)
    with np.load(path) as file:
        names = ("headers", "header_offsets", "header_id", "scans", "offsets", "labels", "split", "classes")
        arrays = {name: file[name] for name in names}
    labels, split = (integer_labels(arrays[name]) for name in ("labels", "split"))
    classes = tuple(map(str, arrays["classes"]))
    if not len(labels) == len(split) == len(arrays["header_id"]) == len(arrays["offsets"]) - 1:
        raise ValueError("labels, split, header_id and offsets: expected the same number of images in each")
    train, test = split == 0, split == 1
    if not (train.any() and test.any() and (train | test).all()):
        raise ValueError(f"split: expected the values 0 and 1, got {split.unique().tolist()}")
    check_labels(classes, labels[train], labels[test])
    (first,) = _decoded(arrays, 1)
    shape = (3, *first.shape[:2])

    def load() -> Dataset:
        images = np.empty((len(labels), *shape), np.uint8)
        progress = tqdm(_decoded(arrays, len(labels)), "decoding", len(labels), unit="image", leave=False, disable=hidden())
        for i, pixels in enumerate(progress):
            if pixels.shape != first.shape:
                raise ValueError(f"image {i}: expected the shape of image 0, {first.shape[:2]}, got {pixels.shape[:2]}")
            images[i] = pixels.transpose(2, 0, 1)
        tensor = torch.from_numpy(images)
        return make_dataset(path.stem, classes, *(HeldImages(tensor[part], labels[part]) for part in (train, test)))

    return Source(path.stem, classes, shape, int(train.sum()), {"patch_size": suited_patch_size(shape)}, load)


def _decoded(arrays: dict[str, np.ndarray], count: int) -> Iterator[np.ndarray]:
    """Yield the first `count` images of a pack, uint8 (height, width, 3)."""
    from PIL import Image

    headers, scans = arrays["headers"], arrays["scans"]
    header_offsets, offsets = arrays["header_offsets"].tolist(), arrays["offsets"].tolist()
    for i, h in enumerate(arrays["header_id"].tolist()[:count]):
        header, scan = headers[header_offsets[h] : header_offsets[h + 1]], scans[offsets[i] : offsets[i + 1]]
        try:
            yield np.asarray(Image.open(BytesIO(header.tobytes() + scan.tobytes()), formats=["JPEG"]).convert("RGB"))
        except (OSError, Image.DecompressionBombError) as error:
            raise ValueError(f"image {i}: expected a complete JPEG image") from error
