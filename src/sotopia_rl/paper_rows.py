"""From annotated files, ours or those of the paper's code, to the paper's files for training.

What an annotated file holds is told in `paper.py`. Where its weights have no turns, which is so in the paper's own,
they are aligned by order and text, and refused where that fails.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sotopia_rl import __version__
from sotopia_rl.dataset import sft_rows, write_json_array
from sotopia_rl.episode import (
    Attribution,
    Episode,
    Provenance,
    Record,
    Sampling,
    Seat,
    Turn,
    UtteranceWeight,
)
from sotopia_rl.errors import DataError
from sotopia_rl.observe import action_text
from sotopia_rl.paper import EpisodeFile, OnBad, Summary, objects_of

REDUNDANT = -1
"""The paper's annotator could call an utterance redundant; that is no effect, not a negative one."""


class Annotated(Record):
    """One line of an annotated file, understood."""

    attribution: Attribution
    score: float
    """Of the attributed dimension, in points."""
    redundant: int = 0
    """Utterances marked -1, read as 0."""


def read_annotated(
    path: Path, episodes: EpisodeFile, summary: Summary, *, top_weight: float = 3.0, on_bad: OnBad = "refuse"
) -> Iterator[tuple[Episode, Annotated]]:
    """The lines of an annotated file, ours or of the paper's code, with their episodes.

    Args:
        top_weight: Of lines that do not say theirs (the paper's).
    """
    for line in objects_of(path, summary, on_bad):
        summary.read += 1
        where = f"{path}:{line.number}"
        try:
            episode = episodes.get(str(line.data.get("episode_id"))).episode
            annotated = _annotated(line.data, episode, where, top_weight)
        except DataError as error:
            problem = str(error)
            summary.refuse(problem if problem.startswith(where) else f"{where}: {problem}", on_bad)
            continue
        summary.redundant += annotated.redundant
        yield episode, annotated


def _annotated(line: Mapping[str, Any], episode: Episode, where: str, top_weight: float) -> Annotated:
    if not isinstance(line.get("is_first_speaker"), bool):
        raise DataError(f"{where}: is_first_speaker is missing, so whose utterances these are is not known")
    seat: Seat = 0 if line["is_first_speaker"] else 1
    dimension = str(line.get("dimension", "goal"))
    weights = _weights_by_turn(line, episode, seat, where)
    top = float(line.get("top_weight", top_weight))
    wrong = {turn: weight for turn, weight in weights.items() if not (weight == REDUNDANT or 0 <= weight <= top)}
    if wrong:
        turn, weight = next(iter(wrong.items()))
        raise DataError(f"{where}: turn {turn} has the attribution {weight:g}, which is outside 0 to {top:g}")
    attribution = Attribution(
        episode_id=episode.id,
        seat=seat,
        dimension=dimension,
        method=str(line.get("method", "direct")),
        annotator=str(line.get("annotator", "imported")),
        weights=tuple(UtteranceWeight(turn=turn, weight=max(0.0, weight)) for turn, weight in weights.items()),
        top_weight=top,
        provenance=Provenance(
            model=str(line.get("annotator", "imported")),
            sampling=Sampling(),
            prompt_profile="",
            prompt_sha256="",
            package_version=__version__,
        ),
    )
    redundant = sum(weight == REDUNDANT for weight in weights.values())
    return Annotated(attribution=attribution, score=_score(line, dimension, where), redundant=redundant)


def _score(line: Mapping[str, Any], dimension: str, where: str) -> float:
    values = [value[1] for value in _entries(line, where).values() if isinstance(value[1], dict)]
    found = next((value["dim_score"] for value in values if "dim_score" in value), None)
    if found is None and dimension == "goal":
        found = line.get("goal_score")
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise DataError(f"{where}: no score of {dimension} in it")
    return float(found)


def _entries(line: Mapping[str, Any], where: str) -> Mapping[str, Sequence[Any]]:
    entries = line.get("attributed_utterances")
    if not isinstance(entries, dict) or not all(isinstance(v, list) and len(v) == 2 for v in entries.values()):
        raise DataError(f"{where}: attributed_utterances is not an object of [text, attribution]")
    return entries


def _weights_by_turn(line: Mapping[str, Any], episode: Episode, seat: Seat, where: str) -> dict[int, float]:
    spoken = episode.utterances(seat)
    if isinstance(line.get("turns"), dict):
        given = {turn: _number(weight, where) for turn, weight in line["turns"].items()}
        if sorted(given) != sorted(str(turn.index) for turn in spoken):
            raise DataError(f"{where}: turns {', '.join(given)} are not the agent's utterances in {episode.id}")
        return {turn.index: given[str(turn.index)] for turn in spoken}
    own = re.compile(rf"Utterance \d+ by {re.escape(str(line.get('agent')))}")
    entries = [value for key, value in _entries(line, where).items() if own.fullmatch(key)]
    if len(entries) != len(spoken):
        raise DataError(
            f"{where}: {len(entries)} attributions for {len(spoken)} utterances of agent {seat + 1} in {episode.id}"
        )
    for turn, (text, _) in zip(spoken, entries, strict=True):
        if not _is_of(str(text), turn):
            raise DataError(f"{where}: the text {text!r:.60} is not that of turn {turn.index} of {episode.id}")
    return {turn.index: _number(value, where) for turn, (_, value) in zip(spoken, entries, strict=True)}


def _is_of(text: str, turn: Turn) -> bool:
    """The paper's code cut an utterance after its first paragraph."""
    whole = action_text(turn.action).strip()
    return text.strip() in (whole, whole.partition("\n\n")[0].strip())


def _number(value: object, where: str) -> float:
    if isinstance(value, dict):
        value = value.get("attribution")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{where}: the attribution {value!r:.40} is no number")
    return float(value)


def write_reward_file(annotated: Iterable[tuple[Episode, Annotated]], path: Path, *, profile: str) -> int:
    """Write the paper's reward-model file, a JSON array of `input, output, value`; the number of rows.

    `value` is attribution / top weight x score in points, as the paper's code has it: not normalised, one dimension.
    """

    def rows() -> Iterator[dict[str, object]]:
        for episode, one in annotated:
            weights = one.attribution.by_turn()
            for row in sft_rows(episode, (one.attribution.seat,), profile=profile):
                share = weights[row.turn] / one.attribution.top_weight
                yield row.paper_form() | {"value": share * one.score}

    return write_json_array(rows(), path)


def write_reply_file(annotated: Iterable[tuple[Episode, Annotated]], path: Path, *, profile: str) -> int:
    """Write the paper's SFT or GRPO file, a JSON array of `input, output`; the number of rows."""
    rows = (row for episode, one in annotated for row in sft_rows(episode, (one.attribution.seat,), profile=profile))
    return write_json_array((row.paper_form() for row in rows), path)
