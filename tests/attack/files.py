"""Corrupted files for every reader. A reader must return a result or raise one of its documented errors.

Any other exception, a hang, a huge allocation, or the execution of code from the file is a violation. If a file is empty, was
replaced with unrelated text, or contains pickled code, the reader must reject it or list it as unreadable.

`check(damage)` returns the violations that one `Damage` causes. `damages(reader)` is the Hypothesis strategy that generates
`Damage` objects.
"""

from __future__ import annotations

import atexit
import contextlib
import gzip
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

from vix_kernels.__main__ import main
from vix_kernels.models import create_model, load_model, save_model
from vix_kernels.training.checkpoint import load_checkpoint
from vix_kernels.training.config import UserError
from vix_kernels.training.data import Dataset, load_dataset
from vix_kernels.training.trained import load_trained

UNREAD = (".md", ".csv", ".yaml")  # suffixes of files that are ignored when a run or model is loaded
SECONDS = 20  # if reading takes longer, it counts as a hang
MEMORY = 2**31  # bytes that a reader may allocate; larger allocations fail
TINY = dict(embed_dim=8, depth=1, num_heads=1, patch_size=4, img_size=8, num_classes=2)


class Hang(BaseException):
    """Raised if reading takes too long. It is not a subclass of Exception, because some readers catch Exception."""


@dataclass(frozen=True)
class Damage:
    """One corrupted file. The repr can be passed to --case to reproduce the case.

    Attributes:
        reader: name of the reader, a key of READERS.
        file: index of the corrupted file in the sorted list of the reader's files.
        kind: kind of corruption, one of KINDS.
        seed: seed for the random choices.
    """

    reader: str
    file: int
    kind: str
    seed: int


@dataclass(frozen=True)
class Reader:
    """A reader under test. `make` writes valid files to a folder. `read` reads them and may raise only `errors`."""

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...] = (UserError,)


# Readers


def images(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def make_folder(folder: Path) -> None:
    for i, pixels in enumerate(images(12)):
        for ending in ("png", "jpg", "gif", "bmp", "webp", "tif"):
            path = folder / ("val" if i >= 8 else "train") / ("cat", "dog")[i % 2] / f"{i}.{ending}"
            if ending == "png" or i == 0:
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)


def make_tiny_imagenet(folder: Path) -> None:
    for i, pixels in enumerate(images(6)):
        path = folder / "val" / "images" / f"{i}.png" if i >= 4 else folder / "train" / f"n{i % 2}" / "images" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    (folder / "val" / "val_annotations.txt").write_text("".join(f"{i}.png\tn{i % 2}\t0\t0\t7\t7\n" for i in (4, 5)))


def make_pack(folder: Path) -> None:
    jpegs = []
    for pixels in images(6):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        jpegs.append(np.frombuffer(buffer.getvalue(), np.uint8))
    np.savez(
        folder / "pack.npz",
        headers=np.concatenate([jpeg[:20] for jpeg in jpegs]),
        header_offsets=np.arange(0, 20 * 7, 20),
        header_id=np.arange(6),
        scans=np.concatenate([jpeg[20:] for jpeg in jpegs]),
        offsets=np.cumsum([0, *(len(jpeg) - 20 for jpeg in jpegs)]),
        labels=np.arange(6) % 2,
        split=np.arange(6) // 4,
        classes=np.array(["cat", "dog"]),
    )


def make_cifar_pickles(folder: Path) -> None:
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [b"cat", b"dog"]}))
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        content = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}
        (folder / name).write_bytes(pickle.dumps(content))


def make_cifar_binary(folder: Path) -> None:
    (folder / "batches.meta.txt").write_text("cat\ndog\n")
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        (folder / name).write_bytes(bytes([0] + [7] * 3072 + [1] + [9] * 3072))


def make_idx(folder: Path, compressed: bool) -> None:
    for part, size in (("train", 4), ("t10k", 2)):
        for kind, values in (("images-idx3", images(size)[..., 0]), ("labels-idx1", np.arange(size, dtype=np.uint8) % 2)):
            content = np.array([0x0800 + values.ndim, *values.shape], ">u4").tobytes() + values.tobytes()
            path = folder / f"{part}-{kind}-ubyte{'.gz' * compressed}"
            path.write_bytes(gzip.compress(content, mtime=0) if compressed else content)


def make_model(folder: Path) -> None:
    save_model(create_model("vip", **TINY), folder)


def make_run(folder: Path) -> None:
    """Write a finished run. Its dataset is in a different folder and is not corrupted."""
    data = folder.with_name(f"{folder.name}-data")
    data.mkdir()
    make_idx(data, False)
    settings = [f"{name}={TINY[name]}" for name in ("embed_dim", "depth", "num_heads", "patch_size")]
    silent = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with silent[0], silent[1]:
        flags = ["--epochs", "1", "--warmup-epochs", "0", "--output", str(folder / "run")]
        assert main(["train", "--model", "vip", "--dataset", str(data), *flags, "--model-kwargs", *settings]) == 0
    for path in (folder / "run").iterdir():
        if path.suffix not in (".pt", ".yaml", ".csv"):
            path.unlink()


def make_original(folder: Path) -> None:
    torch.save({"weight": torch.zeros(3, 3), "bias": torch.zeros(3)}, folder / "weights.pth")


def read_original(folder: Path) -> None:
    command("convert", "--original", "ViP", str(folder / "weights.pth"), str(folder / "converted"))


def read_run(folder: Path) -> None:
    for path in (folder / "run", folder / "run" / "best.pt"):
        load_checkpoint(path)
        load_trained(path, torch.device("cpu"))


def read_resumed(folder: Path) -> None:
    command("train", "--resume", str(folder / "run"))


def read_config(folder: Path) -> None:
    command("train", "--config", str(folder / "args.yaml"), "--dataset", "nope")


def make_config(folder: Path) -> None:
    (folder / "args.yaml").write_text("epochs: 3\nlr: 0.001\nmodel: vip\nmodel_kwargs:\n  depth: 1\namp: false\n")


class Refused(Exception):
    """Raised when a command exits with code 2 and an error message."""


def command(*argv: str) -> None:
    """Run `vix`. Raise Refused if it exits with code 2 and an error message, and AssertionError for any other failure."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(argv)
    except SystemExit as stop:
        status = stop.code
    if status:
        lines = err.getvalue().splitlines()
        if status != 2 or not lines or not lines[-1].startswith(f"vix {argv[0]}: error: "):
            raise AssertionError(f"vix {argv[0]} ended with code {status} and {lines[-1:]}")
        raise Refused(lines[-1])


def dataset_at(name: str = "") -> Callable[[Path], Any]:
    return lambda folder: load_dataset(str(folder / name))


SLOW = ("run", "resumed run")
READERS = {
    "folder": Reader(make_folder, dataset_at()),
    "tiny imagenet": Reader(make_tiny_imagenet, dataset_at()),
    "pack": Reader(make_pack, dataset_at("pack.npz")),
    "CIFAR pickles": Reader(make_cifar_pickles, dataset_at()),
    "CIFAR binary": Reader(make_cifar_binary, dataset_at()),
    "idx": Reader(lambda folder: make_idx(folder, False), dataset_at()),
    "idx.gz": Reader(lambda folder: make_idx(folder, True), dataset_at()),
    "run": Reader(make_run, read_run),
    "resumed run": Reader(make_run, read_resumed, (Refused,)),
    "config": Reader(make_config, read_config, (Refused,)),
    "model": Reader(make_model, load_model, (ValueError, OSError)),
    "convert": Reader(make_original, read_original, (Refused,)),
}


# Damage


class Evil:
    """An object that creates the folder `marker` when it is unpickled."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def damaged(content: bytes, path: Path, kind: str, draws: random.Random, marker: str) -> bytes:
    if kind == "truncated":
        return content[: draws.randrange(max(1, len(content)))]
    if kind == "last bytes lost":
        return content[: -draws.randint(1, 16)]
    if kind == "bits flipped":
        flipped = bytearray(content)
        for _ in range(draws.choice((1, 1, 3, 30)) if content else 0):
            flipped[draws.randrange(len(flipped))] ^= 1 << draws.randrange(8)
        return bytes(flipped)
    if kind == "empty":
        return b""
    if kind == "zeros":
        return bytes(len(content))
    if kind == "noise":
        return draws.randbytes(len(content))
    if kind == "text":
        return "<!doctype html><title>404: not found\u2026</title>".encode()
    if kind == "wrong magic":
        return draws.randbytes(4) + content[4:]
    if kind == "trailing bytes":
        return content + draws.randbytes(100)
    if kind == "huge sizes":  # replaces four of the first 64 bytes, where formats store sizes
        at = draws.randrange(0, 61)
        return content[:at] + draws.choice((b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff")) + content[at + 4 :]
    if kind == "evil pickle":
        return pickle.dumps(Evil(marker))
    if kind == "evil member":
        return evil_member(content, marker)
    if kind == "other values":
        return other_values(content, path, draws)
    raise ValueError(f"kind: got {kind!r}")


def evil_member(content: bytes, marker: str) -> bytes:
    """Return the content of a file with a pickled `Evil`.

    If `content` is an .npz dataset or a checkpoint, its format is kept. Otherwise, the result is a pickled dict.
    """
    if content[:2] != b"PK":
        return pickle.dumps({b"data": Evil(marker), b"labels": [0], b"label_names": Evil(marker)})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if any(name.endswith(".npy") for name in archive.namelist()):
            buffer = io.BytesIO()
            np.savez(buffer, **{name[:-4]: np.array([Evil(marker)], object) for name in archive.namelist()})
            return buffer.getvalue()
    buffer = io.BytesIO()
    torch.save({"model": Evil(marker), "epoch": 1}, buffer)
    return buffer.getvalue()


STRANGE: tuple[Any, ...] = (None, -1, 10**12, 1.5, float("nan"), "nope", "", b"x", [], [1, "x"], {}, {"a": 1}, True)


def other_values(content: bytes, path: Path, draws: random.Random) -> bytes:
    """Return a copy of `content` with one value removed or changed.

    In YAML, CSV and text files, one line is replaced, which may break the format. In unknown formats, the bytes are reversed.
    """
    if content[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            packed = any(name.endswith(".npy") for name in archive.namelist())
        buffer = io.BytesIO()
        if packed:
            with np.load(io.BytesIO(content)) as file:
                arrays = {name: file[name] for name in file.files}
            name = draws.choice(sorted(arrays))
            strange = [np.array(value) for value in (-1, 10**9, float("nan"), 2.5, "x")]
            arrays[name] = draws.choice(
                [np.full_like(arrays[name], value, dtype=value.dtype) for value in strange]
                + [arrays[name][:-1], arrays[name][:0], arrays[name][None], arrays[name][::-1], np.array(3)]
            )
            if draws.random() < 0.2:
                del arrays[name]
            np.savez(buffer, **arrays)
        else:
            torch.save(changed(torch.load(io.BytesIO(content), weights_only=True), draws), buffer)
        return buffer.getvalue()
    if path.suffix == ".json":
        return json.dumps(changed(json.loads(content), draws), default=str).encode()
    if path.suffix in (".yaml", ".csv", ".txt"):
        lines = content.splitlines(keepends=True) or [b""]
        lines[draws.randrange(len(lines))] = draws.choice(
            (b"\n", b"a: [\n", b"\xff\xfe\n", b"- 1\n", b"epochs: x\n", b"{\n", b"\0\n")
        )
        return b"".join(lines)
    if path.suffix == "" and content[:1] == b"\x80":
        return pickle.dumps(changed(pickle.loads(content), draws))
    return content[::-1]


def changed(tree: Any, draws: random.Random) -> Any:
    """Return a copy of nested data in which one value, at any depth, is replaced or removed."""
    if isinstance(tree, dict) and tree and draws.random() < 0.85:
        key = draws.choice(sorted(tree, key=str))
        if draws.random() < 0.2:
            return {name: value for name, value in tree.items() if name != key}
        return tree | {key: changed(tree[key], draws)}
    if isinstance(tree, list) and tree and draws.random() < 0.85:
        i = draws.randrange(len(tree))
        return tree[:i] + [changed(tree[i], draws)] + tree[i + 1 :]
    if isinstance(tree, torch.Tensor) and draws.random() < 0.7:
        return draws.choice((tree[None], tree.flatten()[:-1], tree.to(torch.int64), torch.full_like(tree, 1) * float("nan")))
    return draws.choice(STRANGE)


KINDS = (
    "truncated", "last bytes lost", "bits flipped", "empty", "zeros", "noise", "text", "wrong magic", "trailing bytes",
    "huge sizes", "evil pickle", "evil member", "other values", "missing", "folder",
)  # fmt: skip


@st.composite
def damages(draw: st.DrawFn, reader: str) -> Damage:
    file = draw(st.integers(0, len(files_of(intact(reader))) - 1))
    return Damage(reader, file, draw(st.sampled_from(KINDS)), draw(st.integers(0, 2**20)))


# The check


@cache
def intact(reader: str) -> Path:
    """Return a folder with valid files for `reader`. They are written only once."""
    parent = tempfile.mkdtemp(prefix="vix-attack-")
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    folder = Path(parent) / "files"
    folder.mkdir()
    READERS[reader].make(folder)
    return folder


def files_of(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Raise `Hang` after SECONDS seconds, and make allocations beyond MEMORY bytes fail."""

    def on_alarm(*_: Any) -> None:
        raise Hang

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, on_alarm)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def check(damage: Damage) -> list[str]:
    """Corrupt a file as described by `damage`, read it, and return a message for each violation."""
    reader = READERS[damage.reader]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "files"
        shutil.copytree(intact(damage.reader), folder)
        name, marker = files_of(folder)[damage.file], Path(temporary) / "executed"
        path = folder / name
        if damage.kind in ("missing", "folder"):
            path.unlink()
            if damage.kind == "folder":
                path.mkdir()
        else:
            path.write_bytes(damaged(path.read_bytes(), path, damage.kind, random.Random(damage.seed), str(marker)))
        found = []
        try:
            with limits():
                result = reader.read(folder)
        except Hang:
            found.append(f"{name}: no result within {SECONDS} s")
        except Exception as error:
            expected = isinstance(error, reader.errors) and not isinstance(error, (json.JSONDecodeError, UnicodeError))
            if not expected:
                found.append(f"{name}: raises {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}")
            elif "MemoryError" in str(error) or "allocate" in str(error):
                found.append(f"{name}: a huge allocation: {error}")
        else:
            skipped = isinstance(result, Dataset) and any(str(path) in line for line in result.unreadable)
            if damage.kind in ("empty", "evil pickle", "evil member", "text") and path.suffix not in UNREAD and not skipped:
                found.append(f"{name}: accepted")
        if marker.exists():
            found.append(f"{name}: its code was executed")
    return found
