"""The files of the paper's code (github: sotopia-lab/sotopia-rl, step 1 of its README), read and written.

Episodes are lines of sotopia's `episodes_to_jsonl`. An annotated file has a line per agent of an episode:
`episode_id, scenario, agent, goal, attributed_utterances, is_first_speaker, goal_score`, where
`attributed_utterances` maps "Utterance N by NAME" to `[text, number or {reward, attribution, ...}]` for both
speakers. Those keys are ambiguous as soon as somebody is silent, so ours carry `turns` (weights by turn index) as
well, which their reader ignores; theirs are aligned by order and text, and refused where that fails.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sotopia_rl import __version__
from sotopia_rl.attribute import AttributionConfig, AttributionItem, AttributionKey, attribute_all
from sotopia_rl.dataset import sft_rows, write_json_array
from sotopia_rl.episode import (
    Attribution,
    Episode,
    Failure,
    Provenance,
    Rating,
    Record,
    Sampling,
    Seat,
    Turn,
    UtteranceWeight,
)
from sotopia_rl.errors import ConfigError, DataError
from sotopia_rl.files import json_fault, write_lines
from sotopia_rl.models import ChatModel
from sotopia_rl.observe import action_text, goal_text
from sotopia_rl.store.jsonl import Line, read_json_lines
from sotopia_rl.store.sotopia_read import Imported, read_document

logger = logging.getLogger(__name__)

OnBad = Literal["refuse", "skip"]
METHODS = {
    "direct": "direct",
    "direct_generic": "direct",
    "direct_normalized": "direct_normalised",
    "key_utterance": "singular",
    "discounting": "scaled",
    "all_the_same": "uniform",
    "goal_progress": "goal_progress",
    "only_response": "response_only",
    "utterance_quality": "utterance_quality",
}
"""Names of `--attribution_method_name` and what they are called here."""
SCALES = {"default": 3, "5_scale": 5, "10_scale": 10}
REDUNDANT = -1
"""The paper's annotator could call an utterance redundant; that is no effect, not a negative one."""


def attribution_config(method: str, instruction: str) -> AttributionConfig:
    """The config behind `--attribution_method_name` and `--attribution_instruction_name`.

    Args:
        instruction: SCALE-DIMENSION such as `default-goal` or `5_scale-knowledge`; without a dimension, goal.

    Raises:
        ConfigError: One of them is unknown.
    """
    scale, _, dimension = instruction.partition("-")
    if method not in METHODS:
        raise ConfigError(f"--attribution_method_name {method}: unknown; there are {', '.join(METHODS)}")
    if scale not in SCALES:
        raise ConfigError(f"--attribution_instruction_name {instruction}: unknown scale; there are {', '.join(SCALES)}")
    try:
        return AttributionConfig.model_validate(
            {"method": METHODS[method], "scale": SCALES[scale], "dimensions": (dimension or "goal",)}
        )
    except ValueError as error:
        raise ConfigError(f"--attribution_instruction_name {instruction}: unknown dimension {dimension}") from error


@dataclass
class Summary:
    """What a command did; `bad` has a line per record left out."""

    read: int = 0
    written: int = 0
    bad: list[str] = field(default_factory=list)
    redundant: int = 0
    """Utterances marked -1, which count as 0."""

    def refuse(self, problem: str, on_bad: OnBad) -> None:
        """Raises DataError, or notes the problem and goes on."""
        if on_bad == "refuse":
            raise DataError(problem)
        logger.warning("%s: left out", problem)
        self.bad.append(problem)

    def __str__(self) -> str:
        left_out = f", {len(self.bad)} left out" if self.bad else ""
        return f"{self.read} read, {self.written} written{left_out}"


def _json_lines(path: Path, summary: Summary, on_bad: OnBad) -> Iterator[Line]:
    """The JSON objects of a file; a line that is none, half-written ones included, is refused or noted."""
    try:
        with path.open("rb") as file:
            offset = 0
            for number, text in enumerate(file, start=1):
                try:
                    data = json.loads(text)
                except ValueError as error:
                    torn = "" if text.endswith(b"\n") else ", it is half-written"
                    summary.refuse(f"{path}:{number}: not JSON ({json_fault(error)}){torn}", on_bad)
                else:
                    if isinstance(data, dict):
                        yield Line(number, offset, data)
                    else:
                        summary.refuse(f"{path}:{number}: expected an object, found {type(data).__name__}", on_bad)
                offset += len(text)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


# --- process_sotopia_pi --------------------------------------------------------------------------------------------


def select_self_play(source: Path, target: Path, *, model: str, on_bad: OnBad = "refuse") -> Summary:
    """Copy the episodes in which both agents are `model`, line by line and unchanged.

    The published script compares the first two of [judge, agent 1, agent 2], that is, never looks at agent 2.
    """
    summary = Summary()

    def chosen() -> Iterator[str]:
        for line in _json_lines(source, summary, on_bad):
            summary.read += 1
            models = line.data.get("experiment_model_name_pairs")
            if not isinstance(models, list) or len(models) != 3:
                summary.refuse(
                    f"{source}:{line.number}: experiment_model_name_pairs is not [judge, agent, agent]", on_bad
                )
            elif models[1:] == [model, model]:
                summary.written += 1
                yield json.dumps(line.data, ensure_ascii=False) + "\n"

    write_lines(target, chosen())
    return summary


# --- episodes by id ------------------------------------------------------------------------------------------------


class EpisodeFile:
    """Episodes of a sotopia JSONL file by id; each is parsed when it is asked for, and only places are kept.

    Raises:
        DataError: The file is unusable, or (with `on_bad="refuse"`) an id stands twice in it.
    """

    def __init__(self, path: Path, summary: Summary, on_bad: OnBad) -> None:
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}
        self._latest: tuple[str, Imported] | None = None
        for line in _json_lines(path, summary, on_bad):
            episode_id = str(line.data.get("episode_id"))
            if episode_id in self._places:
                first = self._places[episode_id][0]
                summary.refuse(f"{path}:{line.number}: episode {episode_id} stands in line {first} already", on_bad)
            else:
                self._places[episode_id] = (line.number, line.offset)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def get(self, episode_id: str) -> Imported:
        """One episode.

        Raises:
            DataError: There is none of that id, or its line cannot be used.
        """
        if self._latest is None or self._latest[0] != episode_id:
            if episode_id not in self._places:
                raise DataError(f"{self.path}: has no episode {episode_id}")
            number, offset = self._places[episode_id]
            with self.path.open("rb") as file:
                file.seek(offset)
                document = json.loads(file.readline())
            self._latest = (episode_id, read_document(document, where=f"{self.path}:{number}"))
        return self._latest[1]


# --- sample_episodes_and_annotate ----------------------------------------------------------------------------------


async def annotate_file(
    source: Path,
    target: Path,
    model: ChatModel | None,
    config: AttributionConfig,
    *,
    limit: int,
    on_bad: OnBad = "refuse",
    watch: Callable[[Summary], None] = lambda _summary: None,
) -> Summary:
    """Annotate the episodes of `source` into `target`, going on where an earlier call stopped.

    Raises:
        DataError: The source is unusable, or `target` is no annotated file.
    """
    summary = Summary()
    finished = _finished(target)
    rated = _rated(EpisodeFile(source, summary, on_bad), summary, on_bad)

    def done(key: AttributionKey) -> bool:
        return (key.episode_id, key.seat) in finished

    with closing(target.open("a", encoding="utf-8")) as file:
        results = attribute_all(rated, model, config, limit=limit, done=done)
        async for item, outcome in _one_by_one(results):
            if isinstance(outcome, Failure):
                summary.bad.append(f"episode {item.episode.id}, agent {item.seat + 1}: {outcome.message}")
                logger.warning("%s", summary.bad[-1])
            else:
                file.write(json.dumps(_annotated_line(item, outcome), ensure_ascii=False) + "\n")
                file.flush()
                summary.written += 1
            watch(summary)
    return summary


async def _one_by_one(
    results: AsyncIterator[tuple[AttributionItem, tuple[Attribution, ...] | Failure]],
) -> AsyncIterator[tuple[AttributionItem, Attribution | Failure]]:
    async for item, outcome in results:
        for one in (outcome,) if isinstance(outcome, Failure) else outcome:
            yield item, one


def _finished(target: Path) -> set[tuple[str, int]]:
    """(episode, seat) of the lines there are; a half-written last line is cut off, to be written again."""
    if not target.exists():
        return set()
    finished, end = set(), 0
    for line in read_json_lines(target, torn="skip"):
        if "episode_id" not in line.data or "is_first_speaker" not in line.data:
            raise DataError(f"{target}:{line.number}: not a line of an annotated file; choose another output file")
        finished.add((str(line.data["episode_id"]), 0 if line.data["is_first_speaker"] else 1))
    with target.open("rb+") as file:
        content_end = file.seek(0, 2)
        file.seek(max(0, content_end - 1))
        if content_end and file.read(1) != b"\n":
            file.seek(0)
            end = file.read().rfind(b"\n") + 1
            file.truncate(end)
    return finished


def _rated(file: EpisodeFile, summary: Summary, on_bad: OnBad) -> Iterator[tuple[Episode, Rating]]:
    for episode_id in file:
        summary.read += 1
        try:
            found = file.get(episode_id)
        except DataError as error:
            summary.refuse(str(error), on_bad)
            continue
        if found.rating is None:
            summary.refuse(f"{file.path}: episode {episode_id} has no scores", on_bad)
            continue
        yield found.episode, found.rating


def _annotated_line(item: AttributionItem, attribution: Attribution) -> dict[str, object]:
    """As the paper's code writes it, and the weights by turn."""
    episode, seat = item.episode, item.seat
    points = item.rating.points(seat)
    score = points.get(attribution.dimension, 0.0)
    weights = attribution.by_turn()
    utterances: dict[str, list[object]] = {}
    for turn in episode.turns:
        if turn.action.action_type == "none":
            continue
        key = f"Utterance {turn.index // 2} by {_name(episode, turn.seat)}"
        value: object = 0
        if turn.seat == seat:
            value = {
                "reward": weights[turn.index] / attribution.top_weight * score,
                "attribution": weights[turn.index],
                "dimension": attribution.dimension,
                "dim_score": score,
            }
        utterances[key] = [action_text(turn.action), value]
    return {
        "episode_id": episode.id,
        "scenario": episode.match.scenario.description,
        "agent": _name(episode, seat),
        "goal": goal_text(episode.match, seat),
        "attributed_utterances": utterances,
        "is_first_speaker": seat == 0,
        "goal_score": points.get("goal"),
        "dimension": attribution.dimension,
        "method": attribution.method,
        "annotator": attribution.annotator,
        "top_weight": attribution.top_weight,
        "turns": {str(turn): weight for turn, weight in weights.items()},
    }


def _name(episode: Episode, seat: Seat) -> str:
    return episode.match.characters[seat].name


# --- process_annotation_direct_attribution -------------------------------------------------------------------------


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
    for line in _json_lines(path, summary, on_bad):
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
