"""The reward model's own report (`train/reward_report.py`), made ready for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from sotopia_rl.errors import DataError
from sotopia_rl.report.charts import Chart, Line, line_chart
from sotopia_rl.report.curves import run_title
from sotopia_rl.report.wording import plain
from sotopia_rl.train.reward_report import OutputReport, RewardReport


@dataclass(frozen=True)
class RewardModelView:
    """One output of a reward model: held-out numbers by name, pictures, and whether GRPO would follow it.

    `passed` is None where no gate was asked for.
    """

    name: str
    numbers: Mapping[str, str]
    charts: Sequence[Chart]
    gate: str
    passed: bool | None


def reward_model_views(name: str, data: Mapping[str, Any], *, gate_min_spearman: float | None) -> list[RewardModelView]:
    """A view per output of the model.

    Raises:
        DataError: `data` is no reward-model report.
    """
    try:
        report = RewardReport.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "top level"
        raise DataError(f"reward model {name!r}: not a reward-model report: {where}: {first['msg']}") from error
    several, title = len(report.outputs) > 1, run_title(name)
    return [
        _view(f"{title}: {output.name}" if several else title, output, report, gate_min_spearman)
        for output in report.outputs
    ]


def _view(name: str, output: OutputReport, report: RewardReport, gate: float | None) -> RewardModelView:
    numbers: dict[str, float | None] = {
        "Pearson correlation": output.pearson,
        "Spearman correlation": output.spearman,
        f"of {output.pairs} pairs (same {report.groups}) in the right order": output.pairwise_accuracy,
        "mean squared error": output.mse,
        "mean squared error of always saying the mean": output.baseline_mse,
        f"rows from {report.held_out_episodes} held-out episodes": output.rows,
    }
    passed = None if gate is None else output.spearman is not None and output.spearman >= gate
    verdict = {None: "", True: "passed", False: "not passed"}[passed]
    return RewardModelView(
        name=name,
        numbers={label: _shown(value) for label, value in numbers.items()},
        charts=[chart for chart in (_calibration(output), _best_of_n(output)) if chart],
        gate=f"gate {verdict}: Spearman at least {gate:g}" if gate is not None else "",
        passed=passed,
    )


def _shown(value: float | None) -> str:
    if value is None:
        return "undefined"
    return str(value) if isinstance(value, int) else plain(value, 3)


def _calibration(output: OutputReport) -> Chart | None:
    points = [(b.predicted, b.actual) for b in output.calibration]
    if not points:
        return None
    title = "Calibration: mean target by prediction"
    lines = [Line("mean target", points), Line("mean target", points, "dots")]
    return Chart(title, line_chart(lines, title=title, x_label="mean prediction", diagonal=True))


def _best_of_n(output: OutputReport) -> Chart | None:
    """True value of the reply picked among n, beside the best pick possible and a random one."""
    curve = output.best_of_n
    if not curve:
        return None
    title = "Best of n: target of the pick"
    chosen = [(float(b.n), b.chosen) for b in curve]
    lines = [
        Line("picked by the model", chosen),
        Line("picked by the model", chosen, "dots"),
        Line("best possible", [(float(b.n), b.oracle) for b in curve], "dashed", 1),
        Line("at random", [(float(b.n), b.random) for b in curve], "dashed", 5),
    ]
    names = [(line.colour, line.label) for line in lines if line.style != "dots"]
    return Chart(title, line_chart(lines, title=title, x_label="n", whole_x=True), names)
