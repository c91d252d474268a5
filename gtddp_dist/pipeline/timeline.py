"""A picture of one step: what every rank does when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..files import write_atomically
from .instructions import Op
from .simulate import Timeline

# After Okabe and Ito: told apart by readers who see fewer colours, and in grey.
_COLOURS: Mapping[Op, tuple[str, str]] = {
    Op.FORWARD: ("#9ecae9", "forward"),
    Op.BACKWARD: ("#4c78a8", "backward"),
    Op.COTANGENT: ("#b79ad1", "cotangent"),
    Op.GRAM: ("#f2b14b", "Gram matrices"),
    Op.SWEEP: ("#d62728", "sweep, feedback (widened where too short to see)"),
    Op.FEEDBACK: ("#d62728", "sweep, feedback (widened where too short to see)"),
    Op.WEIGHT: ("#6bb38a", "weight-gradients"),
    Op.STATISTICS: ("#8a6d5b", "curvature statistics"),
    Op.ROLLOUT: ("#3a8f5f", "rollout"),
    Op.REDUCE: ("#c9c9c9", "sum over replicas"),
    Op.AGREE: ("#e8e8e8", "agreement"),
    Op.UPDATE: ("#7f7f7f", "update"),
}
_WHITE_TEXT = (Op.BACKWARD, Op.STATISTICS, Op.ROLLOUT)
_NUMBERED = (Op.FORWARD, Op.BACKWARD, Op.COTANGENT, Op.GRAM, Op.WEIGHT)
_LEAST_NUMBER = 0.011  # of the axis: narrower boxes have no room for a number
_LEAST_SWEEP = 0.0016  # of the axis: what a sweep is widened to


@dataclass
class _Boxes:
    """Boxes of one rank: start and width, and colour."""

    spans: list[tuple[float, float]] = field(default_factory=list)
    colours: list[str] = field(default_factory=list)


def plot_timelines(path: Path, timelines: Mapping[str, Timeline], title: str) -> None:
    """Draws timelines above each other on one time axis.

    Args:
        path: the picture to write; its ending says in which format.
        timelines: heading -> timeline.
        title: above the picture.
    """
    # Imported here: it takes a second. The Figure class draws without a display.
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    longest = max(timeline.seconds for timeline in timelines.values())
    scale, unit = (1e3, "ms") if longest < 10 else (1.0, "s")
    ranks = [len(timeline.work) for timeline in timelines.values()]
    height = 1.5 + sum(min(0.42 * n, 8) + 0.62 for n in ranks)
    figure = Figure(figsize=(11, height), layout="constrained")
    panels = figure.subplots(len(timelines), 1, sharex=True, squeeze=False, height_ratios=ranks)[:, 0]
    seen: dict[str, str] = {}
    least_sweep, least_number = _LEAST_SWEEP * scale * longest, _LEAST_NUMBER * scale * longest
    for axes, (heading, timeline) in zip(panels, timelines.items(), strict=True):
        for rank in range(len(timeline.work)):
            # One collection a rank and layer: a patch an event would take minutes for a deep pipe.
            layers: tuple[_Boxes, _Boxes] = _Boxes(), _Boxes()
            for event in (event for event in timeline.events if event.rank == rank):
                colour, name = _COLOURS[event.op]
                seen.setdefault(name, colour)
                start, width = scale * event.start, scale * (event.end - event.start)
                sweep = event.op in (Op.SWEEP, Op.FEEDBACK)
                layers[sweep].spans.append((start, max(width, least_sweep) if sweep else width))
                layers[sweep].colours.append(colour)
                if event.op in _NUMBERED and width >= least_number:
                    axes.text(
                        start + width / 2,
                        rank,
                        str(event.unit),
                        ha="center",
                        va="center",
                        zorder=4,
                        fontsize=7.5,
                        color="white" if event.op in _WHITE_TEXT else "#222222",
                    )
            for depth, (boxes, border) in enumerate(zip(layers, (0.6, 0.0), strict=True), start=2):
                axes.broken_barh(
                    boxes.spans,
                    (rank - 0.4, 0.8),
                    facecolors=boxes.colours,
                    edgecolors="white",
                    linewidth=border,
                    zorder=depth,
                )
        count = len(timeline.work)
        axes.set_ylim(count - 0.45, -0.55)
        axes.set_yticks(range(count), [f"rank {rank}" for rank in range(count)])
        axes.set_title(heading, fontsize=10, loc="left")
        axes.set_xlim(0, scale * longest * 1.01)
        axes.axvline(scale * timeline.seconds, color="#444444", linewidth=0.9, linestyle=":")
        axes.tick_params(axis="y", length=0)
        axes.set_facecolor("#fafafa")
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    panels[-1].set_xlabel(f"time ({unit})")
    order = [name for name in dict.fromkeys(name for _, name in _COLOURS.values()) if name in seen]
    figure.legend(
        handles=[Patch(facecolor=seen[name], label=name) for name in order],
        loc="outside lower center",
        ncols=min(len(order), 6),
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(title, fontsize=11)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150))
