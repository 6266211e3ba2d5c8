"""From an episode to the questions put to the annotator."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sotopia_rl.attribute.config import AttributionConfig
from sotopia_rl.attribute.items import AttributionItem
from sotopia_rl.attribute.methods import Method
from sotopia_rl.attribute.reply import Ranges
from sotopia_rl.episode import Match, Turn
from sotopia_rl.observe import action_text, goal_text, judge_view
from sotopia_rl.prompts import render


@dataclass(frozen=True)
class Question:
    """One call to the annotator: its prompt, and the turns and ranges that the reply must have."""

    prompt: str
    turns: tuple[int, ...]
    ranges: Ranges


def questions(item: AttributionItem, method: Method, config: AttributionConfig) -> list[Question]:
    """What to ask about one agent: one question in the offline view, one per utterance in the online view."""
    turns = tuple(turn.index for turn in item.episode.utterances(item.seat))
    groups = [turns] if config.view == "offline" else [(turn,) for turn in turns]
    return [_question(item, method, config, group) for group in groups if group]


def _question(item: AttributionItem, method: Method, config: AttributionConfig, turns: tuple[int, ...]) -> Question:
    episode, seat = item.episode, item.seat
    dimensions = [config.dimension(name) for name in item.dimensions]
    ranges = {d.name: method.answer_range(d, config) for d in dimensions}
    in_view = episode.turns if config.view == "offline" else episode.turns[: turns[-1] + 1 + method.answered]
    prompt = render(
        method.template,
        view=config.view,
        conversation=judge_view(episode.match, in_view, first_turn_number=0),
        utterances=_with_responses(episode.match, in_view, turns),
        goal=goal_text(episode.match, seat),
        agent=seat + 1,
        name=episode.match.characters[seat].name,
        turns=turns,
        num_turns=len(in_view),
        dimensions=dimensions,
        scores=_shown_scores(item, method, config),
        method=config.label,
        asks=method.asks,
        answered=method.answered,
        top=method.asked_top(config),
        example=json.dumps({name: dict.fromkeys(map(str, turns), low) for name, (low, _) in ranges.items()}),
    )
    return Question(prompt=prompt, turns=turns, ranges=ranges)


def _shown_scores(item: AttributionItem, method: Method, config: AttributionConfig) -> Mapping[str, str]:
    """A counterfactual needs the real scores to compare with; quality and words alone must not see them."""
    if config.view == "online" or method.name in {"response_only", "utterance_quality", "goal_progress"}:
        return {}
    if not config.show_scores and method.name != "counterfactual":
        return {}
    points = item.rating.points(item.seat)
    return {name: f"{points[name]:g}" for name in item.dimensions if name in points}


def _with_responses(match: Match, turns: Sequence[Turn], rated: Sequence[int]) -> str:
    """Each rated utterance and what came straight after it, without the rest of the conversation."""
    parts = []
    for turn in rated:
        answer = turns[turn + 1 : turn + 2]
        parts.append(f"Turn #{turn}\n{_line(match, turns[turn])}")
        parts.append(f"Answer to turn {turn}:\n{_line(match, answer[0]) if answer else '(none, it was the last)'}")
    return "\n\n".join(parts)


def _line(match: Match, turn: Turn) -> str:
    return f"{match.characters[turn.seat].name} {action_text(turn.action)}"
