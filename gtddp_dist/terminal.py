"""Curvature cotangents s at the output: the terminal Hessian is rho s s^T, sample by sample (Prop. 5 and 6)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot


def sample_labels(probabilities: Tensor, seed: int, step: int, first: int) -> Tensor:
    """Labels drawn from the model's softmax, keyed by (seed, step, sample): the same on any layout over ranks.

    Args:
        probabilities: shape (B, classes), rows sum to 1.
        seed: the run's seed.
        step: the training step.
        first: index, within the step, of the first of these samples.

    Returns:
        Labels, shape (B,), on the device of ``probabilities``.
    """
    draws = np.random.Generator(np.random.Philox(key=[seed, step])).random(first + len(probabilities))[first:]
    cumulative = probabilities.double().cumsum(1)
    threshold = torch.from_numpy(draws).to(cumulative.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=probabilities.shape[1] - 1)


def sampled_cotangents(logits: Tensor, seed: int, step: int, first: int) -> Tensor:
    """softmax(logits) minus the one-hot of a sampled label: its outer product is the Fisher in expectation.

    Returns:
        Shape (1, B, classes): one cotangent a sample.
    """
    probabilities = _softmax(logits)
    labels = sample_labels(probabilities, seed, step, first)
    return (probabilities - one_hot(labels, probabilities.shape[1]).to(probabilities.dtype))[None]


def exact_cotangents(logits: Tensor) -> Tensor:
    """All columns of a factor of the softmax Hessian: sqrt(p_c) (p - e_c), whose outer products add up to it.

    Returns:
        Shape (classes, B, classes): as many cotangents a sample as there are classes.
    """
    probabilities = _softmax(logits)
    identity = torch.eye(probabilities.shape[1], dtype=probabilities.dtype, device=probabilities.device)
    return probabilities.T[:, :, None].sqrt() * (probabilities[None] - identity[:, None])


def _softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits.float() if logits.dtype.itemsize < 4 else logits, dim=1)
