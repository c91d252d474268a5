"""DIGITS: 1,797 grey images of handwritten digits, 8 x 8 pixels, that come with scikit-learn (no download)."""

from __future__ import annotations

import torch

from ..config_schema import DataConfig
from . import DataSet

VALIDATION_SAMPLES = 360


def load(config: DataConfig) -> DataSet:
    """DIGITS, split into 1,437 training and 360 validation samples, stratified by class.

    The split is the same in every run (it does not depend on `train.seed`). Images are float32 of the shape
    (N, 1, 8, 8); a pixel's 17 grey levels become multiples of 1/16 from 0 to 1.

    DIGITS takes no option: the images are inside the scikit-learn package.
    """
    # Imported here: scikit-learn takes longer to import than the rest of the package, and only this file
    # needs it.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train_images, validation_images, train_labels, validation_labels = train_test_split(
        digits.images, digits.target, test_size=VALIDATION_SAMPLES, stratify=digits.target, random_state=0
    )
    return DataSet(
        name="digits",
        train_images=torch.tensor(train_images / 16, dtype=torch.float32).unsqueeze(1),
        train_labels=torch.tensor(train_labels, dtype=torch.int64),
        validation_images=torch.tensor(validation_images / 16, dtype=torch.float32).unsqueeze(1),
        validation_labels=torch.tensor(validation_labels, dtype=torch.int64),
        classes=10,
    )
