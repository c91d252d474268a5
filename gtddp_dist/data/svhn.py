"""SVHN: colour images of house numbers, 32 x 32 pixels with one digit in the middle, read from its .mat files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config_schema import DataConfig
from ..errors import UserError
from . import DataSet
from .files import Files, Source, of_one_data_set

PLACE = "http://ufldl.stanford.edu/housenumbers/"
FILES = Files(
    data_set="svhn",
    folders=(".",),
    names=("train_32x32.mat", "test_32x32.mat"),
    sources=(
        Source(f"{PLACE}train_32x32.mat", "e26dedcc434d2e4c54c9b2d4a06d8373"),
        Source(f"{PLACE}test_32x32.mat", "eb5a983be6a315427106f1b164d9cef3"),
    ),
    note="the cropped digits",
)


def load(config: DataConfig) -> DataSet:
    """SVHN: 73,257 training and 26,032 validation images, from `data.dir`; moved at random, but not mirrored."""
    train, validation = (_read(file) for file in FILES.find(config))
    return DataSet(
        "svhn",
        *train,
        *validation,
        classes=10,
        mean=(0.4377, 0.4438, 0.4728),
        deviation=(0.1980, 0.2010, 0.1970),
        augment=config.augment is not False,
        mirror=False,
    )


def _read(file: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) as uint8, and labels (N,): the digit, for which the file has 10 where it is 0."""
    from scipy.io import loadmat  # here, since only this file needs it
    from scipy.io.matlab import MatReadError

    try:
        content = loadmat(file, variable_names=["X", "y"])
        pixels, labels = content["X"], content["y"].reshape(-1)
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError, MatReadError) as error:
        raise UserError(f"{file} cannot be read ({error!r}): it is no .mat file of SVHN, or was cut short") from None
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3):
        raise UserError(f"{file}: X is {pixels.dtype} of the shape {pixels.shape}, expected uint8 of (32, 32, 3, N)")
    of_one_data_set((pixels.shape[3], len(labels)), file)
    if labels.min() < 1 or labels.max() > 10:
        raise UserError(f"{file}: labels from {labels.min()} to {labels.max()}, expected 1 to 10")
    images = np.ascontiguousarray(pixels.transpose(3, 2, 0, 1))
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64) % 10)
