"""`gtddp bench step|gram|memory|growth|all`: what is measured in one process, printed and kept."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from tabulate import tabulate

from ..checkpoint import JSON
from ..config_schema import Config
from ..environment import describe_environment, prepare_cpu
from ..errors import OK
from ..files import write_text_atomically
from . import growth_report
from .gram import gram_ways
from .growth import axes, grown, growth
from .memory import step_cost
from .names import GROWTH, REFERENCE, chosen
from .single import check
from .step import CostOf, distinct, measure

What = Literal["step", "gram", "memory", "growth", "all"]


def run_bench(config: Config, what: What, *, as_json: bool, out: Path | None) -> int:
    """Measures, prints and keeps what was asked for; an exit code.

    Raises:
        UserError: a configuration that one process does not measure, or steps that are not finite.
    """
    check(config)
    prepare_cpu(config.train.threads)
    names = chosen(config.bench.optimizers)
    load = os.getloadavg()
    cost_of = functools.cache(functools.partial(step_cost, config))  # rows and memory have the same processes
    varied = grown(config) if what == "all" else config
    if what in ("growth", "all"):
        axes(varied)  # refuses before anything is measured
    content: dict[str, JSON] = {}
    if what in ("step", "all"):
        names = distinct(config, names)
        rows, profiles = measure(config, names, cost_of)
        content["rows"] = [asdict(row) for row in rows]
        content["profile"] = [asdict(profile) for profile in profiles]
    if what in ("gram", "all"):
        content["gram"] = [asdict(way) for way in gram_ways(config)]
    if what in ("memory", "all"):
        sizes = config.bench.batch_sizes or (config.train.batch_size,)
        content["memory"] = _memory(distinct(config, names), sizes, cost_of)
    few = chosen(GROWTH) if config.bench.optimizers is None else names
    points = growth(varied, few) if what in ("growth", "all") else []
    if points:
        content |= growth_report.content(varied, points)
    print(json.dumps(content) if as_json else _tables(content))
    if out is not None:
        content |= {
            "environment": describe_environment(),
            "load_before": list(load),
            "load_after": list(os.getloadavg()),
            "model": config.model.name,
            "batch_size": config.train.batch_size,
            "scope": config.optimizer.scope,
            "dtype": config.train.dtype,
            "image": list(config.bench.image),
            "steps": config.bench.steps,
        }
        out.mkdir(parents=True, exist_ok=True)
        if points:
            growth_report.write(out, varied, points)
        write_text_atomically(out / f"{what}.json", json.dumps(content, indent=1) + "\n")
    return OK


def _memory(names: Sequence[str], sizes: Sequence[int], cost_of: CostOf) -> list[JSON]:
    rows: list[JSON] = []
    for size in sizes:
        costs = {name: cost_of(name, size) for name in names}
        rows += [
            {
                "optimizer": name,
                "batch_size": size,
                "peak_bytes": cost.peak_bytes,
                "tensor_bytes": cost.tensor_bytes,
                "memory_ratio_to_sgd": cost.peak_bytes / costs[REFERENCE].peak_bytes,
                "tensor_ratio_to_sgd": cost.tensor_bytes / costs[REFERENCE].tensor_bytes,
            }
            for name, cost in costs.items()
        ]
    return rows


def _tables(content: dict[str, JSON]) -> str:
    """Every list of figures as a table; of profiles the sums over players, in milliseconds."""
    parts = []
    for name, rows in content.items():
        if isinstance(rows, str):
            parts.append(rows)
            continue
        assert isinstance(rows, list)
        if name == "growth_notes":
            parts.append("\n".join(map(str, rows)))
        elif name == "profile":
            sums: dict[str, dict[str, float]] = {}
            for row in rows:
                assert isinstance(row, dict)
                own, phase = sums.setdefault(str(row["optimizer"]), {}), str(row["phase"])
                own[phase] = own.get(phase, 0.0) + 1e3 * float(row["seconds"])  # type: ignore[arg-type]
            parts.append(
                tabulate([{"ms a step": o, **phases} for o, phases in sums.items()], headers="keys", floatfmt=".4g")
            )
        else:
            shown = [{k: v for k, v in row.items() if not isinstance(v, dict)} for row in rows]  # type: ignore[union-attr]
            parts.append(tabulate(shown, headers="keys", floatfmt=".4g", missingval="-"))
    return "\n\n".join(parts)
