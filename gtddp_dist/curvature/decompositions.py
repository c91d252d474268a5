"""Decompositions of Kronecker factors: what they are made of, when they are due, and how they run beside the steps.

A decomposition is a function of tensors alone (:class:`Task`). So it can be made at once, by another replica, or in a
background thread, and made again from a checkpoint, always to the same bits.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from . import factors as bases
from .base import State

_SNAPSHOT = "snapshot_"


@dataclass(frozen=True)
class Timing:
    """When a player's bases are renewed, in steps of the player from 0; at its first step they always are.

    Attributes:
        every: steps from one decomposition to the next.
        offset: of its first one after that, below ``every``.
        lag: steps from the factors that are decomposed to the use of their bases, below ``every``.
    """

    every: int
    offset: int
    lag: int

    def begins(self, step: int) -> bool:
        """Whether the factors of this step are decomposed."""
        return (step - self.offset) % self.every == 0

    def ends(self, step: int) -> bool:
        """Whether bases that were begun before are due by this step."""
        return (step - self.offset) % self.every >= self.lag

    def age(self, step: int, failures: int) -> int:
        """Steps since the factors that the bases in use at this step are made of, the last so many having failed."""
        first = self.offset or self.every
        ended = max(0, (step - self.lag - first) // self.every + 1) - failures
        return step - (first + (ended - 1) * self.every if ended > 0 else 0)


@dataclass(frozen=True)
class Decomposed:
    """What decomposing the factors of a layer gave, and of its partner where the two cooperate in canonical bases."""

    own: State
    partners: State

    def tensors(self) -> list[Tensor]:
        return [*self.own.values(), *self.partners.values()]

    def filled(self, tensors: list[Tensor]) -> Decomposed:
        """The same names with other tensors."""
        n = len(self.own)
        return Decomposed(
            dict(zip(self.own, tensors[:n], strict=True)), dict(zip(self.partners, tensors[n:], strict=True))
        )

    def to(self, like: Tensor) -> Decomposed:
        return self.filled([tensor.to(like) for tensor in self.tensors()])

    def store(self, state: State, partner: State | None) -> None:
        """Put it into the layers' statistics; under Corollary 7 both layers have the same."""
        for each, found in ((state, self.own), (partner, self.partners or self.own)):
            if each is not None:
                for values in ("values_a", "values_b"):
                    each.pop(values, None)  # of the former basis
                each.update(found)


@dataclass(frozen=True)
class Task:
    """A decomposition of a layer's factors, or of two layers' that cooperate.

    Attributes:
        kind: "eigenbases"; "iteration": orthogonal bases near the former ones; "canonical": of two layers.
        factors: "a" and "b", shape (G, n, n). Canonical: those and "other_a", "other_b", damped, and "cross_a",
            "cross_b", each a matrix.
        former: bases "a" and "b" that an iteration starts from.
    """

    kind: Literal["eigenbases", "iteration", "canonical"]
    factors: Mapping[str, Tensor]
    former: Mapping[str, Tensor] = field(default_factory=dict)

    def on_cpu(self) -> Task:
        """The same, of copies where it is on another device."""
        return Task(
            self.kind,
            {key: tensor.cpu() for key, tensor in self.factors.items()},
            {key: tensor.cpu() for key, tensor in self.former.items()},
        )

    def run(self) -> Decomposed:
        """Do it.

        Raises:
            torch.linalg.LinAlgError: it does not converge, or its result is not finite.
        """
        a, b = self.factors["a"], self.factors["b"]
        if self.kind == "eigenbases":
            values_a, basis_a = bases.eigenbasis(a)
            values_b, basis_b = bases.eigenbasis(b)
            return Decomposed({"basis_a": basis_a, "basis_b": basis_b, "values_a": values_a, "values_b": values_b}, {})
        if self.kind == "iteration":
            basis_a, basis_b = (bases.iterated_basis(self.factors[side], self.former[side]) for side in "ab")
            return Decomposed({"basis_a": basis_a, "basis_b": basis_b}, {})
        a_u, a_v, s_a = bases.canonical_bases(a, self.factors["other_a"], self.factors["cross_a"])
        b_u, b_v, s_b = bases.canonical_bases(b, self.factors["other_b"], self.factors["cross_b"])
        return Decomposed(
            {"basis_a": a_u[None], "basis_b": b_u[None], "correlation_a": s_a, "correlation_b": s_b},
            {"basis_a": a_v[None], "basis_b": b_v[None]},
        )

    def shaped(self) -> Decomposed:
        """Tensors of the result's shapes, for a replica that is sent the content."""
        a, b = self.factors["a"], self.factors["b"]
        if self.kind == "canonical":
            other_a, other_b = self.factors["other_a"], self.factors["other_b"]
            correlations = {
                "correlation_a": a.new_empty(min(len(a), len(other_a))),
                "correlation_b": b.new_empty(min(len(b), len(other_b))),
            }
            own = {"basis_a": torch.empty_like(a[None]), "basis_b": torch.empty_like(b[None]), **correlations}
            return Decomposed(
                own, {"basis_a": torch.empty_like(other_a[None]), "basis_b": torch.empty_like(other_b[None])}
            )
        own = {"basis_a": torch.empty_like(a), "basis_b": torch.empty_like(b)}
        if self.kind == "eigenbases":
            own |= {"values_a": torch.empty_like(a[..., 0]), "values_b": torch.empty_like(b[..., 0])}
        return Decomposed(own, {})


@dataclass(frozen=True)
class Decompositions:
    """Those of a player.

    Attributes:
        owners: layer -> the replica that makes it.
        found: what there is; of other replicas' layers no more than the shapes.
        reasons: layer -> why it failed here.
    """

    owners: dict[str, int]
    found: dict[str, Decomposed]
    reasons: dict[str, str]


# ----------------------------------------------------------------------------------------------------------
# Beside the steps


def keep_snapshot(state: State, factors: Mapping[str, Tensor]) -> None:
    """Keep, with a layer's statistics, what is being decomposed: from it a resumed run makes the same bases."""
    state.update(
        {_SNAPSHOT + key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in factors.items()}
    )


def snapshot(state: State) -> dict[str, Tensor]:
    """The factors that are being decomposed; empty where none are."""
    return {key.removeprefix(_SNAPSHOT): tensor for key, tensor in state.items() if key.startswith(_SNAPSHOT)}


def drop_snapshot(state: State) -> None:
    for key in snapshot(state):
        del state[_SNAPSHOT + key]


class Ahead:
    """Decompositions that were begun and not used yet, by layer: no more than a cache of what their tasks give.

    They run on the CPU, one after another, in one background thread of the process, with as many of torch's threads as
    the thread that begins them has, since the last bit depends on that.
    """

    def __init__(self) -> None:
        self._jobs: dict[str, _Job] = {}

    def __reduce__(self) -> tuple[type[Ahead], tuple[()]]:
        return Ahead, ()  # a copy begins nothing

    def begin(self, layer: str, task: Task) -> None:
        """Start a task; one of the same layer that was not used (its step was refused) is let go."""
        former = self._jobs.pop(layer, None)
        if former is not None:
            _WORKER.withdraw(former)
        self._jobs[layer] = _Job(task, task.on_cpu(), torch.get_num_threads())
        _WORKER.add(self._jobs[layer])

    def result(self, layer: str, task: Task) -> Decomposed:
        """What a task gives, on the device of its factors: waits for it, or makes it where it was not begun here.

        Raises:
            torch.linalg.LinAlgError: as :meth:`Task.run`.
        """
        job = self._jobs.pop(layer, None)
        if job is None or job.task.factors["b"] is not task.factors["b"]:  # resumed since
            found = task.on_cpu().run()
        else:
            found = _WORKER.result(job)
        return found.to(task.factors["b"])


class _Job:
    def __init__(self, task: Task, on_cpu: Task, threads: int) -> None:
        self.task = task
        self.done = threading.Event()
        self.threads = threads
        self._on_cpu = on_cpu
        self._found: Decomposed | None = None
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            self._found = self._on_cpu.run()
        except Exception as error:  # for whoever asks for the result
            self._error = error
        self.done.set()

    def result(self) -> Decomposed:
        if self._error is not None:
            raise self._error
        assert self._found is not None
        return self._found


class _Worker:
    """A thread that lives while there are jobs. The end of the process waits for the job at hand, and for no other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[_Job] = deque()
        self._works = False

    def add(self, job: _Job) -> None:
        with self._lock:
            self._waiting.append(job)
            if not self._works:
                self._works = True
                threading.Thread(target=self._work, name="gtddp-bases").start()

    def withdraw(self, job: _Job) -> bool:
        """Whether the job was still waiting; then it is run no more."""
        with self._lock:
            if job not in self._waiting:
                return False
            self._waiting.remove(job)
            return True

    def result(self, job: _Job) -> Decomposed:
        if self.withdraw(job):
            job.run()  # rather than waiting for those before it
        job.done.wait()
        return job.result()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting or not threading.main_thread().is_alive():
                    self._works = False
                    return
                job = self._waiting.popleft()
            torch.set_num_threads(job.threads)
            job.run()


_WORKER = _Worker()
