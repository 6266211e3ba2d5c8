"""The files of the paper's code (github: sotopia-lab/sotopia-rl, step 1 of its README), up to the annotated ones.

Episodes are lines of sotopia's `episodes_to_jsonl`. An annotated file has a line per agent of an episode:
`episode_id, scenario, agent, goal, attributed_utterances, is_first_speaker, goal_score`, where
`attributed_utterances` maps "Utterance N by NAME" to `[text, number or {reward, attribution, ...}]` for both
speakers. Those keys are ambiguous as soon as somebody is silent, so ours carry `turns` (weights by turn index) as
well, which their reader ignores. What is made of annotated files is in `paper_rows.py`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sotopia_rl.attribute import AttributionConfig, AttributionItem, AttributionKey, attribute_all
from sotopia_rl.episode import (
    Attribution,
    Episode,
    Failure,
    Rating,
    Seat,
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


def attribution_config(method: str, instruction: str) -> AttributionConfig:
    """The config behind `--attribution_method_name` and `--attribution_instruction_name`.

    The annotator is not told the episode's score, as in the paper's prompts (appendix H).

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
            {
                "method": METHODS[method],
                "scale": SCALES[scale],
                "dimensions": (dimension or "goal",),
                "show_scores": False,
            }
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


def objects_of(path: Path, summary: Summary, on_bad: OnBad) -> Iterator[Line]:
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
        for line in objects_of(source, summary, on_bad):
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
        for line in objects_of(path, summary, on_bad):
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
    finished = set()
    for line in read_json_lines(target, torn="skip"):
        if "episode_id" not in line.data or "is_first_speaker" not in line.data:
            raise DataError(f"{target}:{line.number}: not a line of an annotated file; choose another output file")
        finished.add((str(line.data["episode_id"]), 0 if line.data["is_first_speaker"] else 1))
    with target.open("rb+") as file:
        content_end = file.seek(0, 2)
        file.seek(max(0, content_end - 1))
        if content_end and file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
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
