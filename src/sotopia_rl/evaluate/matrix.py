"""Every pair of a set of models in conversation with each other, compared as in duplicate bridge, and ranked.

A board is a scenario with its two characters and a seed. On every board each pair of models plays twice, with the seats
changed. At each seat the two scores are then comparable: same scenario, same character, opponents exchanged. The
higher score wins the comparison, equal ones tie, and a comparison that lacks a score is left out and counted.

A score is what the model got for itself. A model that presses its partners can lead this table; the mean of both sides
stands beside it for that reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from sotopia_rl import __version__, stages
from sotopia_rl.episode import Episode, Match, Rating, Record, Seat, other
from sotopia_rl.errors import DataError, EvaluationError
from sotopia_rl.evaluate.cells import metrics_of
from sotopia_rl.evaluate.folder import Plan, provenance, save_plan, total_usage
from sotopia_rl.evaluate.play import lacks, refuse_silent
from sotopia_rl.files import read_text
from sotopia_rl.llm.open import ModelPool
from sotopia_rl.manifest import Manifest
from sotopia_rl.ranking import Strength, groups, rank
from sotopia_rl.results import Effect
from sotopia_rl.simulate import Pairing, episode_id
from sotopia_rl.statistics import paired_difference
from sotopia_rl.store import EpisodeQuery, open_store
from sotopia_rl.tally import Tally, Watch

TAG = "matrix"
STORE = "matrix.db"
SEATS: tuple[Seat, Seat] = (0, 1)
CONFIDENCE = 0.95


class Standing(Record):
    """One model's place."""

    system: str
    model: str
    strength: float
    """Bradley-Terry, log-odds against the average model."""
    low: float | None
    high: float | None
    """95%, delete-one-scenario jackknife."""
    won: int
    tied: int
    lost: int
    mean: float
    """Of its scores in all scored conversations, the metric's points."""
    mean_of_both: float
    """Of the conversation's two scores: what its partners got counts as well."""
    words_per_utterance: float | None


class Meeting(Record):
    """Two models on the same boards. `difference` is A minus B at the same seats."""

    system_a: str
    system_b: str
    num_comparisons: int
    num_scenarios: int
    won: int
    tied: int
    lost: int
    mean_a: float
    mean_b: float
    difference: Effect
    """95%, clustered by scenario."""
    left_out: dict[str, int]
    """Comparisons without a score on one side, by cause."""


class MatrixResults(Record):
    """`matrix.json`."""

    schema_version: int = 1
    manifest: str
    manifest_sha256: str
    num_boards: int
    num_scenarios: int
    metric: str
    tie_margin: float
    judges: tuple[str, ...]
    standings: tuple[Standing, ...]
    """The strongest first."""
    meetings: tuple[Meeting, ...]
    package_version: str


def load_matrix(path: Path) -> MatrixResults:
    """Read `matrix.json`.

    Raises:
        DataError: It is missing or something else.
    """
    try:
        return MatrixResults.model_validate_json(read_text(path))
    except ValidationError as error:
        raise DataError(f"{path}: not the results of a matrix ({error.errors()[0]['msg']})") from error


def boards(manifest: Manifest) -> list[Match]:
    """The manifest's matches without regard to who is under test."""
    found = {(m.scenario.id, m.characters[0].id, m.characters[1].id, m.seed): m for m in reversed(manifest.matches)}
    return [Match.of(m.scenario, m.characters, seat=0, seed=m.seed) for m in reversed(found.values())]


def pairings_of(plan: Plan, manifest: Manifest) -> list[Pairing]:
    """Every pair of systems on every board, both ways round."""
    specs = {name: plan.spec(model) for name, model in plan.systems.items()}
    return [
        Pairing(match=board, agents=(specs[first], specs[second]))
        for a, b in combinations(specs, 2)
        for board in boards(manifest)
        for first, second in ((a, b), (b, a))
    ]


async def play_matrix(
    pool: ModelPool, folder: Path, plan: Plan, manifest: Manifest, watch: Watch, *, retry_failed: bool = False
) -> list[Tally]:
    """Play and judge what the folder lacks.

    Raises:
        As `evaluate.play.play`.
    """
    names = [*plan.systems.values(), *plan.judges]
    pool.open(names)
    pairings = pairings_of(plan, manifest)
    wanted = {episode_id(p, tag=TAG, config=plan.simulate) for p in pairings}
    if lacks(folder / STORE, wanted, tag=TAG, retry_failed=retry_failed):
        await refuse_silent(pool, names)
    save_plan(plan, manifest, folder)
    with closing(open_store(folder / STORE)) as store:
        tallies = [
            await stages.simulate_into(
                store, pairings, pool.get, tag=TAG, config=plan.simulate, watch=watch, retry_failed=retry_failed
            )
        ]
        query = EpisodeQuery(tag=TAG, status="completed")
        for name in plan.judges:
            tally = await stages.judge_into(
                store, store, query, pool.get(name), config=plan.judging, limit=plan.judging.concurrency, watch=watch
            )
            tally.stage = f"judgements by {name}"
            tallies.append(tally)
    return tallies


# --- results -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Talk:
    """A conversation: by seat its metrics, the mean over the judges; or why there are none."""

    episode: Episode | None
    metrics: tuple[Mapping[str, float], Mapping[str, float]] | None
    cause: str = ""


@dataclass(frozen=True)
class _Comparison:
    """Two systems at the same seat of the same board."""

    scenario: str
    score_a: float
    score_b: float


def matrix_results(
    folder: Path, plan: Plan, manifest: Manifest, *, metric: str = "goal", tie_margin: float = 0.0
) -> MatrixResults:
    """Rank the systems of a folder.

    Args:
        metric: What a model wins by: a dimension, or `overall`.
        tie_margin: Scores that differ by no more than this tie.

    Raises:
        EvaluationError: No such metric; or the systems fall into groups that share no scored board.
    """
    talks = talks_of(folder, plan, manifest)
    _check_metric(metric, talks)
    played = boards(manifest)
    meetings, ballots, clusters = [], [], []
    for a, b in combinations(plan.systems, 2):
        found = _compared(a, b, played, talks, metric)
        causes = Counter(boards_left_out(a, b, played, talks).values())
        scores = [_score(c, tie_margin) for c in found]
        ballots += [(a, b, score) for score in scores]
        clusters += [c.scenario for c in found]
        if found:
            meetings.append(_meeting(a, b, found, scores, {cause: n * len(SEATS) for cause, n in causes.items()}))
    _check_connected(list(plan.systems), meetings, talks)
    strengths = rank(ballots, clusters, confidence=CONFIDENCE)
    return MatrixResults(
        manifest=manifest.name,
        manifest_sha256=manifest.sha256,
        num_boards=len(played),
        num_scenarios=manifest.num_scenarios,
        metric=metric,
        tie_margin=tie_margin,
        judges=plan.judges,
        standings=tuple(_standing(name, plan, s, meetings, talks, metric=metric) for name, s in strengths.items()),
        meetings=tuple(meetings),
        package_version=__version__,
    )


def matrix_provenance(folder: Path, plan: Plan) -> dict[str, object]:
    """What a reader needs to make the same numbers again."""
    with closing(open_store(folder / STORE, create=False)) as store:
        episodes = list(store.episodes(EpisodeQuery(tag=TAG)))
        cost = {"conversations": total_usage(e.usage for e in episodes)} | {
            f"judge {judge}": total_usage(r.provenance.usage for r in store.ratings(judge=judge))
            for judge in plan.judges
        }
    return provenance(plan, episodes, cost)


Talks = Mapping[tuple[str, str, str], Talk]
"""By board, system in the first seat, system in the second."""


def talks_of(folder: Path, plan: Plan, manifest: Manifest) -> Talks:
    """Every conversation that was to be held, as the judges see it."""
    with closing(open_store(folder / STORE, create=False)) as store:
        episodes = {e.id: e for e in store.episodes(EpisodeQuery(tag=TAG))}
        ratings: dict[str, dict[str, Rating]] = {}
        for rating in store.ratings():
            ratings.setdefault(rating.episode_id, {})[rating.judge] = rating
        failed = {item: failure.kind for _, item, failure in store.failures("judge")}
    specs = {name: plan.spec(model) for name, model in plan.systems.items()}
    found = {}
    both_ways = ((x, y) for pair in combinations(specs, 2) for x, y in (pair, pair[::-1]))
    for (first, second), board in product(both_ways, boards(manifest)):
        pairing = Pairing(match=board, agents=(specs[first], specs[second]))
        key = episode_id(pairing, tag=TAG, config=plan.simulate)
        found[board.id, first, second] = _talk(episodes.get(key), ratings.get(key, {}), plan.judges, failed)
    return found


def _talk(
    episode: Episode | None, ratings: Mapping[str, Rating], judges: Sequence[str], failed: Mapping[str, str]
) -> Talk:
    if episode is None:
        return Talk(None, None, "not played")
    if episode.failure is not None:
        return Talk(episode, None, f"{episode.status}: {episode.failure.kind}")
    for judge in judges:
        if judge not in ratings:
            kind = failed.get(f"{episode.id}/{judge}")
            return Talk(episode, None, f"judge failed: {kind}" if kind else f"not judged ({judge})")
    by_seat = []
    for seat in SEATS:
        every = [metrics_of(episode, ratings[judge], seat) for judge in judges]
        shared = [m for m in every[0] if all(m in metrics for metrics in every)]
        by_seat.append({m: float(np.mean([metrics[m] for metrics in every])) for m in shared})
    return Talk(episode, (by_seat[0], by_seat[1]))


def _check_metric(metric: str, talks: Talks) -> None:
    scored = [talk.metrics[0] for talk in talks.values() if talk.metrics]
    if scored and metric not in scored[0]:
        raise EvaluationError(f"there is no metric {metric!r}; the judges gave {', '.join(sorted(scored[0]))}")


def boards_left_out(a: str, b: str, played: Sequence[Match], talks: Talks) -> dict[str, str]:
    """Boards on which two systems are not compared, by id with the cause: one of their conversations has no score."""
    causes = {board.id: talks[board.id, a, b].cause or talks[board.id, b, a].cause for board in played}
    return {board: cause for board, cause in causes.items() if cause}


def _compared(a: str, b: str, played: Sequence[Match], talks: Talks, metric: str) -> list[_Comparison]:
    """Both seats of every board whose two conversations have scores."""
    found = []
    for board in played:
        forward, backward = talks[board.id, a, b].metrics, talks[board.id, b, a].metrics
        if forward is not None and backward is not None:
            # a sits at the first seat in one of the two conversations, at the second in the other
            found.append(_Comparison(board.scenario.id, forward[0][metric], backward[0][metric]))
            found.append(_Comparison(board.scenario.id, backward[1][metric], forward[1][metric]))
    return found


def _score(c: _Comparison, tie_margin: float) -> float:
    gap = c.score_a - c.score_b
    return 0.5 if abs(gap) <= tie_margin + 1e-9 else float(gap > 0)


def _meeting(
    a: str, b: str, found: Sequence[_Comparison], scores: Sequence[float], left_out: Mapping[str, int]
) -> Meeting:
    differences, scenarios = [c.score_a - c.score_b for c in found], [c.scenario for c in found]
    return Meeting(
        system_a=a,
        system_b=b,
        num_comparisons=len(found),
        num_scenarios=len(set(scenarios)),
        won=scores.count(1.0),
        tied=scores.count(0.5),
        lost=scores.count(0.0),
        mean_a=float(np.mean([c.score_a for c in found])),
        mean_b=float(np.mean([c.score_b for c in found])),
        difference=Effect.of(paired_difference(differences, scenarios, confidence=CONFIDENCE)),
        left_out=dict(sorted(left_out.items())),
    )


def _check_connected(systems: Sequence[str], meetings: Sequence[Meeting], talks: Talks) -> None:
    met = np.zeros((len(systems), len(systems)), dtype=bool)
    for m in meetings:
        met[systems.index(m.system_a), systems.index(m.system_b)] = True
    if len(apart := groups(met)) > 1:
        listed = " | ".join(", ".join(systems[i] for i in group) for group in apart)
        causes = Counter(talk.cause for talk in talks.values() if talk.cause)
        counts = ", ".join(f"{cause} {count}" for cause, count in sorted(causes.items()))
        raise EvaluationError(
            f"no ranking: {len(apart)} groups share no scored board: {listed}; of {len(talks)} conversations: {counts}"
        )


def _standing(
    name: str, plan: Plan, strength: Strength, meetings: Sequence[Meeting], talks: Talks, *, metric: str
) -> Standing:
    own = [
        (talk.metrics, SEATS[0] if first == name else SEATS[1])
        for (_, first, second), talk in talks.items()
        if talk.metrics is not None and name in {first, second}
    ]
    words = [m[seat]["words_per_utterance"] for m, seat in own if "words_per_utterance" in m[seat]]
    met = [m for m in meetings if name in {m.system_a, m.system_b}]
    return Standing(
        system=name,
        model=plan.systems[name],
        strength=strength.value,
        low=strength.low,
        high=strength.high,
        won=sum(m.won if m.system_a == name else m.lost for m in met),
        tied=sum(m.tied for m in met),
        lost=sum(m.lost if m.system_a == name else m.won for m in met),
        mean=float(np.mean([m[seat][metric] for m, seat in own])),
        mean_of_both=float(np.mean([(m[seat][metric] + m[other(seat)][metric]) / 2 for m, seat in own])),
        words_per_utterance=float(np.mean(words)) if words else None,
    )
