"""Pictures of a comparison beside its table: scenario by scenario, and score against length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sotopia_rl.report import wording
from sotopia_rl.report.charts import Chart, Line, line_chart, strip
from sotopia_rl.results import SETTINGS, Results, ScenarioRow

WIDTH = 440


def scenario_charts(results: Results) -> Iterator[Chart]:
    """Mean difference in each scenario, one picture per comparison and setting."""
    for a, b in wording.comparisons(results):
        for setting in SETTINGS:
            rows = [r for r in results.scenarios if (r.system_a, r.system_b, r.setting) == (a, b, setting)]
            if len(rows) < 2:
                continue
            named = [(_name(r, rows), r.difference) for r in reversed(rows)]
            title = f"{wording.label(rows[0].metric)}, {a} \N{MINUS SIGN} {b}, {setting}"
            yield Chart(title, strip(named, title=title, width=WIDTH))


def _name(row: ScenarioRow, rows: Sequence[ScenarioRow]) -> str:
    """Its codename, with the end of its id where others have that too."""
    if not row.codename:
        return row.scenario_id
    alone = sum(r.codename == row.codename for r in rows) == 1
    return row.codename if alone else f"{row.codename[:13]} …{row.scenario_id[-4:]}"


def length_charts(results: Results) -> Iterator[Chart]:
    """Score against words per utterance, every scored pair a dot, one picture per setting."""
    for setting in SETTINGS:
        systems = [p for p in results.lengths if p.setting == setting and p.points]
        if not systems:
            continue
        title = f"{wording.label(systems[0].metric)} and words per utterance, {setting}"
        lines = [Line(p.system, p.points, "cloud", place) for place, p in enumerate(systems)]
        described = "; ".join(
            f"{p.system}: {sum(x for x, _ in p.points) / len(p.points):.1f} words, "
            f"{sum(y for _, y in p.points) / len(p.points):.2f} points on average"
            for p in systems
        )
        svg = line_chart(lines, title=title, x_label="words per utterance", described=described, width=WIDTH)
        yield Chart(title, svg, [(place, p.system) for place, p in enumerate(systems)])
