"""Download, check and unpack named datasets."""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from ..config import UserError

_CIFAR = "https://www.cs.toronto.edu/~kriz"
# Maps the name of each dataset to its base URL, and to a dict from file names to the publisher's checksums.
SOURCES: dict[str, tuple[str, dict[str, str]]] = {
    "cifar10": (_CIFAR, {"cifar-10-python.tar.gz": "md5:c58f30108f718f92721af3b95e74349a"}),
    "cifar100": (_CIFAR, {"cifar-100-python.tar.gz": "md5:eb9058c3a382ffc7106e4002c42a8d85"}),
    "tiny-imagenet": (
        "http://cs231n.stanford.edu",
        {"tiny-imagenet-200.zip": "md5:90528d7ca1a48142e341f4ef8d21d0de"},
    ),
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        {
            "train-images-idx3-ubyte.gz": "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "md5:d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "md5:9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "md5:ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    "fashion-mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        {
            "train-images-idx3-ubyte.gz": "md5:8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "md5:25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "md5:bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "md5:bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
}


def fetched(name: str, data_dir: str | None) -> Path:
    """Return the folder of a named dataset in `data_dir`. Download the dataset first if the folder does not exist.

    An existing folder is used without any check. If `data_dir` already contains the archive with the correct checksum, the
    archive is not downloaded again.

    Args:
        name: a name from SOURCES.
        data_dir: the folder that contains the datasets. If None, a folder in the user's cache is used.

    Raises:
        UserError: if a download fails, a checksum does not match, or this version of Python cannot unpack archives safely.
    """
    import pooch

    pooch.get_logger().setLevel("WARNING")  # errors are reported in one line, and progress is shown by a bar
    home = Path(data_dir) if data_dir else Path(pooch.os_cache("vix_kernels"))
    folder = home / name
    if folder.is_dir():
        return folder
    address, files = SOURCES[name]
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix=f".{name}-") as temporary:
        content = Path(temporary) / name
        content.mkdir()
        for file, checksum in files.items():
            archive = _is_archive(file)
            url = f"{address}/{file}"
            try:
                path = pooch.retrieve(url, checksum, file, home if archive else content, progressbar=os.isatty(2))
            except ValueError as error:  # pooch raises it if the checksum does not match
                raise UserError(f"--dataset: wrong checksum of {url}: {error}") from error
            except OSError as error:  # includes all exceptions of the requests package
                needed = f"that file into {home}" if archive else f"{', '.join(files)} into {folder}"
                raise UserError(
                    f"--dataset: cannot download {url} ({type(error).__name__}); without a network, put {needed}"
                ) from error
            if archive:
                content = _unpacked(Path(path), content)
        try:
            os.replace(content, folder)
        except OSError:  # another run may have created the folder first
            if not folder.is_dir():
                raise
    return folder


def _is_archive(file: str) -> bool:
    return file.endswith((".tar.gz", ".zip"))


def _unpacked(archive: Path, folder: Path) -> Path:
    """Unpack `archive` into `folder`. Nothing is written outside `folder`.

    Returns:
        If the archive contains a single folder and nothing else, the path of that folder. Otherwise, `folder`.
    """
    safe = {}
    if archive.suffix != ".zip":  # for zip files, shutil skips names that point outside the folder
        if not hasattr(tarfile, "data_filter"):
            version = sys.version.partition(" ")[0]
            raise UserError(f"--dataset: expected Python 3.10.12, 3.11.4 or newer to unpack {archive} safely, got {version}")
        safe["filter"] = "data"
    shutil.unpack_archive(archive, folder, **safe)
    inside = list(folder.iterdir())
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder
