"""The reward model's own report (`report.json`), made ready for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sotopia_rl.report.charts import Chart, Line, line_chart
from sotopia_rl.report.wording import plain

NUMBERS: dict[str, str] = {
    "mse": "mean squared error",
    "baseline_mse": "the same, predicting the mean",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "pairwise_accuracy": "pairwise accuracy within a prompt",
    "num_rows": "held-out rows",
}
"""Keys of the report shown as tiles."""


@dataclass(frozen=True)
class RewardModelView:
    """Held-out numbers by name, pictures, and whether GRPO would take the model.

    `passed` is None where the report states no gate.
    """

    numbers: Mapping[str, str]
    charts: Sequence[Chart]
    gate: str
    passed: bool | None


def reward_model_view(report: Mapping[str, Any]) -> RewardModelView:
    """Whatever of the known keys the report has; a key it lacks is left out."""
    numbers = {label: _shown(report[key]) for key, label in NUMBERS.items() if isinstance(report.get(key), int | float)}
    charts = [
        chart for chart in (_calibration(report.get("calibration")), _best_of_n(report.get("best_of_n"))) if chart
    ]
    gate = report.get("gate")
    passed = gate.get("passed") if isinstance(gate, Mapping) else None
    text = {True: "gate passed", False: "below the gate", None: ""}[passed]
    return RewardModelView(numbers, charts, text, passed)


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else plain(value, 3)


def _pairs(points: object, x: str, y: str) -> list[tuple[float, float]]:
    if not isinstance(points, Sequence):
        return []
    return [
        (float(p[x]), float(p[y]))
        for p in points
        if isinstance(p, Mapping) and isinstance(p.get(x), int | float) and isinstance(p.get(y), int | float)
    ]


def _calibration(bins: object) -> Chart | None:
    """Mean target against mean prediction, per bin of predictions."""
    points = _pairs(bins, "predicted", "actual")
    if not points:
        return None
    title = "Calibration: mean target by mean prediction"
    lines = [Line("target", points, "line"), Line("target", points, "dots")]
    return Chart(title, line_chart(lines, title=title, x_label="prediction", diagonal=True))


def _best_of_n(curve: object) -> Chart | None:
    """True value of the utterance that the model picks among n."""
    points = _pairs(curve, "n", "value")
    if not points:
        return None
    title = "Best of n: true value of the pick"
    lines = [Line("picked by the model", points, "line"), Line("picked by the model", points, "dots")]
    if oracle := _pairs(curve, "n", "oracle"):
        lines.append(Line("best possible", oracle, "dashed", 1))
    if chance := _pairs(curve, "n", "random"):
        lines.append(Line("picked at random", chance, "dashed", 5))
    names = [(line.colour, line.label) for line in lines if line.style != "dots"]
    return Chart(title, line_chart(lines, title=title, x_label="n"), names)
