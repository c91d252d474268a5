"""Other libraries' training steps: DeepSpeed's engine, and KFAC with curvlinops."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from ..config_schema import Config
from ..curvature import KFAC
from ..environment import select_device
from ..launch.ranks import alone
from ..phases import phase
from .names import CONTENDERS
from .single import Contender, Kind

if TYPE_CHECKING:
    from curvlinops import KFACInverseLinearOperator

    from ..pipeline.grid import Backend

FACTOR_EVERY = 10
"""Steps of curvlinops' KFAC for which factors and their inverses serve, as `names` has it for this package's own."""


def new_contender(config: Config, name: str) -> Contender:
    """The contender of that name; `prepared` has to be open around it.

    Raises:
        UserError: a configuration that one process cannot measure.
    """
    match CONTENDERS[name].peer:
        case "deepspeed":
            return DeepSpeedEngine(config, name)
        case "curvlinops":
            return CurvlinopsKFAC(config, name)
        case _:
            return Contender(config, name)


@contextmanager
def prepared(config: Config, names: Sequence[str]) -> Iterator[None]:
    """What these contenders need around them: for DeepSpeed's engine torch.distributed, with this process alone."""
    if not any(CONTENDERS[name].peer == "deepspeed" for name in names):
        yield
        return
    from ..pipeline.engine import quiet
    from ..pipeline.grid import end_distributed, start_distributed

    backend: Backend = "nccl" if select_device(config.train.device).type == "cuda" else "gloo"
    with quiet():
        start_distributed(alone(), backend, dist.HashStore())
    try:
        yield
    finally:
        end_distributed()


class DeepSpeedEngine(Contender):
    """DeepSpeed's engine for networks that are not cut, with torch's SGD."""

    def __init__(self, config: Config, name: str) -> None:
        super().__init__(config, name)
        import deepspeed

        from ..pipeline.engine import quiet

        samples = config.train.batch_size
        settings = {
            "train_batch_size": samples,
            "train_micro_batch_size_per_gpu": samples,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,  # by itself it clips to 1
            "steps_per_print": None,
        }
        with quiet():
            self.engine, *_ = deepspeed.initialize(
                model=self.model, optimizer=self.optimizer, config=settings, dist_init_required=False
            )

    def take(self, images: Tensor, labels: Tensor, kind: Kind | None) -> Tensor:
        with phase("forward"), self.precision.autocast():
            loss = F.cross_entropy(self.engine(images), labels)
        with phase("backward"):
            self.engine.backward(loss)
        with phase("update"):
            self.engine.step()
        return loss


class CurvlinopsKFAC(Contender):
    """SGD on the gradient times curvlinops' inverse of KFAC, of the empirical Fisher; parameters that are not of linear
    layers or convolutions take the gradient as it is."""

    def __init__(self, config: Config, name: str) -> None:
        super().__init__(config, name)
        self.kinds = (Kind("plain", 1 - 1 / FACTOR_EVERY), Kind("factors", 1 / FACTOR_EVERY))
        self.damping = KFAC.damping if config.optimizer.damping is None else config.optimizer.damping
        self.parameters = [
            parameter
            for module in self.model.modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
            for parameter in module.parameters(recurse=False)
        ]
        self.steps = 0
        self.inverse: KFACInverseLinearOperator | None = None

    def take(self, images: Tensor, labels: Tensor, kind: Kind | None) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with phase("forward"), self.precision.autocast():
            loss = F.cross_entropy(self.model(images), labels)
        with phase("backward"):
            loss.backward()
        renew = self.steps % FACTOR_EVERY == 0 if kind is None else kind.name == "factors"
        with phase("curvature"), self.precision.autocast():
            grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
            if renew or self.inverse is None:
                self.inverse = self._inverse(images, labels)
        with phase("update"), torch.no_grad():
            # The first product after new factors makes their inverses.
            for parameter, scaled in zip(self.parameters, self.inverse @ grads, strict=True):
                parameter.grad = scaled.reshape(parameter.shape)
            self.optimizer.step()
        self.steps += 1
        return loss

    def _inverse(self, images: Tensor, labels: Tensor) -> KFACInverseLinearOperator:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # one of its packages compiles with torch.jit
            from curvlinops import KFACInverseLinearOperator, KFACLinearOperator
        factors = KFACLinearOperator(
            self.model,
            nn.CrossEntropyLoss(),
            self.parameters,
            [(images, labels)],
            check_deterministic=False,
            fisher_type="empirical",
            num_per_example_loss_terms=1,
            separate_weight_and_bias=False,
            num_data=len(images),
        )
        factors.compute_kronecker_factors()
        return KFACInverseLinearOperator(factors, damping=self.damping, use_heuristic_damping=True)
