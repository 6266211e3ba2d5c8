"""Curves of training runs (`metrics.jsonl`), as charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sotopia_rl.report.charts import Chart, Line, Point, line_chart

Curve = Sequence[Mapping[str, Any]]
"""Lines of a `metrics.jsonl`: `step` and numbers."""

MAX_POINTS = 300
"""Points drawn per line; longer curves are thinned."""

CURVES: tuple[tuple[str, dict[str, str]], ...] = (
    ("Loss", {"loss": "training", "eval_loss": "held out"}),
    ("Token accuracy", {"token_accuracy": "training", "eval_token_accuracy": "held out"}),
    ("Reward", {"reward": "after the validity gate", "reward_model_score": "by the reward model"}),
    (
        "Judge, validation matches",
        {"eval_score": "goal", "eval_believability": "believability", "eval_overall": "overall"},
    ),
    ("Valid replies, share", {"validity": "valid"}),
    ("KL from the reference", {"kl": "KL"}),
    ("Entropy, nats per token", {"entropy": "entropy"}),
    ("Reply length, tokens", {"length": "tokens"}),
    ("Replies cut off, share", {"cut_off": "cut off"}),
    ("Leaked secrets, share", {"secret_leaks": "leaks"}),
    ("Groups without signal, share", {"groups_without_signal": "without signal"}),
)
"""Charts of a training run: title, and the metrics drawn in it with their labels."""
SHARES = frozenset({title for title, _ in CURVES if title.endswith(", share")} | {"Token accuracy"})
TITLES = {"base": "Base model", "sft": "SFT", "rm": "Reward model", "grpo": "GRPO"}
"""Of training runs, by stage."""


@dataclass(frozen=True)
class CurveView:
    """One training run: its charts, and what it warned of."""

    charts: Sequence[Chart]
    warnings: Sequence[str]


def curve_view(curve: Curve) -> CurveView:
    """The known metrics of one run; those it lacks are left out, and so is GRPO's loss, which says nothing."""
    reinforced = any("reward" in entry for entry in curve)
    charts = []
    for title, labels in CURVES:
        series = {label: points for name, label in labels.items() if (points := _points(curve, name))}
        if not series or (reinforced and title == "Loss"):
            continue
        lines = [line for place, (label, points) in enumerate(series.items()) for line in _lines(label, points, place)]
        names = list(enumerate(series)) if len(series) > 1 else ()
        natural = (0.0, 1.0) if title in SHARES else None
        svg = line_chart(lines, title=title, x_label="step", y_range=natural, whole_x=True)
        charts.append(Chart(title, svg, names))
    warnings = [f"Step {entry.get('step')}: {entry['warning']}" for entry in curve if entry.get("warning")]
    return CurveView(charts, warnings)


def _points(curve: Curve, name: str) -> list[Point]:
    found = [
        (float(entry["step"]), float(entry[name]))
        for entry in curve
        if isinstance(entry.get(name), int | float) and isinstance(entry.get("step"), int | float)
    ]
    finite = [point for point in found if abs(point[1]) < float("inf")]  # NaN compares false as well
    stride = -(-len(finite) // MAX_POINTS) or 1
    return finite[::stride]


def _lines(name: str, points: list[Point], colour: int) -> list[Line]:
    """The curve; a long one is smoothed, with the raw values faint behind it."""
    if len(points) < 30:
        return [Line(name, points, colour=colour)]
    half = max(1, len(points) // 40)
    smooth = [
        (x, sum(y for _, y in points[max(0, i - half) : i + half + 1]) / len(points[max(0, i - half) : i + half + 1]))
        for i, (x, _) in enumerate(points)
    ]
    return [Line(name, points, "faint", colour), Line(f"{name} (smoothed)", smooth, colour=colour)]


def curve_views(curves: Mapping[str, Curve]) -> dict[str, CurveView]:
    """The views of several runs, by title."""
    return {run_title(name): curve_view(curve) for name, curve in curves.items()}


def run_title(name: str) -> str:
    """`SFT`, `GRPO, arm goal-only`: the title of a run that is named by its stage and its arm."""
    stage, _, arm = name.partition(" ")
    if stage not in TITLES:
        return name
    return f"{TITLES[stage]}, arm {arm}" if arm not in {"", stage} else TITLES[stage]
