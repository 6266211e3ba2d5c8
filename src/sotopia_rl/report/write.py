"""Gathers what the page shows and writes `report.html` and `report.md`.

The page is one file: style, script and charts are inside, nothing is fetched. Whatever comes from a
model, a profile or a config is escaped; utterances may hold anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from sotopia_rl import __version__
from sotopia_rl.episode import Episode, Rating, Seat, Turn, UtteranceReward
from sotopia_rl.evaluate.contrast import Contrast
from sotopia_rl.observe import goal_text, scenario_text
from sotopia_rl.published import beside
from sotopia_rl.report import wording
from sotopia_rl.report.charts import Chart, Span, forest, slopes
from sotopia_rl.report.curves import Curve, curve_views
from sotopia_rl.report.pictures import length_charts, scenario_charts
from sotopia_rl.report.reward_model import reward_model_views
from sotopia_rl.results import (
    HEADLINE,
    METRICS,
    SETTINGS,
    Decomposition,
    Results,
    Row,
    Setting,
    SystemSummary,
    Unpaired,
)


@dataclass(frozen=True)
class ReportInput:
    """Everything the report draws on.

    Attributes:
        curves: By training run, its metrics.
        reward_models: By name, the content of its `report.json`.
        gate_min_spearman: The rank correlation that GRPO asked of them; None where there was no gate.
        episodes: Shown in full, each with its rating and the rewards of its utterances (which may be empty).
        contrasts: Matches shown side by side, as both systems of a comparison played them.
        provenance: Models, prompts, seeds, commands: names to values or to mappings of them.
        notes: Warnings printed on top.
        published: Set published figures beside these, marked as not paired.
    """

    results: Results
    title: str = "Evaluation"
    curves: Mapping[str, Curve] = field(default_factory=dict)
    reward_models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    gate_min_spearman: float | None = None
    episodes: Sequence[tuple[Episode, Rating, Sequence[UtteranceReward]]] = ()
    contrasts: Sequence[Contrast] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    published: bool = False


def write_report(report: ReportInput, out_dir: Path) -> Path:
    """Write `report.html`, `report.md` and `results.json` into `out_dir`; the path of the page."""
    out_dir.mkdir(parents=True, exist_ok=True)
    page = _page(report)
    (out_dir / "report.html").write_text(page, encoding="utf-8")
    (out_dir / "report.md").write_text(_markdown(report), encoding="utf-8")
    report.results.save(out_dir / "results.json")
    return out_dir / "report.html"


@dataclass(frozen=True)
class MetricView:
    """One metric of one comparison, in the settings it was played in."""

    label: str
    rows: Sequence[Row]
    forest: Markup


@dataclass(frozen=True)
class ComparisonView:
    """A table of the page."""

    a: str
    b: str
    scores: Sequence[MetricView]
    guards: Sequence[MetricView]
    splits: Sequence[Decomposition]
    headline: Sequence[Row]
    failed: Sequence[Row]
    """Headline rows with excluded pairs, for their bounds."""
    unpaired: Sequence[Unpaired]


@dataclass(frozen=True)
class TurnView:
    """One turn as a speech bubble."""

    turn: Turn
    name: str
    reward: UtteranceReward | None

    @property
    def tint(self) -> int:
        """Percent of the full colour; rewards run from 0 to 10."""
        return 0 if self.reward is None else round(min(10.0, max(0.0, self.reward.reward)) * 10)


@dataclass(frozen=True)
class EpisodeView:
    """A conversation with who took part and how it was scored."""

    episode: Episode
    rating: Rating
    turns: Sequence[TurnView]
    agents: tuple[str, str]
    """By seat: the name of the system under test, the partner's model string."""
    scenario: str
    goals: tuple[str, str]

    @property
    def seat(self) -> Seat:
        return self.episode.match.seat

    @property
    def greedy(self) -> bool:
        return self.episode.agents[self.seat].sampling.temperature == 0

    @property
    def names(self) -> tuple[str, str]:
        first, second = self.episode.match.characters
        return first.name, second.name


def comparison_views(results: Results) -> list[ComparisonView]:
    """The tables of the page, one per comparison."""
    views = []
    for a, b in wording.comparisons(results):
        metrics = list(dict.fromkeys(r.metric for r in results.rows if (r.system_a, r.system_b) == (a, b)))
        rows = {metric: list(wording.rows_of(results, a, b, metric).values()) for metric in metrics}
        guards = [m for m in metrics if m in METRICS and METRICS[m].guard]
        scores = [m for m in metrics if m not in guards]
        reach = _reach([row for m in scores for row in rows[m]])
        splits = [d for d in results.decompositions if (d.system_a, d.system_b) == (a, b)]
        headline = rows.get(wording.headline_metric(results), [])
        views.append(
            ComparisonView(
                a=a,
                b=b,
                scores=[_metric_view(m, rows[m], reach, ticks=m == scores[-1]) for m in scores],
                guards=[_metric_view(m, rows[m], _reach(rows[m]), ticks=False) for m in guards],
                splits=[d for d in splits if d.metric in HEADLINE],
                headline=headline,
                failed=[row for row in headline if row.num_excluded],
                unpaired=wording.unpaired_of(results, a, b),
            )
        )
    return views


def _reach(rows: Sequence[Row]) -> float:
    """Half the width of a forest plot that shows every interval."""
    ends = [abs(end) for row in rows for end in (row.low, row.high, row.difference) if end is not None]
    return max(ends, default=0.0) * 1.06 or 1.0


def _metric_view(metric: str, rows: Sequence[Row], reach: float, *, ticks: bool) -> MetricView:
    spans = [
        Span(
            row.difference,
            row.low,
            row.high,
            f"{row.setting} {'clear' if wording.is_clear(row) else 'unclear'}",
            f"{wording.label(metric)}, {row.setting}: {wording.effect(row.difference, row.low, row.high)}",
        )
        for row in rows
    ]
    return MetricView(wording.label(metric), rows, forest(spans, reach=reach, ticks=ticks))


def slope_chart(results: Results) -> Chart | None:
    """Every system's mean of the headline metric, sampled and greedy; None unless both were played."""
    metric = wording.headline_metric(results)
    means: dict[str, dict[str, float]] = {}
    for row in results.rows:
        if row.metric == metric:
            means.setdefault(row.system_a, {}).setdefault(row.setting, row.mean_a)
            means.setdefault(row.system_b, {}).setdefault(row.setting, row.mean_b)
    both = [(name, m["sampled"], m["greedy"]) for name, m in means.items() if len(m) == len(SETTINGS)]
    if not both:
        return None
    ranked = sorted(both, key=lambda system: -system[2])
    title = f"{wording.label(metric)}: mean when sampled and when greedy"
    return Chart(title, slopes(ranked, title=title))


def episode_view(
    episode: Episode, rating: Rating, rewards: Sequence[UtteranceReward], systems: Mapping[str, str]
) -> EpisodeView:
    """A conversation with each utterance's reward beside it. `systems`: names by model string."""
    by_turn = {reward.turn: reward for reward in rewards if reward.episode_id == episode.id}
    names = [character.name for character in episode.match.characters]
    turns = [TurnView(turn, names[turn.seat], by_turn.get(turn.index)) for turn in episode.turns]
    match = episode.match
    models = [agent.model for agent in episode.agents]
    models[match.seat] = systems.get(models[match.seat], models[match.seat])
    first, second = models
    goals = (goal_text(match, 0), goal_text(match, 1))
    return EpisodeView(episode, rating, turns, (first, second), scenario_text(match), goals)


@dataclass(frozen=True)
class DuelView:
    """One match as both systems played it."""

    name_a: str
    name_b: str
    metric: str
    setting: Setting
    score_a: float
    score_b: float
    difference: float
    a: EpisodeView
    b: EpisodeView


def duel_views(contrasts: Sequence[Contrast], systems: Mapping[str, str]) -> list[tuple[str, str, list[DuelView]]]:
    """By comparison, its contrasts. `systems`: names by model string."""
    found: dict[tuple[str, str], list[DuelView]] = {}
    for c in contrasts:
        a, b = (episode_view(*talk, (), systems) for talk in (c.a, c.b))
        view = DuelView(c.system_a, c.system_b, c.metric, c.setting, c.score_a, c.score_b, c.difference, a, b)
        found.setdefault((c.system_a, c.system_b), []).append(view)
    return [(a, b, views) for (a, b), views in found.items()]


@dataclass(frozen=True)
class OwnFigure:
    """A system's mean, to stand beside published ones."""

    system: str
    setting: Setting
    metric: str
    mean: float
    num_pairs: int


def own_figures(results: Results) -> list[OwnFigure]:
    """Each system's mean of goal and overall, once per setting."""
    found: dict[tuple[str, Setting, str], OwnFigure] = {}
    for row in results.rows:
        if row.metric in HEADLINE:
            for system, mean in ((row.system_a, row.mean_a), (row.system_b, row.mean_b)):
                figure = OwnFigure(system, row.setting, row.metric, mean, row.num_pairs)
                found.setdefault((system, row.setting, row.metric), figure)
    return list(found.values())


def _page(report: ReportInput) -> str:
    results = report.results
    systems = {s.model: s.system for s in results.systems}
    return (
        environment(html=True)
        .get_template("page.html.jinja")
        .render(
            **_shared(report),
            css=Markup(source("page.css")),  # noqa: S704  our own files
            js=Markup(source("page.js")),  # noqa: S704
            slopes=slope_chart(results),
            pictures=[*scenario_charts(results), *length_charts(results)],
            duels=duel_views(report.contrasts, systems),
            curves={title: view for title, view in curve_views(report.curves).items() if view.charts},
            episodes=[episode_view(*shown, systems) for shown in report.episodes],
        )
    )


def _markdown(report: ReportInput) -> str:
    return environment(html=False).get_template("report.md.jinja").render(**_shared(report))


def _shared(report: ReportInput) -> dict[str, Any]:
    results = report.results
    models = [
        view
        for name, data in report.reward_models.items()
        for view in reward_model_views(name, data, gate_min_spearman=report.gate_min_spearman)
    ]
    summaries: Sequence[SystemSummary] = results.systems
    return {
        "title": report.title,
        "results": results,
        "w": wording,
        "notes": list(dict.fromkeys([*results.notes, *report.notes])),
        "answers": wording.answers(results),
        "comparisons": comparison_views(results),
        "reward_models": models,
        "any_failures": any(s.failures for s in summaries),
        "has_panel": bool(results.parts or results.agreement or results.judge_noise or results.spreads),
        "published": beside(results.manifest) if report.published else [],
        "own": own_figures(results),
        "provenance": report.provenance,
        "version": __version__,
    }


@cache
def environment(*, html: bool) -> Environment:
    """Templates of this folder; escaping is on for pages."""
    made = Environment(
        loader=FunctionLoader(source),
        autoescape=html,  # noqa: S701  Markdown escapes what can break its tables itself
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["cell"] = _markdown_cell
    made.filters["told"] = _told
    return made


def source(name: str) -> str:
    """A file of this folder."""
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _told(value: object) -> str:
    """A fact in one line, whatever it is made of."""
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_told(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_told, value))
    return "none" if value is None else str(value)


def _markdown_cell(value: object) -> str:
    """Text that cannot break out of a table cell or become markup."""
    text = " ".join(str(value).split())
    for character in "\\`*_|<>[]":
        text = text.replace(character, "\\" + character)
    return text
