"""What each system did, pair by pair: the metrics of every scored pair, and the cause of every pair without a score.

A pair is one match against one partner in one setting (sampled or greedy). Whatever has no score is kept with its
cause: it never becomes a zero and never goes missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sotopia_rl.episode import Episode, Failure, Rating, Seat, other
from sotopia_rl.errors import EvaluationError
from sotopia_rl.manifest import Manifest
from sotopia_rl.results import Setting, SystemSummary

PairKey = tuple[str, str]
"""(match id, partner's model string), within one setting."""
NOT_JUDGED = "not judged"


@dataclass(frozen=True)
class Played:
    """What one system did over a manifest, in one setting or both, as one judge saw it.

    `failures` are the judge's, by episode id; an episode's own failure is in the episode. `repeats` are further
    ratings of the same episodes by the same judge: they tell how much it disagrees with itself, and enter no mean.
    """

    system: str
    manifest: Manifest
    episodes: Sequence[Episode]
    ratings: Mapping[str, Rating]
    failures: Mapping[str, Failure] = field(default_factory=dict)
    repeats: Sequence[Rating] = ()


@dataclass(frozen=True)
class Cell:
    """One system in one setting, as one judge or a panel of them sees it."""

    system: str
    setting: Setting
    model: str
    judge: str
    scored: Mapping[PairKey, Mapping[str, float]]
    failed: Mapping[PairKey, str]
    repeats: Mapping[PairKey, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    """Metrics of a pair by every judgement of it, the first included, where there are several."""

    @property
    def pairs(self) -> set[PairKey]:
        """Every pair that was to be played, with a score or without."""
        return self.scored.keys() | self.failed.keys()

    def summary(self) -> SystemSummary:
        return SystemSummary(
            system=self.system,
            setting=self.setting,
            model=self.model,
            planned=len(self.scored) + len(self.failed),
            scored=len(self.scored),
            failures=dict(sorted(Counter(self.failed.values()).items())),
        )

    def counts(self) -> str:
        """How many pairs have a score, and why the others have none."""
        summary = self.summary()
        causes = ", ".join(f"{cause} {count}" for cause, count in summary.failures.items()) or "no failure"
        return f"{self.system!r} has {summary.scored} scores of {summary.planned} ({causes})"


Cells = Mapping[tuple[str, Setting], Cell]
"""By system and setting."""


def metrics_of(episode: Episode, rating: Rating, seat: Seat) -> dict[str, float]:
    """Scores and guards of one seat. A guard that has no meaning in this episode is absent."""
    points = rating.points(seat)
    values = points | {"overall": rating.overall(seat), "num_turns": float(len(episode.turns))}
    if "secret" in points:
        values["secret_leaks"] = float(points["secret"] < 0)
    said = [
        turn.action.argument
        for turn in episode.utterances(seat)
        if turn.action.action_type != "leave"  # its argument is empty by convention
    ]
    if said:
        values["words_per_utterance"] = sum(len(text.split()) for text in said) / len(said)
        values["repetition"] = 1 - len({" ".join(text.casefold().split()) for text in said}) / len(said)
    own = [turn for turn in episode.turns if turn.seat == seat]
    if own:
        values["invalid_replies"] = sum(turn.attempts - 1 for turn in own) / len(own)
    return values


def setting_of(episode: Episode) -> Setting:
    """Greedy where the system under test had temperature 0."""
    return "greedy" if episode.agents[episode.match.seat].sampling.temperature == 0 else "sampled"


def partner_of(episode: Episode) -> str:
    """Model string of who the system under test met."""
    return episode.agents[other(episode.match.seat)].model


def key_of(episode: Episode) -> PairKey:
    """The pair that an episode is one side of, within its setting."""
    return episode.match.id, partner_of(episode)


def cell_of(p: Played, setting: Setting, partners: Sequence[str], judge: str) -> Cell | None:
    """The system's pairs in one setting; None where it played none there.

    Raises:
        EvaluationError: An episode is no part of the manifest, a pair has several, or several models played.
    """
    episodes = [e for e in p.episodes if setting_of(e) == setting]
    if not episodes:
        return None
    planned = {(m.id, partner) for m in p.manifest.matches for partner in partners}
    model = _checked(p, setting, episodes, planned, partners)
    scored: dict[PairKey, dict[str, float]] = {}
    failed = dict.fromkeys(sorted(planned - {key_of(e) for e in episodes}), "not played")
    for episode in episodes:
        cause = cause_of(episode, p)
        if cause is None:
            scored[key_of(episode)] = metrics_of(episode, p.ratings[episode.id], episode.match.seat)
        else:
            failed[key_of(episode)] = cause
    return Cell(p.system, setting, model, judge, scored, failed, _repeats(p, episodes, scored))


def _checked(
    p: Played, setting: Setting, episodes: Sequence[Episode], planned: set[PairKey], partners: Sequence[str]
) -> str:
    """The one model that played these episodes, each planned, none twice."""
    counts = Counter(key_of(e) for e in episodes)
    if foreign := [key for key in counts if key not in planned]:
        raise EvaluationError(
            f"{p.system!r}: {len(foreign)} of {len(counts)} {setting} pairs are not in manifest {p.manifest} with "
            f"partners {', '.join(partners)}; first: match {foreign[0][0]} against {foreign[0][1]}"
        )
    if twice := [key for key, count in counts.items() if count > 1]:
        raise EvaluationError(
            f"{p.system!r}: {len(twice)} {setting} pairs have more than one episode; "
            f"first: match {twice[0][0]} against {twice[0][1]}; keep one episode of each"
        )
    models = sorted({e.agents[e.match.seat].model for e in episodes})
    if len(models) > 1:
        raise EvaluationError(f"{p.system!r}: its {setting} episodes were played by {len(models)} models: {models}")
    return models[0]


def cause_of(episode: Episode, p: Played) -> str | None:
    """Why an episode has no score; None where it has one."""
    if episode.failure is not None:
        return f"{episode.status}: {episode.failure.kind}"
    if episode.id in p.ratings:
        return None
    failure = p.failures.get(episode.id)
    return NOT_JUDGED if failure is None else f"judge failed: {failure.kind}"


def _repeats(
    p: Played, episodes: Iterable[Episode], scored: Mapping[PairKey, Mapping[str, float]]
) -> dict[PairKey, list[Mapping[str, float]]]:
    again: dict[str, list[Rating]] = {}
    for rating in p.repeats:
        again.setdefault(rating.episode_id, []).append(rating)
    return {
        key: [scored[key], *(metrics_of(e, rating, e.match.seat) for rating in again[e.id])]
        for e in episodes
        if e.id in again and (key := key_of(e)) in scored
    }


def pooled(cells: Sequence[Cell]) -> Cell:
    """One system in one setting as a panel of judges sees it.

    The pooled score of an episode is the plain mean over the judges. An episode that one of them did not score has
    no pooled score: a mean over fewer judges would be a score on another scale.

    Args:
        cells: The same system and setting, one per judge.
    """
    if len(cells) == 1:
        return cells[0]
    first = cells[0]
    scored: dict[PairKey, dict[str, float]] = {}
    failed: dict[PairKey, str] = {}
    for key in sorted(set().union(*(cell.scored.keys() | cell.failed.keys() for cell in cells))):
        lacking = [cell for cell in cells if key in cell.failed]
        if not lacking:
            shared = [m for m in first.scored[key] if all(m in cell.scored[key] for cell in cells)]
            scored[key] = {m: sum(cell.scored[key][m] for cell in cells) / len(cells) for m in shared}
        else:
            cause = lacking[0].failed[key]
            same = len(lacking) == len(cells) and len({cell.failed[key] for cell in cells}) == 1
            failed[key] = cause if same else f"{cause} ({lacking[0].judge})"
    judges = ", ".join(cell.judge for cell in cells)
    return Cell(first.system, first.setting, first.model, f"mean of {judges}", scored, failed)
