"""Records for the tests of the store."""

from __future__ import annotations

from sotopia_rl.episode import (
    Action,
    ActionType,
    AgentSpec,
    Attribution,
    Character,
    Episode,
    Failure,
    Match,
    Provenance,
    Rating,
    Sampling,
    Scenario,
    Score,
    Turn,
    Usage,
    UtteranceWeight,
    derived_ulid,
)

DIMENSIONS = (
    "believability",
    "relationship",
    "knowledge",
    "secret",
    "social_rules",
    "financial_and_material_benefits",
    "goal",
)

ANN = Character(
    id="ann",
    first_name="Élodie",
    last_name="O'Malley",
    age=37,
    occupation="dentist",
    gender="Woman",
    gender_pronoun="She/her",
    public_info="Élodie has two cats.",
    personality_and_values="Quiet, but says “no” when needed.",
    secret="Has a second flat.",
)
BEN = Character(
    id="ben",
    first_name="Ben",
    last_name="Ito",
    age=52,
    occupation="chef",
    gender="Man",
    gender_pronoun="He/him",
    public_info="Ben collects stamps.",
    personality_and_values="Ben is methodical.",
    secret="Owes money.",
)
ACTIONS: tuple[tuple[ActionType, str], ...] = (
    ("speak", 'I said "no": <b>two</b> {things}.\n\nSecond paragraph 李雷.'),
    ("none", ""),
    ("non-verbal communication", "nods"),
    ("action", "slides the [action] notebook"),
    ("speak", "I did nothing, and I <3 that."),
    ("leave", ""),
)


def scenario(number: int = 0, *, relationship: int = 3) -> Scenario:
    return Scenario(
        id=f"scenario{number}",
        codename=f"code{number}",
        description="Two friends share a flat.",
        goals=("Keep the cat", "Sell the cat (Extra information: it bites)"),
        relationship=relationship,
    )


def turns(actions: tuple[tuple[ActionType, str], ...] = ACTIONS) -> tuple[Turn, ...]:
    return tuple(
        Turn(
            index=index,
            seat=1 if index % 2 else 0,
            action=Action(action_type=kind, argument=argument),
            reply=Action(action_type=kind, argument=argument).to_json(),
            prompt_sha256="ab" * 32,
            usage=Usage(calls=1, prompt_tokens=500, completion_tokens=20),
        )
        for index, (kind, argument) in enumerate(actions)
    )


def episode(
    number: int = 0,
    *,
    tag: str = "t",
    model: str = "scripted/fair",
    failure: Failure | None = None,
    actions: tuple[tuple[ActionType, str], ...] = ACTIONS,
    relationship: int = 3,
) -> Episode:
    match = Match.of(scenario(number % 3, relationship=relationship), (ANN, BEN), seed=number)
    return Episode(
        id=derived_ulid("episode", tag, number),
        tag=tag,
        match=match,
        agents=(
            AgentSpec(model=model, sampling=Sampling(temperature=0.5)),
            AgentSpec(model="scripted/tough"),
        ),
        prompt_profile="sotopia-0.1.4",
        status="agent_failed" if failure else "completed",
        failure=failure,
        end_reason=None if failure else "left",
        turns=turns(actions),
        package_version="0.1.0",
    )


def provenance(model: str) -> Provenance:
    return Provenance(model=model, sampling=Sampling(temperature=0), prompt_profile="default", prompt_sha256="cd" * 32)


def rating(of: Episode, judge: str = "scripted/judge", *, offset: float = 0) -> Rating:
    seats = tuple(
        {name: Score(score=offset + seat + n % 3, reason=f"because {n}\nand 李") for n, name in enumerate(DIMENSIONS)}
        for seat in (0, 1)
    )
    return Rating(episode_id=of.id, judge=judge, scores=(seats[0], seats[1]), provenance=provenance(judge))


def attribution(of: Episode, dimension: str = "goal", *, method: str = "direct") -> Attribution:
    return Attribution(
        episode_id=of.id,
        seat=0,
        dimension=dimension,
        method=method,
        annotator="scripted/annotator",
        weights=tuple(UtteranceWeight(turn=t.index, weight=t.index % 4) for t in of.utterances(0)),
        provenance=provenance("scripted/annotator"),
    )


FAILURE = Failure(kind="timeout", message="no reply in 60 s", turn=6)
