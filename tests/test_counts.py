"""What a step takes, counted: operations and bytes equal the recorded numbers exactly.

A change that saves or adds work on purpose renews the record: .venv/bin/python tests/test_counts.py
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from bench_net import BENCH_RESNET

from gtddp_dist.bench.names import CONTENDERS
from gtddp_dist.bench.single import Contender, batch
from gtddp_dist.bench.tally import Counts, counted
from gtddp_dist.config import load_config

RECORD = Path(__file__).with_name("counts.json")
CONFIG = load_config(
    "bench-step",
    [
        *BENCH_RESNET,
        "train.batch_size=8",
        "optimizer.scope=4",
        "train.device=cpu",
    ],
)
OURS = [name for name, entry in CONTENDERS.items() if entry.peer is None]


def counts(name: str) -> dict[str, Counts]:
    """Of a step of every kind, after a first one."""
    contender = Contender(CONFIG, name)
    images, labels = batch(CONFIG, contender.device, seed=0)
    contender.step(images, labels)
    return {
        kind.name: counted(lambda kind=kind: contender.step(images, labels, kind))  # type: ignore[misc]
        for kind in contender.kinds
    }


@pytest.mark.parametrize("name", OURS)
def test_a_step_takes_what_is_recorded(name: str) -> None:
    record = json.loads(RECORD.read_text())
    if record["torch"] != torch.__version__.partition("+")[0]:
        pytest.skip(f"recorded with torch {record['torch']}, whose operations have other parts")
    assert {kind: asdict(found) for kind, found in counts(name).items()} == record["steps"][name]


if __name__ == "__main__":
    steps = {name: {kind: asdict(found) for kind, found in counts(name).items()} for name in OURS}
    content = {"torch": torch.__version__.partition("+")[0], "steps": steps}
    RECORD.write_text(json.dumps(content, indent=1) + "\n")
