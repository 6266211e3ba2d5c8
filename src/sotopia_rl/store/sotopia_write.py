"""SOTOPIA's own records made: `EpisodeLog` (as in Redis) and the lines of `episodes_to_jsonl`.

An `EpisodeLog` holds a judged conversation and nothing else. What it cannot hold is left out of it, never written as
something else: failed, unjudged and unfinished episodes, the judges beyond one, attributions, provenance, the argument
of `none` and `leave`. `sotopia_read.py` is the other direction.
"""

from __future__ import annotations

from sotopia_rl.episode import Action, Episode, Rating, Seat
from sotopia_rl.observe import action_text, background, observation_text, opening_context
from sotopia_rl.store.interface import Original
from sotopia_rl.store.sotopia_read import (
    LINE_FIELDS,
    OVERALL,
    SEATS,
    STALE,
    TOO_LONG,
    Document,
    LeftOutError,
    log_fields,
    read_document,
)


def log_document(episode: Episode, rating: Rating | None, original: Original | None = None) -> Document:
    """The EpisodeLog of a judged episode.

    Where the episode was imported, `original` is used: its messages are what was really sent, and what has not been
    changed since comes out as it came in.

    Raises:
        LeftOutError: The episode is not completed, or not judged, or both agents bear one name.
    """
    if episode.status != "completed":
        raise LeftOutError(episode.id, f"not completed ({episode.status})")
    if original:
        return _from_original(episode, rating, original)
    names = _distinct_names(episode)
    if rating is None:
        raise LeftOutError(episode.id, "not judged")
    return {
        "pk": episode.id,
        "environment": episode.match.scenario.id,
        "agents": [character.id for character in episode.match.characters],
        "tag": episode.tag,
        "models": [rating.judge, *(agent.model for agent in episode.agents)],
        "messages": _messages(episode, names),
        "reasoning": _reasoning(episode, rating),
        "rewards": _rewards(rating),
        "rewards_prompt": "",
    }


def line_document(episode: Episode, rating: Rating | None, original: Original | None = None) -> Document:
    """The episode as a line of `episodes_to_jsonl`. Errors as `log_document`."""
    log = log_document(episode, rating, original)
    if not all(isinstance(reward, list | tuple) for reward in log["rewards"]):
        raise LeftOutError(episode.id, "not judged")
    scenario, characters = episode.match.scenario, episode.match.characters
    names = _distinct_names(episode)
    told = {
        "scenario": scenario.description,
        "codename": scenario.codename,
        "agents_background": {names[s]: background(characters[s]) for s in SEATS},
        "social_goals": {names[s]: scenario.goals[s] for s in SEATS},
    }
    if original and original.layout == "sotopia-jsonl":
        told |= {key: original.document[key] for key in told if key in original.document}
    interactions = _social_interactions(log["messages"], log["tag"] or "")
    line = {key: log[name] for key, name in LINE_FIELDS.items() if key != "reasoning"}
    return {
        **line,
        **told,
        "social_interactions": interactions,
        "reasoning": log["reasoning"],
        "rewards": log["rewards"],
    }


def _from_original(episode: Episode, rating: Rating | None, original: Original) -> Document:
    document = original.document
    log = log_fields(document) if original.layout == "sotopia-jsonl" else dict(document)
    was = read_document(document, where=f"original of {episode.id}")
    if rating is None and was.rating is not None:
        raise LeftOutError(episode.id, "not judged")
    if episode.tag != was.episode.tag:
        log["tag"] = episode.tag
    if rating is not None and (was.rating is None or _said(rating) != _said(was.rating)):
        models = [rating.judge, *(agent.model for agent in episode.agents)]
        log |= {"models": models, "rewards": _rewards(rating), "reasoning": _reasoning(episode, rating)}
        log["rewards_prompt"] = ""
    return log


def _said(rating: Rating) -> tuple[object, ...]:
    return rating.judge, rating.scores


def _distinct_names(episode: Episode) -> tuple[str, str]:
    first, second = (character.name for character in episode.match.characters)
    if first == second:
        raise LeftOutError(episode.id, "both agents bear one name")
    return first, second


def _messages(episode: Episode, names: tuple[str, str]) -> list[list[list[str]]]:
    observations = [
        [opening_context(episode.match, seat, profile=episode.prompt_profile) for seat in SEATS],
        *([observation_text(turn, names[turn.seat])] * 2 for turn in episode.turns),
    ]
    groups = [[["Environment", names[seat], texts[seat]] for seat in SEATS] for texts in observations]
    silent = action_text(Action(action_type="none"))
    for turn in episode.turns:
        for seat in SEATS:
            text = action_text(turn.action) if seat == turn.seat else silent
            groups[turn.index].append([names[seat], "Environment", text])
    return groups


def _rewards(rating: Rating) -> list[list[object]]:
    return [[rating.overall(seat), {**_floats(rating, seat), OVERALL: rating.overall(seat)}] for seat in SEATS]


def _floats(rating: Rating, seat: Seat) -> dict[str, float]:
    return {name: float(value) for name, value in rating.points(seat).items()}


def _reasoning(episode: Episode, rating: Rating) -> str:
    last = episode.turns[-1] if episode.turns else None
    why = TOO_LONG if len(episode.turns) >= episode.max_turns else ""
    if last and last.action.action_type == "leave":
        why += f"Agent {last.seat + 1} is leaving; "
    if episode.end_reason == "stale":
        why += STALE
    comments = [f"Environment comments: terminated: {why}"]
    for seat in SEATS:
        comments.append(f"Agent {seat + 1} comments:")
        comments += [f"{name}: {score.reason}" for name, score in rating.scores[seat].items()]
    return "".join(f"{comment}\n" for comment in comments)


def _social_interactions(messages: list[list[list[str]]], tag: str) -> str:
    """What `episodes_to_jsonl` makes of the messages, quirks included.

    A silent turn is an empty paragraph, and so is an utterance that says "did nothing"; a first turn in which nothing
    visible happens, and that of every conversation whose tag has the word `script`, is no paragraph at all.
    """
    paragraphs = ["\n".join(_visible_actions(group)) for group in messages[:-1]]
    starts_visibly = bool(messages[:-1]) and bool(_visible_actions(messages[0]))
    return "\n\n".join(paragraphs if starts_visibly and "script" not in tag.split("_") else paragraphs[1:])


def _visible_actions(group: list[list[str]]) -> list[str]:
    return [
        f"{sender} {text}" if "said:" in text else f"{sender}: {text}"
        for sender, receiver, text in group
        if receiver == "Environment" and sender != "Environment" and "did nothing" not in text
    ]
