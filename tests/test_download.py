"""Tests that named datasets are downloaded, checked and unpacked only once, and only into the data folder."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_data_formats import cifar_python, idx_files, tiny_imagenet

from vix_kernels.training import UserError
from vix_kernels.training.data import download, load_dataset


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "published"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", folder
        http.shutdown()


def publish(monkeypatch: pytest.MonkeyPatch, name: str, address: str, folder: Path) -> None:
    sums = {file.name: f"md5:{hashlib.md5(file.read_bytes()).hexdigest()}" for file in sorted(folder.iterdir())}
    monkeypatch.setitem(download.SOURCES, name, (address, sums))


def packed_cifar(folder: Path, published: Path) -> None:
    with tarfile.open(published / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(cifar_python(folder) / "cifar-10-batches-py", "cifar-10-batches-py")


def test_an_archive_is_downloaded_once(server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address, published = server
    packed_cifar(tmp_path, published)
    publish(monkeypatch, "cifar10", address, published)
    home = tmp_path / "home"
    data = load_dataset("cifar10", data_dir=str(home))
    assert data.name == "cifar10" and data.classes == ("cat", "dog") and len(data.train) == 10
    assert sorted(path.name for path in home.iterdir()) == ["cifar-10-python.tar.gz", "cifar10"]
    (published / "cifar-10-python.tar.gz").unlink()
    assert len(load_dataset("cifar10", data_dir=str(home)).train) == 10


def test_single_files_and_zip_archives_are_downloaded(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, published = server
    idx_files(published, True)
    publish(monkeypatch, "mnist", address, published)
    data = load_dataset("mnist", data_dir=str(tmp_path / "home"))
    assert data.name == "mnist" and data.train.shape == (1, 28, 28)
    for file in published.iterdir():
        file.unlink()
    images = tiny_imagenet(tmp_path / "tiny-imagenet-200")
    with zipfile.ZipFile(published / "tiny-imagenet-200.zip", "w") as archive:
        for file in images.rglob("*.*"):
            archive.write(file, file.relative_to(tmp_path))
    publish(monkeypatch, "tiny-imagenet", address, published)
    assert load_dataset("tiny-imagenet", data_dir=str(tmp_path / "home")).classes == ("n01", "n02")


def test_a_changed_archive_is_refused(server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address, published = server
    packed_cifar(tmp_path, published)
    publish(monkeypatch, "cifar10", address, published)
    with open(published / "cifar-10-python.tar.gz", "ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match="wrong checksum of http"):
        load_dataset("cifar10", data_dir=str(tmp_path / "home"))
    assert not list((tmp_path / "home").iterdir())


def test_without_a_network_the_error_names_file_and_folder(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    address, published = server
    packed_cifar(tmp_path, published)
    publish(monkeypatch, "cifar10", "http://127.0.0.1:9", published)
    home = tmp_path / "home"
    line = refused("--dataset", "cifar10", "--data-dir", home, "--output", tmp_path / "run")
    assert "cannot download http://127.0.0.1:9/cifar-10-python.tar.gz" in line and f"put that file into {home}" in line
    assert not (tmp_path / "run").exists() and not list(home.iterdir())
    (published / "cifar-10-python.tar.gz").rename(home / "cifar-10-python.tar.gz")
    assert len(load_dataset("cifar10", data_dir=str(home)).train) == 10


def test_without_a_network_the_error_names_all_files_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    published = tmp_path / "published"
    published.mkdir()
    publish(monkeypatch, "mnist", "http://127.0.0.1:9", idx_files(published))
    line = refused("--dataset", "mnist", "--data-dir", tmp_path / "home", "--output", tmp_path / "run")
    names = ", ".join(sorted(file.name for file in published.iterdir()))
    assert line.rstrip().endswith(f"put {names} into {tmp_path / 'home' / 'mnist'}")


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_archives_write_nothing_outside_their_folder(
    kind: str, absolute: bool, server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, published = server
    name = str(tmp_path / "escaped") if absolute else "../escaped"
    if kind == "zip":
        with zipfile.ZipFile(published / "data.zip", "w") as archive:
            archive.writestr(name, "escaped")
    else:
        with tarfile.open(published / "data.tar.gz", "w:gz") as archive:
            entry = tarfile.TarInfo(name)
            entry.size = 7
            archive.addfile(entry, io.BytesIO(b"escaped"))
    publish(monkeypatch, "cifar10", address, published)
    with pytest.raises(UserError):
        load_dataset("cifar10", data_dir=str(tmp_path / "home"))
    home = tmp_path / "home" / "cifar10"
    assert all(home in path.parents for path in tmp_path.rglob("escaped"))
