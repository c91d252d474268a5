"""MNIST, SVHN, CIFAR: read from small files in their own formats; found, downloaded, refused."""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from gtddp_dist.config import DataConfig, load_config
from gtddp_dist.data import DataSet, cifar, mnist, svhn
from gtddp_dist.data.files import Source
from gtddp_dist.errors import UserError
from gtddp_dist.registry import DATA_SETS, load_object

RANDOM = np.random.default_rng(0)
TRAIN, VALIDATION = 5, 3


def load(name: str, folder: Path | None, **options: bool) -> DataSet:
    loader = load_object(DATA_SETS[name].loader)
    assert callable(loader)
    data = loader(DataConfig(name=name, dir=None if folder is None else str(folder), **options))
    assert isinstance(data, DataSet)
    return data


def write_mnist(folder: Path, compressed: bool) -> np.ndarray:
    """The files; returns the pixels of the training images."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("t10k", VALIDATION), ("train", TRAIN)):
        pixels = RANDOM.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for kind, array in ((f"{part}-images-idx3-ubyte", pixels), (f"{part}-labels-idx1-ubyte", labels)):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            content = head + array.tobytes()
            (folder / (kind + ".gz" if compressed else kind)).write_bytes(
                gzip.compress(content) if compressed else content
            )
    return pixels


def write_svhn(folder: Path) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("test_32x32.mat", VALIDATION), ("train_32x32.mat", TRAIN)):
        pixels = RANDOM.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        savemat(folder / name, {"X": pixels, "y": (10 - np.arange(count, dtype=np.uint8))[:, None]})
    return pixels


def write_cifar10(folder: Path) -> np.ndarray:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("test_batch.bin", *(f"data_batch_{i}.bin" for i in range(5, 0, -1))):
        pixels = RANDOM.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
        records = np.concatenate([np.array([[3], [9]], dtype=np.uint8), pixels.reshape(2, -1)], axis=1)
        records.tofile(folder / name)
    return pixels


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("under", [".", "MNIST/raw"])
def test_mnist(tmp_path: Path, compressed: bool, under: str) -> None:
    pixels = write_mnist(tmp_path / under, compressed)
    data = load("mnist", tmp_path)
    assert data.train_images.shape == (TRAIN, 1, 28, 28) and data.validation_images.shape == (VALIDATION, 1, 28, 28)
    assert np.array_equal(data.train_images[:, 0].numpy(), pixels)
    assert data.train_labels.tolist() == [0, 1, 2, 3, 4] and data.classes == 10
    images, _ = data.batch(torch.arange(TRAIN), seed=0, step=0)  # as they are, normalised
    torch.testing.assert_close(images[:, 0], (torch.from_numpy(pixels) / 255 - 0.1307) / 0.3081)


def test_svhn(tmp_path: Path) -> None:
    pixels = write_svhn(tmp_path)
    data = load("svhn", tmp_path, augment=False)
    assert data.train_images.shape == (TRAIN, 3, 32, 32)
    assert data.train_images[4, 1, 20, 7] == pixels[20, 7, 1, 4]  # rows, columns, colours, samples in the file
    assert data.train_labels.tolist() == [0, 9, 8, 7, 6]  # 10 stands for 0
    assert load("svhn", tmp_path).augment and not load("svhn", tmp_path).mirror


def test_svhn_is_moved_and_never_mirrored(tmp_path: Path) -> None:
    write_svhn(tmp_path)
    bright_left = torch.zeros(TRAIN, 3, 32, 32, dtype=torch.uint8)
    bright_left[..., :8] = 255
    for mirror in (False, True):
        data = replace(load("svhn", tmp_path), train_images=bright_left, mean=None, mirror=mirror)
        batches = [data.batch(torch.arange(TRAIN), 0, step)[0] for step in range(8)]
        right = [bool((batch[..., 16:] > 0).any()) for batch in batches]
        assert any(right) == mirror
        assert any(not torch.equal(batch, bright_left) for batch in batches)
        assert torch.equal(batches[3], data.batch(torch.arange(TRAIN), 0, 3)[0])


def test_cifar10(tmp_path: Path) -> None:
    pixels = write_cifar10(tmp_path / "cifar-10-batches-bin")
    data = load("cifar10", tmp_path)
    assert data.train_images.shape == (10, 3, 32, 32) and len(data.validation_images) == 2
    assert np.array_equal(data.train_images[:2].numpy(), pixels)  # of data_batch_1.bin
    assert data.train_labels.tolist() == [3, 9] * 5 and data.augment and data.mirror


@pytest.mark.parametrize("name", ["mnist", "svhn", "cifar10", "cifar100"])
def test_missing_files_are_an_error_with_both_ways(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"data.name={name} needs data.dir.*: either .*data.download=true.* or set"):
        load(name, None)
    with pytest.raises(UserError, match=rf"has no .* of {name}: either .*data.download=true.*http.* or set data.dir"):
        load(name, tmp_path)


def test_files_that_are_something_else_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path, compressed=True)
    labels = tmp_path / "train-labels-idx1-ubyte.gz"
    content = labels.read_bytes()
    for wrong, message in (
        (content[:-3], "cut short"),
        (gzip.compress(gzip.decompress(content)[:-1]), "no idx file of bytes in 1 dimensions"),
        (gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 4, 1, 2, 3, 4])), "5 and 4 images and labels"),
        (gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 5, 1, 2, 3, 4, 10])), "a label is 10, expected 0 to 9"),
    ):
        labels.write_bytes(wrong)
        with pytest.raises(UserError, match=message):
            load("mnist", tmp_path)
    write_svhn(tmp_path)
    (tmp_path / "train_32x32.mat").write_bytes(b"nothing of the kind" * 20)
    with pytest.raises(UserError, match=r"train_32x32.mat cannot be read"):
        load("svhn", tmp_path)
    savemat(tmp_path / "train_32x32.mat", {"X": np.zeros((32, 32, 3, 2)), "y": np.ones((2, 1))})
    with pytest.raises(UserError, match="X is float64 of the shape"):
        load("svhn", tmp_path)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder, and the address under which it is served."""
    folder = tmp_path / "server"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_address[1]}/"
        running.shutdown()
        thread.join()


def source_of(file: Path, address: str) -> Source:
    return Source(address + file.name, hashlib.md5(file.read_bytes()).hexdigest())


def test_downloads_are_compared_with_checksums(
    tmp_path: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = server
    write_svhn(folder)
    write_mnist(folder, compressed=True)
    home = tmp_path / "home"
    for module in (svhn, mnist):
        sources = tuple(source_of(folder / source.name, address) for source in module.FILES.sources)
        monkeypatch.setattr(module, "FILES", replace(module.FILES, sources=sources))
    for name in ("svhn", "mnist"):
        with pytest.raises(UserError):
            load(name, home)  # not unless it is asked for
        assert len(load(name, home, download=True).train_labels) == TRAIN
        assert len(load(name, home).train_labels) == TRAIN  # and there it stays
    (folder / "train_32x32.mat").write_bytes(b"changed")
    elsewhere = tmp_path / "elsewhere"
    with pytest.raises(UserError, match=r"data.download: http:.*train_32x32.mat cannot be had"):
        load("svhn", elsewhere, download=True)
    assert not list(elsewhere.glob("**/*.mat"))
    assert len(load("svhn", home, download=True).train_labels) == TRAIN  # nothing is missing, nothing is asked for


def test_an_archive_is_unpacked(tmp_path: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, address = server
    write_cifar10(tmp_path / "cifar-10-batches-bin")
    archive = folder / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "cifar-10-batches-bin", "cifar-10-batches-bin")
    monkeypatch.setattr(cifar, "_CIFAR10", replace(cifar._CIFAR10, archive=source_of(archive, address)))
    home = tmp_path / "home"
    assert len(load("cifar10", home, download=True).train_labels) == 10
    assert sorted(path.name for path in home.iterdir()) in (
        ["cifar-10-batches-bin"],
        [".download.lock", "cifar-10-batches-bin"],
    )


@pytest.mark.parametrize("name", ["mnist", "svhn", "cifar10", "cifar100", "coop-net"])
def test_shipped_configurations(name: str) -> None:
    config = load_config(name, [])
    assert config.train.batch_size == 128
    assert config.data.name == ("mnist" if name == "coop-net" else name)
