"""`gtddp bench growth`: sizes are what they say, exponents are right, and files are complete."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from gtddp_dist.bench.growth import Axis, Point, Sizes, axes, grown, resized
from gtddp_dist.bench.growth_report import notes, slopes
from gtddp_dist.bench.step import Row
from gtddp_dist.bench.subject import new_model
from gtddp_dist.cli import main
from gtddp_dist.config import load_config
from gtddp_dist.errors import BAD_INPUT, OK, UserError

SMALL = (
    "bench.image=[1,8,8]",
    "bench.steps=1",
    "bench.warmup=0",
    "train.device=cpu",
    "train.batch_size=8",
    "bench.optimizers=[gtddp-sgd]",
    "model.blocks=1",
    "model.width=4",
)


def point(axis: Axis, size: int, optimizer: str, seconds: float, peak_bytes: int, gram: float = 0.0) -> Point:
    row = Row(
        optimizer=optimizer,
        seconds=seconds,
        time_ratio_to_sgd=1.0,
        fastest_ratio=1.0,
        slowest_ratio=1.0,
        memory_ratio_to_sgd=1.0,
        peak_bytes=peak_bytes,
        tensor_bytes=7,
        flops=10.0 * size + gram,
        flops_ratio_to_sgd=1.0,
        time_over_flops=1.0,
        flop_limit=1.0,
        flops_over_limit=1.0,
        seconds_by_kind={},
    )
    phases = {"forward": 10.0 * size} | ({"gram": gram} if gram else {})
    sizes = {"batch": 1, "depth": 1, "width": 1, axis: size}
    return Point(axis, Sizes(**sizes), row, phases)


def test_exponents_by_hand() -> None:
    """seconds = 3 n^2; Gram matrices n + n^2, whose exponent rises; memory that is 0 has none, tensors stay."""
    points = [point("batch", n, "sgd", 0.1 * n, 100) for n in (2, 4, 8)]
    points += [point("batch", n, "gtddp-sgd", 3.0 * n**2, 0, n + n**2) for n in (2, 4, 8)]
    points.append(point("width", 4, "sgd", 1.0, 100))  # one size is no line
    found = {(s.optimizer, s.quantity): s for s in slopes(points)}
    assert {s.axis for s in found.values()} == {"batch"}
    seconds, gram = found["gtddp-sgd", "seconds"], found["gtddp-sgd", "flops gram"]
    assert [seconds.slope, seconds.slope_at_end] == pytest.approx([2.0, 2.0])
    # log2 of 6, 20, 72: the line's slope is that between the ends, the last one log2(72 / 20).
    assert [gram.slope, gram.slope_at_end] == pytest.approx([1.79248, 1.84800], abs=1e-5)
    assert found["sgd", "tensor_bytes"].slope == pytest.approx(0.0)
    assert found["sgd", "peak_bytes"].slope == pytest.approx(0.0)
    assert ("gtddp-sgd", "peak_bytes") not in found
    (said,) = notes(load_config("bench-growth", []), points)
    assert "forward B^1.00" in said and "B^1.79, B^1.85 at the end, where they are 47 % of all" in said
    assert "at B = 8 a step takes 240.00 times sgd's time" in said


def test_blocks_are_all_alike_at_every_size() -> None:
    config = load_config("bench-growth", [*SMALL, "optimizer.scope=8"])

    def parameters(sizes: Sizes) -> int:
        return sum(p.numel() for p in new_model(resized(config, sizes)).parameters())

    one, two, four = (parameters(Sizes(8, depth, 4)) for depth in (1, 2, 4))
    assert four - two == 2 * (two - one) == 2 * 2 * (4 * 4 * 9 + 2 * 4)  # two convolutions, BatchNorm without bias
    assert resized(config, Sizes(4, 1, 4)).optimizer.scope == 4
    vit = load_config(
        "bench-growth",
        [*SMALL[:-2], "model.name=vit", "model.blocks=1", "model.batch_norm=false", "model.width=8", "model.heads=2"],
    )
    grown_vit = resized(vit, Sizes(8, 3, 16)).model
    assert (grown_vit.depth, grown_vit.width) == (3, 16)


def test_axes_and_networks_without_one() -> None:
    config = load_config("bench-growth", [*SMALL, "bench.batch_sizes=[16,8,8]", "bench.widths=[]"])
    assert axes(config) == {"batch": (8, 16), "depth": (1, 2, 4, 8)}
    assert grown(config) is config
    resnet = load_config("bench-step", ["bench.depths=[1]", "train.device=cpu"])
    with pytest.raises(UserError, match=r"model\.name=resnet18: has no depth.*bench\.depths=\[\].*small-resnet"):
        axes(resnet)
    instead = grown(resnet)
    assert (instead.model.name, instead.optimizer.scope) == ("small-resnet", "batch")
    assert instead.bench.depths == (1,) and instead.train.device == "cpu"


def test_growth_of_a_small_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SMALL, "bench.batch_sizes=[8,16]", "bench.depths=[]", "bench.widths=[4]"]
    assert main(["bench", "growth", *words, "--json", "--out", str(tmp_path)]) == OK
    told = json.loads(capsys.readouterr().out)
    assert [(p["axis"], p["batch"], p["width"], p["optimizer"]) for p in told["growth"]] == [
        (axis, batch, width, name)
        for axis, batch, width in (("batch", 8, 4), ("batch", 16, 4), ("width", 8, 4))
        for name in ("sgd", "gtddp-sgd")
    ]
    for p in told["growth"]:
        assert p["seconds"] > 0 and p["tensor_bytes"] > 0
        assert sum(p["flops_by_phase"].values()) == pytest.approx(p["flops"])
    slope = {(s["optimizer"], s["quantity"]): s["slope"] for s in told["growth_slopes"]}
    for name, phase in (("sgd", "backward"), ("gtddp-sgd", "input-gradient"), ("gtddp-sgd", "weight-gradient")):
        assert slope[name, f"flops {phase}"] == pytest.approx(1.0)
    assert 1.0 < slope["gtddp-sgd", "flops gram"] < 2.0
    (said,) = told["growth_notes"]
    assert f"Gram matrices as B^{slope['gtddp-sgd', 'flops gram']:.2f}" in said
    with open(tmp_path / "growth.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["seconds"]) for line in lines] == [p["seconds"] for p in told["growth"]]
    assert [float(line["flops gram"]) for line in lines] == [p["flops_by_phase"].get("gram", 0) for p in told["growth"]]
    with open(tmp_path / "growth-slopes.csv", newline="") as file:
        assert [float(line["slope"]) for line in csv.DictReader(file)] == [s["slope"] for s in told["growth_slopes"]]
    page = (tmp_path / "growth.md").read_text()
    assert said in page and page.count("\n| batch ") == 2 + 4 and page.count("\n| width ") == 2
    assert (tmp_path / "growth.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    kept = json.loads((tmp_path / "growth.json").read_text())
    assert kept["growth"] == told["growth"] and kept["environment"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("growth", "bench-step"), "model.name=resnet18: has no depth to vary"),
        (("growth", "--ranks", "2"), "--ranks: bench growth measures one process"),
        (("growth", "bench.depths=[0]"), "bench.depths"),
    ],
)
def test_bad_requests(words: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) == BAD_INPUT
    assert message in capsys.readouterr().err
