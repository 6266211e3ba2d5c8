"""The records of an evaluation: its settings, and `results.json`.

What the numbers mean stands here; how they come about is in `evaluate/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self, get_args

from pydantic import Field, ValidationError

from sotopia_rl.config import Config
from sotopia_rl.dimensions import SOTOPIA_DIMENSIONS
from sotopia_rl.episode import Record
from sotopia_rl.errors import DataError
from sotopia_rl.statistics import Estimate

Setting = Literal["sampled", "greedy"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)


class Metric(Record):
    """What a column of results means."""

    label: str
    low: float | None = None
    high: float | None = None
    """Ends of the range, for bounding what failures could change; None where there is none."""
    guard: bool = False
    """Shown beside the scores because judges reward it, or because a score can be bought with it."""


_FIRST = ("goal", "relationship", "knowledge")
SCORES: dict[str, Metric] = {
    d.name: Metric(label=d.name.replace("_", " ").capitalize(), low=d.low, high=d.high)
    for d in sorted(SOTOPIA_DIMENSIONS, key=lambda d: _FIRST.index(d.name) if d.name in _FIRST else len(_FIRST))
} | {
    "overall": Metric(
        label="Overall",
        low=sum(d.low for d in SOTOPIA_DIMENSIONS) / len(SOTOPIA_DIMENSIONS),
        high=sum(d.high for d in SOTOPIA_DIMENSIONS) / len(SOTOPIA_DIMENSIONS),
    )
}
"""The judge's dimensions, the trained ones first, and their mean."""
GUARDS: dict[str, Metric] = {
    "secret_leaks": Metric(label="Episodes with a leak", low=0, high=1, guard=True),
    "words_per_utterance": Metric(label="Words per utterance", guard=True),
    "num_turns": Metric(label="Turns", guard=True),
    "repetition": Metric(label="Repeated utterances", low=0, high=1, guard=True),
    "invalid_replies": Metric(label="Invalid replies per turn", guard=True),
}
METRICS: dict[str, Metric] = SCORES | GUARDS

HEADLINE = ("goal", "overall")
"""What an answer, a picture and whatever costs time is about: the first of these that is there."""


class EvaluateConfig(Config):
    """How comparisons are computed."""

    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Level of the intervals."""
    num_draws: int = Field(default=20_000, ge=999)
    """Sign patterns drawn for a p-value where there are too many scenarios to enumerate them."""
    power: float = Field(default=0.8, gt=0, lt=1)
    """Chance with which `detectable` would be found."""
    wanted_points: float = Field(default=0.5, gt=0)
    """A difference worth finding, in points: each score says how many scenarios would find it."""
    seed: int = Field(default=0, ge=0)
    """Of the drawn sign patterns."""


class Effect(Record):
    """A difference with its interval."""

    value: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, estimate: Estimate) -> Self:
        return cls(value=estimate.value, low=estimate.low, high=estimate.high)


class Row(Record):
    """One metric of one comparison. `difference` is `mean_a - mean_b`, over the pairs that both scored."""

    system_a: str
    system_b: str
    setting: Setting
    metric: str
    num_pairs: int
    num_scenarios: int
    num_excluded: int
    """Pairs left out because one side has no score."""
    mean_a: float
    mean_b: float
    difference: float
    low: float | None
    high: float | None
    """Ends of the interval; None with fewer than two scenarios."""
    standard_error: float | None
    df: float | None
    p_value: float
    """Sign-flip permutation test over scenarios."""
    p_holm: float
    """Adjusted (Holm) for all scores, or all guards, of this comparison and setting."""
    detectable: float | None
    """The true difference that a comparison of this precision finds with the configured power."""
    worst: float | None
    best: float | None
    """Difference had every excluded pair gone as badly, or as well, as the range allows."""
    equal_length: Effect | None = None
    """The difference where both say equally many words per utterance; None where that cannot be told."""
    required_scenarios: int | None = None
    """Scenarios, with as many pairs in each, that find `config.wanted_points`; None where no plan is possible."""


class Unpaired(Record):
    """A comparison in one setting that nothing answers: no pair has a score on both sides.

    Why is in `Results.systems`, side by side.
    """

    system_a: str
    system_b: str
    setting: Setting
    num_excluded: int


class Decomposition(Record):
    """Where A's gain over B in the sampled setting comes from, over pairs scored in all four cells.

    `sampled_gain = greedy_gain + noise_saving`: what is left when neither samples, and how much less A
    loses by sampling than B does.
    """

    system_a: str
    system_b: str
    metric: str
    num_pairs: int
    num_scenarios: int
    sampled_gain: Effect
    greedy_gain: Effect
    noise_saving: Effect
    noise_cost_a: Effect
    """Greedy minus sampled, for A."""
    noise_cost_b: Effect
    over_greedy_b: Effect
    """A sampled minus B greedy: what A gains beyond what B gets by merely not sampling."""


class SystemSummary(Record):
    """What became of one system's pairs in one setting."""

    system: str
    setting: Setting
    model: str
    planned: int
    scored: int
    failures: dict[str, int]
    """Pairs without a score, by cause."""


class Part(Record):
    """A row of one judge of the panel alone, or against one partner alone."""

    by: Literal["judge", "partner"]
    name: str
    row: Row


class ScenarioRow(Record):
    """Mean difference of the headline metric in one scenario; too few pairs for an interval of its own."""

    system_a: str
    system_b: str
    setting: Setting
    metric: str
    scenario_id: str
    codename: str
    num_pairs: int
    difference: float


class LengthPoints(Record):
    """Words per utterance and score of every scored pair of one system."""

    system: str
    setting: Setting
    metric: str
    points: tuple[tuple[float, float], ...]


class JudgeAgreement(Record):
    """How far the judges of a panel agree on one dimension, over the episodes that all of them scored."""

    metric: str
    num_episodes: int
    num_scenarios: int
    alpha: float | None
    """Krippendorff's alpha, interval level; None where all scores are equal."""
    low: float | None
    high: float | None
    """95%, bootstrap over scenarios."""
    means: dict[str, float]
    """By judge."""


class JudgeNoise(Record):
    """How much one judge disagrees with itself: standard deviation of repeated judgements of one episode."""

    judge: str
    metric: str
    num_episodes: int
    num_judgements: int
    sd: float
    low: float | None
    high: float | None
    """In points, clustered by scenario."""


class Component(Record):
    """One source of the spread of the paired differences, as a variance in squared points.

    Estimates are unbiased and so may fall below zero, which says that nothing of the source was seen.
    """

    source: str
    variance: float | None
    """None where the design cannot tell it apart."""
    low: float | None = None
    high: float | None = None
    """Delete-one-scenario jackknife."""
    note: str = ""


class Spread(Record):
    """Where the spread of the paired differences comes from, for one comparison and metric."""

    system_a: str
    system_b: str
    setting: Setting
    metric: str
    num_pairs: int
    num_scenarios: int
    components: tuple[Component, ...]


class Results(Record):
    """`results.json`: every comparison, with what is needed to repeat or doubt it."""

    schema_version: int = 2
    manifest: str
    manifest_sha256: str
    num_matches: int
    num_scenarios: int
    partners: tuple[str, ...]
    judge: str
    """Whose scores `rows` compare: a judge, or the mean of a panel."""
    judges: tuple[str, ...] = ()
    """The panel."""
    seeds: dict[str, int]
    config: EvaluateConfig
    rows: tuple[Row, ...]
    unpaired: tuple[Unpaired, ...] = ()
    """Comparisons that were asked for and have no row."""
    systems: tuple[SystemSummary, ...]
    decompositions: tuple[Decomposition, ...]
    parts: tuple[Part, ...] = ()
    """Each judge of a panel alone, and each partner of several alone."""
    scenarios: tuple[ScenarioRow, ...] = ()
    lengths: tuple[LengthPoints, ...] = ()
    agreement: tuple[JudgeAgreement, ...] = ()
    judge_noise: tuple[JudgeNoise, ...] = ()
    spreads: tuple[Spread, ...] = ()
    notes: tuple[str, ...] = ()
    package_version: str = ""

    def row(self, system_a: str, system_b: str, setting: Setting, metric: str) -> Row:
        """One row.

        Raises:
            KeyError: There is no such row.
        """
        for row in self.rows:
            if (row.system_a, row.system_b, row.setting, row.metric) == (system_a, system_b, setting, metric):
                return row
        raise KeyError((system_a, system_b, setting, metric))

    def save(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def load_results(path: Path) -> Results:
    """Read `results.json`.

    Raises:
        DataError: It is missing, or was not written by this version of the records.
    """
    try:
        return Results.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); run the evaluation first") from error
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(str(part) for part in first["loc"]) or "top level"
        raise DataError(f"{path}: not a results file: {location}: {first['msg']}") from error
