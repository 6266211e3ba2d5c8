"""SOTOPIA's own records read: `EpisodeLog` (as in Redis) and the lines of `episodes_to_jsonl`.

What they do not say is not guessed: scores of a judge that failed (a bare 0.0) become no rating at all, and reasons
that can be read in two ways stay empty. `sotopia_write.py` is the other direction.

The conversation is read from the `messages`, turn by turn. `social_interactions` cannot be split safely: an
utterance may hold the blank line that separates turns. Names occur only as SOTOPIA wrote them; seats go by position.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sotopia_rl.episode import (
    Action,
    ActionType,
    AgentSpec,
    Character,
    EndReason,
    Episode,
    Match,
    Provenance,
    Rating,
    Sampling,
    Scenario,
    Score,
    Seat,
    Turn,
    sha256_text,
)
from sotopia_rl.errors import DataError
from sotopia_rl.observe import opening_context
from sotopia_rl.profiles import Profiles
from sotopia_rl.store.interface import Original

Document = dict[str, Any]
Message = tuple[str, str, str]
"""Sender, receiver, text."""

SEATS: tuple[Seat, Seat] = (0, 1)
UNTAGGED = "untagged"
UNKNOWN_MODEL = "unknown"
OVERALL = "overall_score"
_PROFILES = ("sotopia-0.1.4", "sotopia-0.1.5")
TOO_LONG = "The conversation is too long; "
STALE = "The conversation stales for too long; "

LINE_FIELDS = {
    "episode_id": "pk",
    "environment_id": "environment",
    "agent_ids": "agents",
    "experiment_tag": "tag",
    "experiment_model_name_pairs": "models",
    "raw_messages": "messages",
    "raw_rewards": "rewards",
    "raw_rewards_prompt": "rewards_prompt",
    "reasoning": "reasoning",
}
"""What a line of `episodes_to_jsonl` calls the fields of an EpisodeLog."""


class LeftOutError(DataError):
    """A record is sound, but one of the two sides cannot represent it.

    Attributes:
        cause: Why, without naming the record, for counting.
    """

    def __init__(self, record_id: str, cause: str) -> None:
        super().__init__(f"episode {record_id}: {cause}")
        self.cause = cause


NOTHING_KNOWN = Profiles({}, {}, (), ())


@dataclass(frozen=True)
class Imported:
    """A foreign record as ours. `notes` say what it lacked."""

    episode: Episode
    rating: Rating | None
    original: Original
    notes: tuple[str, ...]


class _Log(BaseModel):
    """An EpisodeLog as sotopia rc.5, 0.1.4 and 0.1.5 write it."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    pk: str = Field(min_length=1)
    environment: str
    agents: tuple[str, str]
    tag: str | None = None
    models: tuple[str, ...] | None = None
    messages: list[list[Message]]
    reasoning: str = ""
    rewards: list[tuple[float, dict[str, float]] | float | None]
    rewards_prompt: str = ""


def is_line(document: Mapping[str, object]) -> bool:
    """Whether a JSON object is a line of `episodes_to_jsonl`."""
    return "episode_id" in document and "raw_messages" in document


def log_fields(line: Mapping[str, Any]) -> Document:
    """The EpisodeLog inside a line of `episodes_to_jsonl`."""
    return {name: line[key] for key, name in LINE_FIELDS.items() if key in line}


def read_document(document: Document, *, where: str, known: Profiles = NOTHING_KNOWN) -> Imported:
    """An EpisodeLog, or a line of `episodes_to_jsonl`, as our records.

    Characters and scenario come whole from `known`; else from the line's fields and the opening contexts, which
    hold what prompts are made of but neither the Big Five nor the true relationship.

    Raises:
        DataError: It is neither.
        LeftOutError: A simultaneous or scripted conversation, or one of more than two agents.
    """
    line = is_line(document)
    try:
        log = _Log.model_validate(log_fields(document) if line else document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{where}: not an episode of sotopia's ({place}: {first['msg']})") from error
    names = _names(log)
    match, profile, notes = _match(log, names, document if line else {}, known)
    turns = _turns(log, names)
    models = (*(log.models or ()), *(UNKNOWN_MODEL,) * 3)[:3]
    episode = Episode(
        id=log.pk,
        tag=log.tag or UNTAGGED,
        match=match,
        agents=(AgentSpec(model=models[1]), AgentSpec(model=models[2])),
        prompt_profile=profile,
        max_turns=max(20, len(turns)),
        status="completed",
        end_reason=_end_reason(log, turns),
        turns=turns,
    )
    rating = _rating(log, models[0], profile)
    if rating is None:
        notes.append("without scores: imported unjudged")
    original = Original(episode_id=log.pk, layout="sotopia-jsonl" if line else "sotopia-log", document=document)
    return Imported(episode, rating, original, tuple(notes))


def _names(log: _Log) -> tuple[str, str]:
    """Names by seat, from the receivers of the opening contexts."""
    if not log.messages or len(log.messages[0]) < 2:
        raise LeftOutError(log.pk, "without opening contexts")
    (sender0, name0, _), (sender1, name1, _) = log.messages[0][:2]
    if (sender0, sender1) != ("Environment", "Environment") or name0 == name1:
        raise LeftOutError(log.pk, "without opening contexts")
    return name0, name1


def _turns(log: _Log, names: tuple[str, str]) -> tuple[Turn, ...]:
    turns: list[Turn] = []
    for index, group in enumerate(log.messages):
        if len(group) == 2 and index == len(log.messages) - 1:
            break  # the observations after the last turn
        if strangers := [sender for sender, _, _ in group if sender not in (*names, "Environment")]:
            raise LeftOutError(log.pk, f"a turn of an unknown speaker, {strangers[0]!r}")
        if [(s, r) for s, r, _ in group[2:]] != [(name, "Environment") for name in names]:
            raise LeftOutError(log.pk, "a turn without exactly one action of each agent")
        actions = [_action(log.pk, text) for _, _, text in group[2:]]
        acting = [seat for seat in SEATS if actions[seat].action_type != "none"]
        if len(acting) > 1:
            raise LeftOutError(log.pk, "both agents act in one turn")
        seat = acting[0] if acting else SEATS[index % 2]
        turns.append(Turn(index=index, seat=seat, action=actions[seat]))
    return tuple(turns)


def _action(record_id: str, text: str) -> Action:
    """The inverse of `observe.action_text`."""
    fixed: dict[str, ActionType] = {"did nothing": "none", "left the conversation": "leave"}
    if text in fixed:
        return Action(action_type=fixed[text])
    if text.startswith('said: "') and text.endswith('"') and len(text) > len('said: "'):
        return Action(action_type="speak", argument=text[len('said: "') : -1])
    bracketed: tuple[ActionType, ...] = ("action", "non-verbal communication")
    for kind in bracketed:
        if text.startswith(f"[{kind}] "):
            return Action(action_type=kind, argument=text[len(f"[{kind}] ") :])
    raise LeftOutError(record_id, "an action in no known form")


def _end_reason(log: _Log, turns: tuple[Turn, ...]) -> EndReason | None:
    if turns and turns[-1].action.action_type == "leave":
        return "left"
    comment = log.reasoning.split("\n", 1)[0]
    if TOO_LONG in comment or len(turns) >= 20:
        return "turn_limit"
    return "stale" if STALE in comment else None


def _rating(log: _Log, judge: str, profile: str) -> Rating | None:
    points = [reward[1] for reward in log.rewards if isinstance(reward, tuple)]
    points = [{name: value for name, value in seat.items() if name != OVERALL} for seat in points]
    if len(points) != 2 or not all(points):
        return None  # a judge that failed is stored as 0.0 by sotopia
    reasons = [_reasons(log.reasoning, seat, tuple(points[seat])) for seat in SEATS]
    scores = [{n: Score(score=value, reason=reasons[s][n]) for n, value in points[s].items()} for s in SEATS]
    return Rating(
        episode_id=log.pk,
        judge=judge,
        scores=(scores[0], scores[1]),
        provenance=Provenance(
            model=judge,
            sampling=Sampling(temperature=0.0),  # what rc.5 and 0.1.4 ask for
            prompt_profile=profile,
            prompt_sha256=sha256_text(log.rewards_prompt) if log.rewards_prompt else "",
        ),
    )


def _reasons(reasoning: str, seat: Seat, dimensions: tuple[str, ...]) -> dict[str, str]:
    """Reason by dimension; all empty where the text is not in sotopia's form, or can be read in two ways."""
    headings = [f"\nAgent {number} comments:\n" for number in (1, 2)]
    before, *sections = re.split("|".join(headings), f"\n{reasoning}")
    if len(sections) != 2 or not f"\n{reasoning}".startswith(before + headings[0]):
        return dict.fromkeys(dimensions, "")
    section = "\n" + (sections[seat] if seat == 0 else sections[seat].removesuffix("\n"))
    markers = [f"\n{name}: " for name in dimensions]
    starts = [section.find(marker) for marker in markers]
    if starts != sorted(starts) or any(section.count(marker) != 1 for marker in markers):
        return dict.fromkeys(dimensions, "")
    ends = [*starts[1:], len(section)]
    spans = zip(dimensions, markers, starts, ends, strict=True)
    return {name: section[start + len(marker) : end] for name, marker, start, end in spans}


def _match(log: _Log, names: tuple[str, str], line: Document, known: Profiles) -> tuple[Match, str, list[str]]:
    """Who met where; the prompt profile whose opening contexts are those that were sent; what is missing."""
    notes: list[str] = []
    contexts = (log.messages[0][0][2], log.messages[0][1][2])
    parts = [_context_parts(context, names) for context in contexts]
    characters = [
        known.characters.get(log.agents[seat]) or _partial_character(log.agents[seat], names[seat], parts[seat], seat)
        for seat in SEATS
    ]
    if any(agent not in known.characters for agent in log.agents):
        notes.append("characters known only from the opening contexts")
    scenario = known.scenarios.get(log.environment)
    if scenario:
        candidates = [scenario]
    else:
        notes.append("scenario known only from the record")
        partial = _partial_scenario(log.environment, names, parts, line)
        candidates = [partial.model_copy(update={"relationship": level}) for level in (0, 1, 2, 3)]
    pair = (characters[0], characters[1])
    for profile in _PROFILES:
        for candidate in candidates:
            match = Match.of(candidate, pair)
            if all(_context_is(match, seat, profile, contexts[seat]) for seat in SEATS):
                return match, profile, notes
    notes.append("opening contexts that no prompt profile renders")
    return Match.of(candidates[0], pair), _PROFILES[0], notes


def _context_is(match: Match, seat: Seat, profile: str, context: str) -> bool:
    try:
        return opening_context(match, seat, profile=profile) == context
    except DataError:  # a broken tag in a published text
        return False


_CONTEXT = ("\nHere is the context of this interaction:\nScenario: ", "\nConversation Starts:\n")


def _context_parts(context: str, names: tuple[str, str]) -> tuple[str, tuple[str, str], tuple[str, str]] | None:
    """Scenario, backgrounds and goals as one agent saw them."""
    a, b = names
    markers = (
        f"\nParticipants: {a} and {b}\n{a}'s background: ",
        f"\n{b}'s background: ",
        f"\n{a}'s goal: ",
        f"\n{b}'s goal: ",
    )
    rest = context.removeprefix(_CONTEXT[0]).removesuffix(_CONTEXT[1])
    pieces: list[str] = []
    for marker in markers:
        piece, found, rest = rest.partition(marker)
        if not found:
            return None
        pieces.append(piece)
    return pieces[0], (pieces[1], pieces[2]), (pieces[3], rest)


_Parts = tuple[str, tuple[str, str], tuple[str, str]] | None
_BACKGROUND = re.compile(
    r"(?P<age>\d+)-year-old (?P<gender>male|female|nonbinary) (?P<occupation>.*?)\. (?P<pronoun>\S+) pronouns\. "
    r"(?P<public>.*?) Personality and values description: (?P<values>.*)",
    re.DOTALL,
)
_GENDERS = {"male": "Man", "female": "Woman", "nonbinary": "Nonbinary"}


def _partial_character(character_id: str, name: str, parts: _Parts, seat: Seat) -> Character:
    """What the agent's own opening context says of it."""
    words = name.split(" ")
    text = parts[1][seat] if parts else ""
    cut = next((n for n in range(1, len(words)) if f" {' '.join(words[:n])}'s secrets: " in text), 1)
    first, last = " ".join(words[:cut]), " ".join(words[cut:])
    told, _, secret = text.partition(f" {first}'s secrets: ")
    found = _BACKGROUND.fullmatch(told.removeprefix(f"{name} is a "))
    if not found:
        return Character(id=character_id, first_name=first, last_name=last)
    return Character(
        id=character_id,
        first_name=first,
        last_name=last,
        age=int(found["age"]),
        occupation=found["occupation"],
        gender=_GENDERS[found["gender"]],
        gender_pronoun=found["pronoun"],
        public_info=found["public"],
        personality_and_values=found["values"],
        secret=secret,
    )


def _partial_scenario(scenario_id: str, names: tuple[str, str], parts: list[_Parts], line: Document) -> Scenario:
    seen = parts[0][0] if parts[0] else ""
    goals = [(found[2][seat] if found else "") for seat, found in zip(SEATS, parts, strict=True)]
    raw_goals = line.get("social_goals", {})
    return Scenario(
        id=scenario_id,
        codename=line.get("codename", ""),
        description=line.get("scenario", seen),
        goals=(raw_goals.get(names[0], goals[0]), raw_goals.get(names[1], goals[1])),
    )
