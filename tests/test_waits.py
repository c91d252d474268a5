"""A step does not wait for its device but where it decides whether to be taken: once.

On a GPU a look at a number stops the host until everything before it is done. Which operations look is known on any
device.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gtddp_dist
from gtddp_dist import GTDDP
from gtddp_dist.curvature import SGD, Adam, Curvature, RMSprop

PACKAGE = Path(gtddp_dist.__file__).parent
LOOKS = {
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_linalg_check_errors",
    "aten::_linalg_eigh",
}
ON_CPU_ONLY = {
    ("optimizer.py", "all_finite"),
    *(("curvature/adam.py", name) for name in ("inverse_metric", "parameter_direction", "update_parameter")),
}
"""Where a look is taken only if all tensors are on the CPU, or at one that always is: Adam's count of steps."""


class Looks(TorchDispatchMode):
    """Writes down where in the package the host looks."""

    def __init__(self) -> None:
        super().__init__()
        self.at: list[tuple[str, str]] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        if func._schema.name in LOOKS:  # type: ignore[attr-defined]
            inside = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(PACKAGE)]
            place = (str(Path(inside[-1].filename).relative_to(PACKAGE)), inside[-1].name)
            if place not in ON_CPU_ONLY:
                self.at.append(place)
        return func(*args, **(kwargs or {}))


def network() -> nn.Module:
    """Every kind of player that has its own way to a Gram matrix."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def looks(curvature: Curvature, options: Mapping[str, object]) -> list[tuple[str, str]]:
    """Of the third step."""
    torch.manual_seed(0)
    model = network()
    optimizer = GTDDP(model, curvature, **options)  # type: ignore[arg-type]
    images, labels = torch.randn(8, 3, 8, 8), torch.randint(5, (8,))
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        with Looks() as found:
            optimizer.step()
    assert optimizer.steps == 3
    return found.at


@pytest.mark.parametrize(
    ("curvature", "options"),
    [
        (SGD(lr=0.1, momentum=0.9), {}),
        (SGD(lr=0.1), {"capture": "weighted", "scope": 4}),
        (SGD(lr=0.1), {"rollout": "nonlinear", "value_hessian": "block_diagonal"}),
        (RMSprop(lr=0.01, momentum=0.9), {"metric": "current"}),
        (Adam(lr=0.01), {"metric": "previous", "capture": "weighted"}),
        (Adam(lr=0.01), {"metric": "current", "statistics": "value"}),
    ],
)
def test_a_step_looks_once(curvature: Curvature, options: Mapping[str, object]) -> None:
    assert looks(curvature, options) == [("optimizer.py", "step")]


def test_groups_gradients_look_at_what_was_done_to_p_grad() -> None:
    """Several groups need to know by what p.grad was scaled, and it is there alone."""
    assert set(looks(SGD(lr=0.1), {"scope": 4})) == {("optimizer.py", "step"), ("optimizer.py", "_user_factor")}
