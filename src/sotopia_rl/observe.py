"""THE renderer: the text that an agent, a judge or an annotator sees of a match.

Simulation, training rows, rollouts and serving all come here, so that a prompt can be rendered again and
equals what was sent. A prompt is a pure function of the match, the turns so far, the seat and the profile.

A *profile* is a choice of wording. The published ones equal what the real packages sent, byte for byte, but
for two things: the list of actions has one fixed order (theirs was random), and what people say passes through
unchanged (theirs stripped markup, dropped "did nothing" and filled in braces). See `docs/prompts.md`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from sotopia_rl.dimensions import SOTOPIA_DIMENSIONS, Dimension, ReplyForm, schema_text
from sotopia_rl.episode import ACTION_TYPES, Action, Character, Match, Scenario, Seat, Turn
from sotopia_rl.errors import ConfigError, DataError
from sotopia_rl.prompts import frame, render

Viewer = Seat | Literal["environment"]
"""Who is looking; the environment, for whom the judge stands, sees everything."""


@dataclass(frozen=True)
class Profile:
    """A wording.

    `agent` and `judge` are prompt files; `reply_form` is the JSON that the judge is asked for.
    """

    name: str
    agent: str
    judge: str
    reply_form: ReplyForm
    hides_partner: bool = False
    """The partner's background is never shown, whatever the relationship (0.1.5 does so)."""


_PROFILES: tuple[Profile, ...] = (
    Profile("default", "agent_sotopia-0.1.4.jinja", "judge_default.jinja", "default"),
    Profile("compact", "agent_compact.jinja", "judge_default.jinja", "default"),
    Profile("paper", "agent_paper.jinja", "judge_paper.jinja", "0.1.0rc5"),
    Profile("sotopia-0.1.4", "agent_sotopia-0.1.4.jinja", "judge_sotopia-0.1.4.jinja", "0.1.4"),
    Profile("sotopia-0.1.5", "agent_sotopia-0.1.4.jinja", "judge_sotopia-0.1.5.jinja", "0.1.5", hides_partner=True),
)
PROFILES: dict[str, Profile] = {profile.name: profile for profile in _PROFILES}
"""By name."""


_ACTIONS = " ".join(ACTION_TYPES)


def get_profile(name: str) -> Profile:
    """The profile called `name`.

    Raises:
        ConfigError: There is none.
    """
    if name not in PROFILES:
        raise ConfigError(f"unknown prompt profile {name!r}; choose one of {', '.join(PROFILES)}")
    return PROFILES[name]


def agent_prompt(match: Match, turns: Sequence[Turn], seat: Seat, *, profile: str = "default") -> str:
    """The one user message that the agent in `seat` is sent at turn `len(turns)`.

    Raises:
        ConfigError: The profile is unknown.
        DataError: A viewer or hint tag in the scenario is broken.
    """
    chosen = get_profile(profile)
    names = _names(match)
    observations = [observation_text(turn, names[turn.seat]) for turn in turns]
    history = "\n".join([opening_context(match, seat, profile=profile), *observations])
    before, between, after = frame(chosen.agent, ("history", "turn"), name=names[seat], actions=_ACTIONS)
    return f"{before}{history}{between}{len(turns)}{after}"


def judge_prompt(
    match: Match,
    turns: Sequence[Turn],
    *,
    profile: str = "default",
    dimensions: Sequence[Dimension] = SOTOPIA_DIMENSIONS,
) -> str:
    """The one user message that a judge is sent. Errors as `agent_prompt`."""
    chosen = get_profile(profile)
    return render(
        chosen.judge,
        history=judge_view(match, turns),
        names=_names(match),
        num_turns=len(turns),
        schema=schema_text(dimensions, chosen.reply_form),
    )


def opening_context(match: Match, viewer: Viewer, *, profile: str = "default") -> str:
    """What `viewer` is told before the first turn: scenario, people, goals, as far as they are theirs to know.

    An agent's text is its first observation, `Conversation Starts:` and all; the environment's is the bare block.
    """
    hides_partner = get_profile(profile).hides_partner
    return _context(match.scenario, match.characters, viewer, hides_partner=hides_partner)


def judge_view(match: Match, turns: Sequence[Turn], *, first_turn_number: int = 1) -> str:
    """Everything: both backgrounds with their secrets, both goals, and the transcript.

    A turn is a line `Turn #n` and a line `Name did this`; a silent turn has the first line only. SOTOPIA counts
    its judge's turns from 1 and its agents' from 0.
    """
    names = _names(match)
    lines = [opening_context(match, "environment")]
    for number, turn in enumerate(turns, start=first_turn_number):
        lines.append(f"Turn #{number}")
        if turn.action.action_type != "none":
            lines.append(f"{names[turn.seat]} {action_text(turn.action)}")
    return "\n".join(lines)


def goal_text(match: Match, seat: Seat) -> str:
    """The goal of the agent in `seat`, as it is told to it."""
    return _visible(match.scenario.goals[seat], seat, where=match.scenario.id)


def scenario_text(match: Match) -> str:
    """Where the two meet, with everything that only the environment is told."""
    return _visible(match.scenario.description, "environment", where=match.scenario.id)


def observation_text(turn: Turn, name: str) -> str:
    """What both agents are told of a turn, once it is over. Of a silent turn they learn only that it passed."""
    done = "" if turn.action.action_type == "none" else f"{name} {action_text(turn.action)}"
    return f"Turn #{turn.index}: {done}\n"


def action_text(action: Action) -> str:
    """An action in SOTOPIA's words, to be read after the actor's name."""
    match action.action_type:
        case "none":
            return "did nothing"
        case "speak":
            return f'said: "{action.argument}"'
        case "leave":
            return "left the conversation"
        case "non-verbal communication" | "action":
            return f"[{action.action_type}] {action.argument}"


def _names(match: Match) -> tuple[str, str]:
    first, second = match.characters
    return first.name, second.name


# Two per match being played and one per match being judged: room for a thousand at once and more, in about 15 MB.
@lru_cache(maxsize=4096)
def _context(
    scenario: Scenario, characters: tuple[Character, Character], viewer: Viewer, *, hides_partner: bool
) -> str:
    seats: tuple[Seat, Seat] = (0, 1)
    relationship = 0 if hides_partner else scenario.relationship
    text = render(
        "context.jinja",
        scenario=_visible(scenario.description, viewer, where=scenario.id),
        names=[character.name for character in characters],
        backgrounds=[
            background(characters[seat]) if viewer in (seat, "environment") else _known(characters[seat], relationship)
            for seat in seats
        ],
        goals=[
            _visible(scenario.goals[seat], viewer, where=scenario.id) if viewer in (seat, "environment") else "Unknown"
            for seat in seats
        ],
    )
    block = re.sub(r"\n +", "\n", text).strip()
    return block if viewer == "environment" else f"\n{block}\nConversation Starts:\n"


def background(character: Character) -> str:
    """All there is to know of a person, secret included. What a character lacks is left out."""
    secret = f"{character.first_name}'s secrets: {character.secret}" if character.secret else ""
    return _joined(_public(character), _personality(character), secret)


def _known(character: Character, relationship: int) -> str:
    """What the partner knows of a person; it ends in the space that SOTOPIA leaves where the rest is hidden."""
    match relationship:
        case 0:
            return "Unknown"
        case 1:
            return f"{character.name} "
        case 2:
            return f"{_public(character)} "
        case _:
            return f"{_joined(_public(character), _personality(character))} "


_ADJECTIVES = {"man": "male", "woman": "female"}


def _public(character: Character) -> str:
    gender = character.gender.lower()
    kind = _joined(
        f"{character.age}-year-old" if character.age else "",
        _ADJECTIVES.get(gender, gender),
        character.occupation.lower(),
    )
    # SOTOPIA always gives an age, and always writes "a", be it before 18 or 80; without one, grammar decides.
    article = "an" if not character.age and kind[:1] in set("aeiou") else "a"
    return _joined(
        f"{character.name} is {article} {kind}." if kind else character.name,
        f"{character.gender_pronoun} pronouns." if character.gender_pronoun else "",
        character.public_info,
    )


def _personality(character: Character) -> str:
    values = character.personality_and_values
    return f"Personality and values description: {values}" if values else ""


def _joined(*parts: str) -> str:
    return " ".join(part for part in parts if part)


_TAG = re.compile(
    r"""<(?:(?P<open>p|extra_info|strategy_hint|clarification_hint)
    (?:\s+viewer=(?P<quote>["'])(?P<viewer>.*?)(?P=quote))?|/(?P<close>p|extra_info|strategy_hint|clarification_hint))
    \s*>""",
    re.VERBOSE,
)


def _visible(text: str, viewer: Viewer, *, where: str) -> str:
    """Resolve SOTOPIA's tags in a scenario or goal: hint tags go, their text stays; `<p viewer="x">` is for x only.

    Viewers are written `environment`, `agent_0` and `agent_1`; the environment sees every text. Any other `<` is
    text.

    Raises:
        DataError: A tag is not closed, or closed before it is opened.
    """
    who = viewer if viewer == "environment" else f"agent_{viewer}"
    pieces: list[str] = []
    open_tags: list[tuple[str, bool]] = []
    position = 0
    for tag in _TAG.finditer(text):
        if all(shown for _, shown in open_tags):
            pieces.append(text[position : tag.start()])
        position = tag.end()
        if tag["open"]:
            open_tags.append((tag["open"], tag["viewer"] is None or who in ("environment", tag["viewer"])))
        elif not open_tags or open_tags.pop()[0] != tag["close"]:
            raise DataError(f"scenario {where}: {tag[0]} closes no open tag; correct the scenario's text")
    if open_tags:
        raise DataError(f"scenario {where}: <{open_tags[-1][0]}> is never closed; correct the scenario's text")
    return "".join([*pieces, text[position:]])
