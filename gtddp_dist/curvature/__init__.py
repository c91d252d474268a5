"""Base optimizers whose curvature GT-DDP can stand on: one file each."""

from .adam import Adam, AdamW
from .base import Controls, Cooperation, Curvature, Direction, Evidence, Metric, MomentumOf
from .ekfac import EKFAC
from .kfac import KFAC
from .kronecker import KroneckerCurvature
from .rmsprop import RMSprop
from .sgd import SGD

__all__ = [
    "EKFAC",
    "KFAC",
    "SGD",
    "Adam",
    "AdamW",
    "Controls",
    "Cooperation",
    "Curvature",
    "Direction",
    "Evidence",
    "KroneckerCurvature",
    "Metric",
    "MomentumOf",
    "RMSprop",
]
