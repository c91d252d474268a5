"""MNIST: 70,000 grey images of handwritten digits, 28 x 28 pixels, read from its idx files, compressed or not."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config_schema import DataConfig
from ..errors import UserError
from . import DataSet
from .files import Files, Source, of_one_data_set

MIRROR = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FILES = Files(
    data_set="mnist",
    folders=("MNIST/raw", "."),
    names=("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
    sources=(
        Source(f"{MIRROR}train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        Source(f"{MIRROR}train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
        Source(f"{MIRROR}t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
        Source(f"{MIRROR}t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
    ),
    suffixes=("", ".gz"),
    note="compressed (.gz) or not",
)


def load(config: DataConfig) -> DataSet:
    """MNIST: 60,000 training and 10,000 validation images, from `data.dir`; not augmented."""
    train_images, train_labels, validation_images, validation_labels = FILES.find(config)
    train = _pair(train_images, train_labels)
    validation = _pair(validation_images, validation_labels)
    return DataSet("mnist", *train, *validation, classes=10, mean=(0.1307,), deviation=(0.3081,))


def _pair(images: Path, labels: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) as uint8, and labels (N,)."""
    pixels, classes = _read(images, 3), _read(labels, 1)
    of_one_data_set((len(pixels), len(classes)), images)
    if classes.max() > 9:
        raise UserError(f"{labels}: a label is {classes.max()}, expected 0 to 9")
    return torch.from_numpy(pixels[:, None]), torch.from_numpy(classes.astype(np.int64))


def _read(file: Path, dimensions: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """An array of bytes: two zeros, 8 for bytes, the number of dimensions; their sizes as big-endian int32; values."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read ({error}): it was cut short, or is something else") from None
    start = 4 + 4 * dimensions
    sizes = tuple(np.frombuffer(content[4:start], dtype=">i4").tolist()) if len(content) >= start else ()
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != start + int(np.prod(sizes)):
        raise UserError(f"{file} is no idx file of bytes in {dimensions} dimensions, or was cut short")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(sizes).copy()
