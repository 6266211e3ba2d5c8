"""How much of what is measured is the judge, and how much the partner.

Three questions. Do the judges of a panel agree (Krippendorff's alpha)? Does a judge agree with itself, asked again? And
of the spread of the paired differences, which part comes from scenarios, partners, judges and the conversations
themselves? What a design cannot tell apart is said to be so; nothing is assumed in its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sotopia_rl.agreement import Label, agreement
from sotopia_rl.evaluate.cells import Cell, Cells, PairKey
from sotopia_rl.evaluate.paired import shared_keys
from sotopia_rl.results import SCORES, SETTINGS, Component, JudgeAgreement, JudgeNoise, Spread
from sotopia_rl.statistics import cluster_index, paired_difference
from sotopia_rl.variance import Floats, Labels, half_squared_difference, jackknife


def judge_agreement(by_judge: Mapping[str, Cells], scenario_of: Mapping[str, str]) -> list[JudgeAgreement]:
    """Agreement per dimension over every episode that all judges scored, whoever played it."""
    if len(by_judge) < 2:
        return []
    panel = list(by_judge.values())
    shared: list[tuple[PairKey, list[Mapping[str, float]]]] = []
    for place in panel[0]:
        cells = [cells[place] for cells in panel if place in cells]
        if len(cells) == len(panel):
            keys = sorted(set.intersection(*(set(cell.scored) for cell in cells)))
            shared += [(key, [cell.scored[key] for cell in cells]) for key in keys]
    return [
        _agreement(metric, list(by_judge), shared, scenario_of)
        for metric in SCORES
        if shared and all(metric in scores for _, panel_scores in shared for scores in panel_scores)
    ]


def _agreement(
    metric: str,
    judges: Sequence[str],
    shared: Sequence[tuple[PairKey, Sequence[Mapping[str, float]]]],
    scenario_of: Mapping[str, str],
) -> JudgeAgreement:
    scenarios = [scenario_of[match_id] for (match_id, _), _ in shared]
    # The bootstrap of `agreement` draws whole episodes; the units to be drawn whole here are scenarios.
    labels = (
        Label(episode=scenario, turn=number, label=scores[metric], rater=judge, dimension=metric)
        for number, (scenario, (_, panel)) in enumerate(zip(scenarios, shared, strict=True))
        for judge, scores in zip(judges, panel, strict=True)
    )
    alpha = agreement(labels, level="interval", pairs=False).alpha
    return JudgeAgreement(
        metric=metric,
        num_episodes=len(shared),
        num_scenarios=len(set(scenarios)),
        alpha=alpha.value,
        low=alpha.low,
        high=alpha.high,
        means={j: float(np.mean([panel[i][metric] for _, panel in shared])) for i, j in enumerate(judges)},
    )


def judge_noise(by_judge: Mapping[str, Cells], scenario_of: Mapping[str, str]) -> list[JudgeNoise]:
    """Spread of repeated judgements of one episode, per judge and dimension; nothing where none was repeated."""
    found = []
    for judge, cells in by_judge.items():
        again = [(key, metrics) for cell in cells.values() for key, metrics in cell.repeats.items()]
        for metric in SCORES if again else ():
            if not all(metric in said for _, metrics in again for said in metrics):
                continue  # a judge may have been asked for other dimensions
            variances = [float(np.var([m[metric] for m in metrics], ddof=1)) for _, metrics in again]
            mean = paired_difference(variances, [scenario_of[match_id] for (match_id, _), _ in again])
            found.append(
                JudgeNoise(
                    judge=judge,
                    metric=metric,
                    num_episodes=len(again),
                    num_judgements=sum(len(metrics) for _, metrics in again),
                    sd=math.sqrt(mean.value),
                    low=None if mean.low is None else math.sqrt(max(0.0, mean.low)),
                    high=None if mean.high is None else math.sqrt(max(0.0, mean.high)),
                )
            )
    return found


@dataclass(frozen=True)
class _Differences:
    """Paired differences as single judges see them, [N]: one per pair and judge."""

    values: Floats
    labels: Labels
    noise: Floats
    """Variance that repeated judgement adds to each difference; NaN where it was not measured."""
    scenarios: Sequence[str]
    num_pairs: int

    def many(self, factor: str) -> bool:
        return bool(self.labels[factor].max() > 0)

    @property
    def replicated(self) -> bool:
        """Whether any scenario was played more than once against one partner."""
        return (
            half_squared_difference(self.values, self.labels, same=("scenario", "partner"), different=("pair",))
            is not None
        )


def spread(
    a_and_b: Mapping[str, tuple[Cell, Cell]], scenario_of: Mapping[str, str], metric: str, *, confidence: float
) -> Spread | None:
    """Variance components of the difference of A and B in one setting.

    Args:
        a_and_b: By judge.

    Returns:
        None where fewer than two scenarios or three differences are there.
    """
    data = _differences(a_and_b, scenario_of, metric)
    if data is None:
        return None
    first, second = next(iter(a_and_b.values()))
    ends = jackknife(lambda kept: _components(data, kept), data.scenarios, confidence=confidence)
    components = [
        Component(
            source=source,
            variance=value,
            low=None if (between := ends[source]) is None else between[0],
            high=None if between is None else between[1],
            note=_note(source, data),
        )
        for source, value in _components(data, np.ones(len(data.values), dtype=bool)).items()
    ]
    return Spread(
        system_a=first.system,
        system_b=second.system,
        setting=first.setting,
        metric=metric,
        num_pairs=data.num_pairs,
        num_scenarios=len(set(data.scenarios)),
        components=tuple(components),
    )


def _differences(
    a_and_b: Mapping[str, tuple[Cell, Cell]], scenario_of: Mapping[str, str], metric: str
) -> _Differences | None:
    rows = [
        (key, judge, a.scored[key][metric] - b.scored[key][metric], _repeat_variance(a, b, key, metric))
        for judge, (a, b) in a_and_b.items()
        for key in shared_keys(a, b)
        if metric in a.scored[key] and metric in b.scored[key]
    ]
    scenarios = [scenario_of[key[0]] for key, *_ in rows]
    if len(rows) < 3 or len(set(scenarios)) < 2:
        return None
    columns = {
        "scenario": scenarios,
        "partner": [key[1] for key, *_ in rows],
        "judge": [judge for _, judge, *_ in rows],
        "pair": ["\n".join(key) for key, *_ in rows],
    }
    return _Differences(
        values=np.array([value for *_, value, _ in rows]),
        labels={name: cluster_index(column) for name, column in columns.items()},
        noise=np.array([noise for *_, noise in rows]),
        scenarios=scenarios,
        num_pairs=len({key for key, *_ in rows}),
    )


def _repeat_variance(a: Cell, b: Cell, key: PairKey, metric: str) -> float:
    """Of the difference: both sides were judged."""
    if any(metric not in said for cell in (a, b) for said in cell.repeats.get(key, ({},))):
        return math.nan
    return sum(float(np.var([m[metric] for m in cell.repeats[key]], ddof=1)) for cell in (a, b))


def _components(data: _Differences, kept: npt.NDArray[np.bool_]) -> dict[str, float | None]:
    """Variance by source, for one pair as one judge sees it; None where the design cannot tell."""
    values, labels = data.values[kept], {name: column[kept] for name, column in data.labels.items()}

    def g(same: Sequence[str], different: Sequence[str]) -> float | None:
        return half_squared_difference(values, labels, same=same, different=different)

    many_partners, many_judges = data.many("partner"), data.many("judge")
    elsewhere = ("scenario", "partner") if many_partners else ("scenario",)
    far = g(("judge",), elsewhere)
    same_scenario = g(("judge", "scenario"), ("partner" if many_partners else "pair",))
    near = g(("judge", "scenario", "partner"), ("pair",))
    scenario = _minus(far, same_scenario)
    partner = _minus(far, g(("judge", "partner"), ("scenario",))) if many_partners else None
    judge = _minus(g((), ("judge", *elsewhere)), far) if many_judges else None
    taste = _minus(g(("pair",), ("judge",)), judge) if many_judges else None
    measured = data.noise[kept]
    measured = measured[~np.isnan(measured)]
    noise = float(measured.mean()) if len(measured) else None
    return {
        "scenario": scenario,
        "partner": partner,
        "scenario x partner": _minus(far, scenario, partner, near) if many_partners else None,
        "judge": judge,
        "judge x conversation": _minus(taste, noise) if noise is not None and many_judges else taste,
        "judge noise": noise,
        "conversation": _minus(
            near if data.replicated else _minus(far, scenario or 0.0, partner or 0.0),
            taste if many_judges else noise or 0.0,
        ),
    }


def _minus(first: float | None, *others: float | None) -> float | None:
    if first is None or any(value is None for value in others):
        return None
    return first - sum(value for value in others if value is not None)


def _note(source: str, data: _Differences) -> str:
    """What a reader must know of an estimate, or why there is none."""
    judges, partners, repeated = data.many("judge"), data.many("partner"), not bool(np.isnan(data.noise).all())
    once = "" if data.replicated else "every scenario once per partner: inside conversation"
    inside_scenario = "" if partners else "one partner: inside scenario"
    notes = {
        "scenario": "" if partners else once or "one partner: holds what depends on scenario and partner",
        "partner": _of_few(data, "partner"),
        "scenario x partner": once or inside_scenario,
        "judge": _of_few(data, "judge"),
        "judge x conversation": ("" if repeated else "holds the judges' own noise")
        if judges
        else "one judge: cannot be told",
        "judge noise": "" if repeated else "no episode was judged twice: not apart (--repeat-judge 2)",
        "conversation": "; ".join(
            note
            for note in (
                "" if judges or repeated else "holds the judge's noise",
                "" if data.replicated else "every scenario once per partner: holds what depends on both",
            )
            if note
        ),
    }
    return notes[source]


def _of_few(data: _Differences, factor: str) -> str:
    count = int(data.labels[factor].max()) + 1
    if count == 1:
        return f"one {factor}: cannot be told"
    return f"{count} {factor}s: speaks of these, hardly of others" if count < 6 else ""


def spreads(
    by_judge: Mapping[str, Cells],
    comparisons: Sequence[tuple[str, str]],
    scenario_of: Mapping[str, str],
    metric: str,
    *,
    confidence: float,
) -> Iterator[Spread]:
    """One table per comparison and setting in which every judge saw both systems."""
    for a, b in comparisons:
        for setting in SETTINGS:
            a_and_b = {
                judge: (cells[a, setting], cells[b, setting])
                for judge, cells in by_judge.items()
                if (a, setting) in cells and (b, setting) in cells
            }
            found = spread(a_and_b, scenario_of, metric, confidence=confidence) if a_and_b else None
            if found is not None:
                yield found
