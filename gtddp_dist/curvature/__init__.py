"""Base optimizers whose curvature GT-DDP can stand on: one file each."""

from .adam import Adam, AdamW
from .base import Controls, Curvature, Direction, Evidence, Metric, MomentumOf
from .rmsprop import RMSprop
from .sgd import SGD

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Controls",
    "Curvature",
    "Direction",
    "Evidence",
    "Metric",
    "MomentumOf",
    "RMSprop",
]
