"""What is not finite is found and named, and what a run has that is good stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from campaign import numbers

from gtddp_dist import checkpoint
from gtddp_dist.nonfinite import UNKNOWN, Kind, Source, of_ranks, packed
from gtddp_dist.sweep import Value, backward_stage


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("what", ["data", "weight", "activation", "gram", "factor"])
def test_a_step_is_refused_and_the_log_says_why(what: str, value: str, tmp_path: Path) -> None:
    assert numbers.run_case(what, value, "one process", False, "", tmp_path).problem == ""


def test_algebra_that_fails_on_a_gram_matrix_is_a_refused_step(tmp_path: Path) -> None:
    assert numbers.run_case("gram", "nan", "one process", False, numbers.REPLACE, tmp_path).problem == ""


def test_checkpoints_from_before_a_bad_weight_stay(tmp_path: Path) -> None:
    """Also where so few are kept that later ones would take their place."""
    row = numbers.run_case("weight", "nan", "one process", True, "checkpoint.keep=1", tmp_path)
    assert row.problem == ""
    newest, _ = checkpoint.newest_valid(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.step == numbers.AT - 1


def test_of_several_ranks_the_cause_is_told() -> None:
    activation, gradient = Source(Kind.ACTIVATION, "an activation"), Source(Kind.GRADIENT, "a gradient")
    weight = Source(Kind.WEIGHT, "a weight")

    def told(*found: Source | None) -> Source:
        return of_ranks([packed(one, f"rank {rank}") for rank, one in enumerate(found)])

    assert told(activation, activation, gradient) == Source(Kind.ACTIVATION, "an activation, on rank 0")
    assert told(gradient, gradient, None) == Source(Kind.GRADIENT, "a gradient, on rank 1")
    assert told(activation, weight) == Source(Kind.WEIGHT, "a weight, on rank 1")
    assert told(None, None) == UNKNOWN


@pytest.mark.parametrize("entries", [(2, 2), (2,)], ids=["full", "diagonal"])
def test_a_value_that_overflowed_makes_the_policy_not_finite_and_raises_nothing(entries: tuple[int, ...]) -> None:
    """As in a run of "replace" that diverges: the step is refused for it."""
    value = Value(torch.zeros(2), torch.full(entries, torch.inf))
    policy, before, _ = backward_stage(value, torch.eye(2), torch.ones(2), proximal=False, guard=True)
    assert not torch.isfinite(policy.value.curvature).all()
    assert not torch.isfinite(before.curvature).all()
