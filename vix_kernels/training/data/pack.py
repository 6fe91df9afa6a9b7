"""Packs: JPEG images in one file."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .dataset import Dataset, integer_labels, make_dataset
from .images import HeldImages, hidden


def pack(path: str | Path) -> Dataset:
    """JPEG images of one size, decoded to RGB, from one .npz file; those of split 0 train, those of split 1 are held out.

    Image i is the JPEG file `headers[header_offsets[h] : header_offsets[h + 1]] + scans[offsets[i] : offsets[i + 1]]` of
    bytes, h = header_id[i]: small images share the headers that would outweigh them. `labels[i]` is a place in `classes`.
    """
    with np.load(path) as file:
        names = ("headers", "header_offsets", "header_id", "scans", "offsets", "labels", "split", "classes")
        arrays = {name: file[name] for name in names}
    labels, split = (integer_labels(arrays[name]) for name in ("labels", "split"))
    classes = tuple(map(str, arrays["classes"]))
    if not len(labels) == len(split) == len(arrays["header_id"]) == len(arrays["offsets"]) - 1:
        raise ValueError("labels, split, header_id and offsets speak of different numbers of images")
    train, test = split == 0, split == 1
    if not (train.any() and test.any() and (train | test).all()):
        raise ValueError(f"expected a split of 0 and 1, got {split.unique().tolist()}")
    images = _decode(arrays)
    parts = (HeldImages(images[part], labels[part]) for part in (train, test))
    return make_dataset(Path(path).stem, classes, *parts)


def _decode(arrays: dict[str, np.ndarray]) -> Tensor:
    """The images of a pack, uint8 (n, 3, height, width)."""
    from PIL import Image

    headers, scans = arrays["headers"].tobytes(), arrays["scans"].tobytes()
    header_offsets, offsets = arrays["header_offsets"].tolist(), arrays["offsets"].tolist()
    images = None
    for i, h in enumerate(tqdm(arrays["header_id"].tolist(), "decoding", unit="image", leave=False, disable=hidden())):
        jpeg = headers[header_offsets[h] : header_offsets[h + 1]] + scans[offsets[i] : offsets[i + 1]]
        try:
            pixels = np.asarray(Image.open(BytesIO(jpeg), formats=["JPEG"]).convert("RGB"))
        except OSError as error:
            raise ValueError(f"image {i} is no whole JPEG image") from error
        if images is None:
            images = np.empty((len(offsets) - 1, 3, *pixels.shape[:2]), np.uint8)
        if pixels.shape[:2] != images.shape[2:]:
            raise ValueError(f"image {i}: expected the shape of image 0, {images.shape[2:]}, got {pixels.shape[:2]}")
        images[i] = pixels.transpose(2, 0, 1)
    return torch.from_numpy(images)
