"""Do people, models and methods agree on which utterances mattered?

Labels come from files (people) or from attributions (models, methods). A unit is one utterance on one dimension;
raters need not have rated the same units. Intervals are bootstraps that draw whole episodes, because the utterances
of a conversation are not independent.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from scipy import stats

from sotopia_rl.episode import Attribution, Record
from sotopia_rl.errors import DataError

Level = Literal["nominal", "ordinal", "interval"]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Shared = Mapping[tuple[str, int, str], Mapping[str, float]]
"""Labels by rater, of each unit that has two or more."""
Turns = Callable[[str], Collection[int] | None]
"""Turn indices of an episode's utterances, None where the episode is unknown."""

COLUMNS = ("episode", "turn", "label", "rater")
"""Of a label file; `dimension` may be added."""


class Label(Record):
    """What one rater says of one utterance."""

    episode: str = Field(min_length=1)
    turn: int = Field(ge=0)
    label: float = Field(allow_inf_nan=False)
    rater: str = Field(min_length=1)
    dimension: str = "goal"

    @property
    def unit(self) -> tuple[str, int, str]:
        return self.episode, self.turn, self.dimension


@dataclass(frozen=True)
class LabelFile:
    """Labels of a file, and one line of text per row that was left out."""

    labels: tuple[Label, ...]
    bad: tuple[str, ...] = ()


def labels_of(attributions: Iterable[Attribution]) -> Iterator[Label]:
    """Attributions as labels on 0..1; the rater is `annotator (method)`."""
    for a in attributions:
        for w in a.weights:
            yield Label(
                episode=a.episode_id,
                turn=w.turn,
                label=w.weight / a.top_weight,
                rater=f"{a.annotator} ({a.method})",
                dimension=a.dimension,
            )


# --- label files ---------------------------------------------------------------------------------------------------


def read_labels(path: Path, *, turns: Turns | None = None, on_bad: Literal["raise", "skip"] = "raise") -> LabelFile:
    """Labels of a CSV file (with a header) or a JSON-lines file.

    Args:
        turns: Which utterances there are, to refuse labels of others.
        on_bad: Whether a bad row stops the reading or is left out, and named in the result.

    Raises:
        DataError: The file cannot be read, holds no label or, with `on_bad="raise"`, has a bad row.
    """
    labels: dict[tuple[str, tuple[str, int, str]], Label] = {}
    bad: list[str] = []
    for where, row in _rows(path):
        try:
            label = _label(row, where, turns)
            _refuse_second(label, labels, where)
        except DataError as error:
            if on_bad == "raise":
                raise
            bad.append(str(error))
            continue
        labels[label.rater, label.unit] = label
    if not labels:
        raise DataError(f"{path}: no usable label in it" + (f"; the first problem: {bad[0]}" if bad else ""))
    return LabelFile(tuple(labels.values()), tuple(bad))


def _refuse_second(label: Label, labels: Collection[tuple[str, tuple[str, int, str]]], where: str) -> None:
    if (label.rater, label.unit) in labels:
        raise DataError(f"{where}: {label.rater} has labelled turn {label.turn} of {label.episode} before")


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    """(file:line, row) of each row; a row that cannot be parsed is the text of the problem."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text") from error
    yield from _csv_rows(path, text) if path.suffix.lower() == ".csv" else _json_rows(path, text)


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise DataError(f"{path}:1: the header lacks {', '.join(missing)}; it needs {', '.join(COLUMNS)}")
    known = (*COLUMNS, "dimension")
    for row in reader:
        full = None not in row and None not in row.values()
        kept = {name: value.strip() for name, value in row.items() if name in known and value} if full else None
        yield f"{path}:{reader.line_num}", kept or "has another number of fields than the header"


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield where, f"not JSON ({error.msg})"
        else:
            yield where, row if isinstance(row, dict) else f"expected an object, found {type(row).__name__}"


def _label(row: Mapping[str, Any] | str, where: str, turns: Turns | None) -> Label:
    if isinstance(row, str):
        raise DataError(f"{where}: {row}")
    try:
        label = Label.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        found = "" if first["type"] == "missing" else f" (found {first['input']!r:.40})"
        raise DataError(f"{where}: field {first['loc'][0]}: {first['msg']}{found}") from error
    if turns is not None:
        known = turns(label.episode)
        if known is None:
            raise DataError(f"{where}: unknown episode {label.episode}")
        if label.turn not in known:
            spoken = ", ".join(map(str, sorted(known)))
            raise DataError(f"{where}: turn {label.turn} is no utterance of {label.episode} (those are {spoken})")
    return label


# --- agreement -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A coefficient with its 95% interval; None where the data does not determine it."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.value is None:
            return "undetermined"
        return f"{self.value:.3f}" + (f" [{self.low:.3f}, {self.high:.3f}]" if self.low is not None else "")


@dataclass(frozen=True)
class Pair:
    """Two raters on the units that both rated."""

    raters: tuple[str, str]
    num_units: int
    num_episodes: int
    pearson: Estimate
    spearman: Estimate

    def __str__(self) -> str:
        size = f"{self.num_units} units of {self.num_episodes} episodes"
        return f"{' / '.join(self.raters)}: Pearson {self.pearson}, Spearman {self.spearman}   {size}"


@dataclass(frozen=True)
class Agreement:
    """How far raters agree: all together, and two by two."""

    level: Level
    alpha: Estimate
    num_units: int
    """Units with two labels or more; only these count."""
    num_episodes: int
    raters: tuple[str, ...]
    pairs: tuple[Pair, ...]

    def __str__(self) -> str:
        size = f"{self.num_units} units of {self.num_episodes} episodes"
        first = f"Krippendorff's alpha ({self.level}): {self.alpha}   {size}, {len(self.raters)} raters"
        return "\n".join([first, *map(str, self.pairs)])


def agreement(
    labels: Iterable[Label], *, level: Level = "ordinal", resamples: int = 1000, seed: int = 0, pairs: bool = True
) -> Agreement:
    """Alpha over all raters and, with `pairs`, correlations between each two of them.

    Raises:
        DataError: Fewer than two raters, or no unit that two of them rated.
    """
    by_unit: dict[tuple[str, int, str], dict[str, float]] = {}
    for label in labels:
        by_unit.setdefault(label.unit, {})[label.rater] = label.label
    raters = tuple(sorted({rater for rated in by_unit.values() for rater in rated}))
    shared = {unit: rated for unit, rated in by_unit.items() if len(rated) > 1}
    if not shared:
        raise DataError(f"nothing to compare: no utterance has labels of two raters (raters: {', '.join(raters)})")
    two_by_two = itertools.combinations(raters, 2) if pairs else ()
    correlated = (_pair(a, b, shared, resamples, seed) for a, b in two_by_two)
    return Agreement(
        level=level,
        alpha=_alpha_estimate(shared, level, resamples, seed),
        num_units=len(shared),
        num_episodes=len({unit[0] for unit in shared}),
        raters=raters,
        pairs=tuple(pair for pair in correlated if pair is not None),
    )


def krippendorff_alpha(units: Sequence[Sequence[float]], level: Level = "ordinal") -> float | None:
    """Krippendorff's alpha (Content Analysis, 4th ed., section 12.3), any number of raters, gaps allowed.

    Args:
        units: Per unit the labels it got; units with fewer than two do not count.

    Returns:
        1 - observed / expected disagreement; None where all labels are equal, so that nothing is expected.
    """
    shared = [unit for unit in units if len(unit) > 1]
    return _alpha(_pairs_of(shared), np.ones(len(shared)), level) if shared else None


@dataclass(frozen=True)
class _LabelPairs:
    """Every ordered pair of labels that one unit got.

    `values` are the distinct labels [V]; per pair: its unit, the places of its labels in `values`, and its weight
    1 / (labels of the unit - 1).
    """

    values: Floats
    unit: Ints
    first: Ints
    second: Ints
    weight: Floats


def _pairs_of(units: Sequence[Sequence[float]]) -> _LabelPairs:
    values = np.unique([label for unit in units for label in unit])
    pairs = [
        (number, a, b, 1 / (len(unit) - 1))
        for number, unit in enumerate(units)
        for a, b in itertools.permutations(np.searchsorted(values, unit), 2)
    ]
    number_P, first_P, second_P, weight_P = (np.array(column) for column in zip(*pairs, strict=True))
    return _LabelPairs(values, number_P, first_P, second_P, weight_P)


def _alpha(pairs: _LabelPairs, times_U: Floats, level: Level) -> float | None:
    """Alpha with each unit counted so many times."""
    weight_P = pairs.weight * times_U[pairs.unit]
    totals_V = np.bincount(pairs.first, weights=weight_P, minlength=len(pairs.values))
    total = float(totals_V.sum())
    if level == "nominal":
        distance_P = (pairs.first != pairs.second).astype(float)
        expected = total**2 - float(totals_V @ totals_V)
    else:
        # Ordinal: the place of a label is how many lie below it, its equals counted half.
        place_V = pairs.values if level == "interval" else np.cumsum(totals_V) - totals_V / 2
        place_V = place_V - place_V.mean()
        distance_P = (place_V[pairs.first] - place_V[pairs.second]) ** 2
        expected = 2 * float(total * (totals_V @ place_V**2) - (totals_V @ place_V) ** 2)
    if np.count_nonzero(totals_V) < 2:
        return None
    return float(1 - (total - 1) * (weight_P @ distance_P) / expected)


def _alpha_estimate(shared: Shared, level: Level, resamples: int, seed: int) -> Estimate:
    pairs = _pairs_of([list(rated.values()) for rated in shared.values()])
    episode_U = _numbered([unit[0] for unit in shared])

    def alpha(times_E: Ints) -> float | None:
        return _alpha(pairs, times_E[episode_U].astype(float), level)

    return _estimate(alpha, int(episode_U.max()) + 1, resamples, seed)


def _pair(a: str, b: str, shared: Shared, resamples: int, seed: int) -> Pair | None:
    both = {unit: (rated[a], rated[b]) for unit, rated in shared.items() if a in rated and b in rated}
    if not both:
        return None
    xy_U2 = np.array(list(both.values()))
    episode_U = _numbered([unit[0] for unit in both])
    num_episodes = int(episode_U.max()) + 1

    def correlation(rank: bool) -> Callable[[Ints], float | None]:
        def of(times_E: Ints) -> float | None:
            chosen = np.repeat(xy_U2, times_E[episode_U], axis=0)
            return _pearson(stats.rankdata(chosen, axis=0) if rank else chosen)

        return of

    return Pair(
        raters=(a, b),
        num_units=len(both),
        num_episodes=num_episodes,
        pearson=_estimate(correlation(rank=False), num_episodes, resamples, seed),
        spearman=_estimate(correlation(rank=True), num_episodes, resamples, seed),
    )


def _pearson(xy_U2: Floats) -> float | None:
    """None where one side does not vary, or there are fewer than three units."""
    if len(xy_U2) < 3 or (np.ptp(xy_U2, axis=0) == 0).any():
        return None
    return float(np.asarray(np.corrcoef(xy_U2, rowvar=False))[0, 1])


def _numbered(names: Sequence[str]) -> Ints:
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def _estimate(of: Callable[[Ints], float | None], num_episodes: int, resamples: int, seed: int) -> Estimate:
    """Percentile bootstrap: `of` gets how often each episode counts. No interval from a single episode."""
    value = of(np.ones(num_episodes, dtype=np.int64))
    if value is None or num_episodes < 2:
        return Estimate(value)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(num_episodes, np.full(num_episodes, 1 / num_episodes), size=resamples)
    drawn = [found for times_E in draws if (found := of(times_E)) is not None]
    if len(drawn) < resamples / 2:
        return Estimate(value)
    low, high = (float(np.quantile(drawn, q)) for q in (0.025, 0.975))
    return Estimate(value, min(low, value), max(high, value))
