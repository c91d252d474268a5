"""Which samples a training step takes: a pure function of the seed and the number of the step.

So the position in the data is nothing but the step, and a resumed run needs no other memory of it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError


class BatchOrder:
    """Batches of one size, in a new random order each epoch.

    An epoch visits each sample at most once. The samples left over after its last whole batch, fewer than
    `batch_size`, are not used in that epoch: a smaller batch would be another problem for the optimizer (its
    mean gradient is noisier, its recursion has another size). Which ones are left over changes with the
    epoch.

    Args:
        samples: size of the training set.
        batch_size: samples of a batch.
        seed: the order of epoch e is the permutation drawn from numpy's Philox generator with the key (seed,
        e).

    Raises:
        UserError: the batch is larger than the training set.
    """

    def __init__(self, samples: int, batch_size: int, seed: int) -> None:
        if batch_size > samples:
            raise UserError(
                f"train.batch_size is {batch_size}, but the training set has only {samples} samples: choose at most "
                f"{samples}"
            )
        self.samples = samples
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = samples // batch_size
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def batch_indices(self, step: int) -> Tensor:
        """Indices of the samples of the step (0 is the first of the run): int64 of the shape (batch_size,)."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = self._permutation(epoch)
            self._epoch = epoch
        return self._order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def _permutation(self, epoch: int) -> Tensor:
        key = np.array([self.seed, epoch], dtype=np.uint64)
        order = np.random.Generator(np.random.Philox(key=key)).permutation(self.samples)
        return torch.from_numpy(order)
