"""A user's program with a network of its own, put on a grid by `gtddp_dist.initialize`.

Started by torchrun, by nobody, or forked by tests; it takes what it has to do as JSON in its one argument.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gtddp_dist
from gtddp_dist import GTDDP, curvature
from gtddp_dist.errors import UserError
from gtddp_dist.launch import Ranks

if TYPE_CHECKING:
    from gtddp_dist import Engine

CHUNKS = 4
"""Micro-batches of a step, over all replicas."""
MICRO_BATCH = 4


class Order(TypedDict, total=False):
    """What to do."""

    pipe: int
    data: int
    load: bool
    """Begin with the newest checkpoint."""
    steps: int
    """Training steps, or until that step where a checkpoint was loaded."""
    save_at: list[int]
    load_again: bool
    """In the end also load the newest checkpoint once more, and repeat the steps from there."""
    folder: str
    """Of checkpoints and of what is found."""
    device: str
    name: str
    """Of what is found: `<name>-<rank>.json` and `<name>-<rank>.pt`."""


class Own(nn.Module):
    """A residual network that is none of the package's; its one block has an identity shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.classifier = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = torch.tanh(x + self.second(torch.tanh(self.first(x))))
        return cast(Tensor, self.classifier(x.flatten(1)))


def new_model() -> nn.Module:
    return Own().double()


class Forgetful(Own):
    """Its dropout is none of its modules."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.dropout(x, 0.1, training=self.training))


def new_optimizer(model: nn.Module) -> GTDDP:
    return GTDDP(model, curvature.Adam(lr=0.01, eps=1e-3), scope="micro_batch", gauss_newton_weight=0.1)


def chunks_of(step: int) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches of a step, of all replicas; those of step -1 are for evaluation."""
    numbers = torch.Generator().manual_seed(100 + step)
    x = torch.randn(CHUNKS * MICRO_BATCH, 1, 4, 4, generator=numbers, dtype=torch.float64)
    y = torch.randint(0, 3, (CHUNKS * MICRO_BATCH,), generator=numbers)
    return list(zip(x.chunk(CHUNKS), y.chunk(CHUNKS), strict=True))


def own_chunks(engine: Engine, step: int) -> list[tuple[Tensor, Tensor]]:
    """What a segment does not read has no content there."""
    start = engine.grid.replica * engine.n_micro
    return [
        (x if engine.worker.first else x.to("meta"), y if engine.worker.last else y.to("meta"))
        for x, y in chunks_of(step)[start : start + engine.n_micro]
    ]


def batches(engine: Engine) -> Iterator[tuple[Tensor, Tensor]]:
    """A loader of this replica's own, from where the engine stands."""
    for step in itertools.count(engine.progress.step):
        yield from own_chunks(engine, step)


def new_engine(
    order: Order, cuts: Sequence[int] | None = None, model_fn: Callable[[], nn.Module] = new_model
) -> Engine:
    return gtddp_dist.initialize(
        model_fn,
        optimizer=new_optimizer,
        micro_batch=MICRO_BATCH,
        n_micro=CHUNKS // order["data"],
        sample=torch.zeros(MICRO_BATCH, 1, 4, 4, dtype=torch.float64),
        pipe=order["pipe"],
        data=order["data"],
        loss=F.cross_entropy,
        cuts=cuts,
        seed=7,
        device=order.get("device", "cpu"),
    )


def carry_out(order: Order) -> None:
    folder = Path(order["folder"])
    found: dict[str, object] = {"loaded": None, "losses": {}}
    with new_engine(order) as engine:
        if order.get("load"):
            found["loaded"] = engine.load(folder / "checkpoints")
        found["before"] = engine.evaluate(own_chunks(engine, -1))
        found["losses"] = _train(engine, order, folder / "checkpoints")
        state = _copy(engine)
        found["after"] = engine.evaluate(own_chunks(engine, -1))
        if order.get("load_again"):
            engine.save(folder / "others")
            found["loaded again"] = engine.load(folder / "checkpoints")
            found["losses again"] = _train(engine, order, folder / "others")
            again = _copy(engine)
            found["state again"] = all(torch.equal(again[name], state[name]) for name in state)
        found["cuts"], rank = list(engine.cuts), engine.grid.rank
    state = {name: tensor.cpu() for name, tensor in state.items()}
    torch.save(state, folder / f"{order['name']}-{rank}.pt")
    (folder / f"{order['name']}-{rank}.json").write_text(json.dumps(found))


def _train(engine: Engine, order: Order, checkpoints: Path) -> dict[int, float]:
    """Losses by step."""
    losses, loader = {}, batches(engine)
    while engine.progress.step < order["steps"]:
        step = engine.progress.step
        losses[step] = engine.train_batch(loader)
        if engine.progress.step in order.get("save_at", []):
            engine.save(checkpoints)
    return losses


def _copy(engine: Engine) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.segment.state_dict().items()}


def work(ranks: Ranks, arguments: Mapping[str, object]) -> None:
    """As a rank of `server`."""
    carry_out(cast(Order, arguments))


def refused(ranks: Ranks, arguments: Mapping[str, object]) -> None:
    """What one process is told when it asks for what cannot be; the messages go to `refused.json`."""
    said: dict[str, object] = {}

    def ask(name: str, question: Callable[[], object]) -> None:
        try:
            question()
        except UserError as error:
            said[name] = str(error)

    one: Order = {"pipe": 1, "data": 1}
    ask("ranks", lambda: new_engine({"pipe": 2, "data": 1}))
    ask("cuts", lambda: new_engine(one, cuts=[7]))
    ask("mode", lambda: new_engine(one, model_fn=lambda: Forgetful().double()))
    with new_engine(one) as engine:
        short = [(x[:3], y[:3]) for x, y in own_chunks(engine, 0)]
        ask("batch", lambda: engine.train_batch(iter(short)))
        ask("load", lambda: engine.load("nowhere"))
        said["loss after"] = engine.train_batch(batches(engine))
    Path("refused.json").write_text(json.dumps(said))


if __name__ == "__main__":
    for text in sys.argv[1:]:
        carry_out(json.loads(text))
