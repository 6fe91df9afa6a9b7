"""Write a random subset of a dataset to a folder of PNG files. `make linearize` trains a teacher on these images.

    python -m bench.image_folder --dataset cifar10 --output DIR --train 10000 --test 3000

The subset is random because datasets may be sorted by class. The script requires the `train` extra.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from vix_kernels.commands import Parser, within
from vix_kernels.training import UserError
from vix_kernels.training.data import Dataset, Images, load_dataset


def write_images(dataset: Dataset, output: Path, train: int, test: int, seed: int = 0) -> None:
    """Write `train` random training images to output/train/CLASS, and `test` random test images to output/val/CLASS.

    Raises:
        ValueError: the dataset has fewer images than requested, or `output` exists.
    """
    for name, wanted, images in (("train", train, dataset.train), ("test", test, dataset.test)):
        if wanted > len(images):
            raise ValueError(f"--{name}: expected at most the {len(images):,} images of the dataset, got {wanted:,}")
    if output.exists():
        raise ValueError(f"--output: expected a new folder, got {output}, which exists")
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        for name, count, images in (("train", train, dataset.train), ("val", test, dataset.test)):
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
            write_part(dataset, images, order, temporary / name)
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_part(dataset: Dataset, images: Images, order: Tensor, folder: Path) -> None:
    from PIL import Image

    for name in dataset.classes:
        (folder / name).mkdir(parents=True)
    positions = iter(order.tolist())
    for pixels, labels in images.batches(list(order.split(250))):
        pixels = (pixels.float() * (255 / dataset.max_value)).round().byte().expand(-1, 3, -1, -1).movedim(1, -1).numpy()
        for array, label in zip(pixels, labels.tolist(), strict=True):
            Image.fromarray(array).save(folder / dataset.classes[label] / f"{next(positions):06}.png")


def main(argv: list[str] | None = None) -> int:
    parser = Parser.of("bench.image_folder", __doc__)
    parser.add_argument("--dataset", required=True, help="name or path of a dataset, as in `vix train`")
    parser.add_argument("--output", type=Path, required=True, help="folder to write, which must not exist")
    parser.add_argument("--train", type=within(1, 2**31), required=True, metavar="N", help="number of training images")
    parser.add_argument("--test", type=within(1, 2**31), required=True, metavar="N", help="number of test images")
    options = parser.parse_args(argv)
    try:
        write_images(load_dataset(options.dataset), options.output, options.train, options.test)
    except (UserError, ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
