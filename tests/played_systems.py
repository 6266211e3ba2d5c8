"""Systems that were never played: episodes, ratings and rewards drawn from seeds, for evaluation and report."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from sotopia_rl.episode import (
    Action,
    AgentSpec,
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
    UtteranceReward,
    derived_ulid,
    other,
)
from sotopia_rl.evaluate import Manifest, Played, evaluation_pairings
from sotopia_rl.results import SCORES
from sotopia_rl.simulate import Pairing

PARTNERS = (AgentSpec(model="scripted/fair"), AgentSpec(model="scripted/tough"))
JUDGED = Provenance(model="scripted/judge", sampling=Sampling(), prompt_profile="default", prompt_sha256="0" * 64)
ANN = Character(id="ann", first_name="Ann", last_name="O'Malley", age=41, occupation="Potter")
LI = Character(id="li", first_name="李", last_name="雷", age=29, occupation="Baker")


def manifest(num_scenarios: int = 8, *, name: str = "toy") -> Manifest:
    """Every scenario in both seats."""
    scenarios = [
        Scenario(
            id=f"scenario-{i}",
            codename=f"market_{i}",
            description=f"{ANN.name} sells a bicycle; {LI.name} wants one.",
            goals=(f"Sell it for at least {40 + i} coins", f"Pay at most {60 + i} coins"),
        )
        for i in range(num_scenarios)
    ]
    return Manifest(name=name, matches=tuple(Match.of(s, (ANN, LI), seat=seat) for s in scenarios for seat in (0, 1)))


def conversation(rng: random.Random, num_turns: int) -> tuple[Turn, ...]:
    """Haggling that ends by leaving, with markup and other scripts in it."""
    lines = ["I offer {n} coins.", "<b>{n}</b> & not a coin more!", "你好,{n} 个硬币?", "Would {n} be fair?"]
    texts = [rng.choice(lines).format(n=rng.randint(30, 70)) for _ in range(num_turns - 1)]
    actions = [Action(action_type="speak", argument=text) for text in texts] + [Action(action_type="leave")]
    return tuple(Turn(index=i, seat=i % 2, action=action) for i, action in enumerate(actions))  # type: ignore[arg-type]


def episode(pairing: Pairing, *, system: str, failure: Failure | None = None) -> Episode:
    spec = pairing.agents[pairing.match.seat]
    key = (system, pairing.match.id, pairing.agents[other(pairing.match.seat)].model, str(spec.sampling.temperature))
    turns = conversation(random.Random("/".join(key)), 6)
    return Episode(
        id=derived_ulid("episode", *key),
        tag=f"evaluate/{system}",
        match=pairing.match,
        agents=pairing.agents,
        prompt_profile="default",
        status="completed" if failure is None else "agent_failed",
        failure=failure,
        end_reason="left" if failure is None else None,
        turns=turns if failure is None else turns[:2],
    )


def rating(episode: Episode, *, skill: float, noise: float, judge: str = "scripted/judge") -> Rating:
    """Scores around `skill`; the scenario matters, and the same scenario is as hard for every system."""
    hard = random.Random(episode.match.scenario.id).gauss(0, 1)
    rng = random.Random(f"rating/{episode.id}")
    scores: tuple[dict[str, Score], ...] = tuple(
        {
            name: Score(
                score=round(min(m.high, max(m.low, m.low + skill + hard + rng.gauss(0, noise)))), reason="as drawn"
            )
            for name, m in SCORES.items()
            if name != "overall" and m.low is not None and m.high is not None
        }
        for _ in range(2)
    )
    return Rating(episode_id=episode.id, judge=judge, scores=(scores[0], scores[1]), provenance=JUDGED)


def played(
    system: str,
    skill: float,
    over: Manifest,
    *,
    temperatures: Sequence[float] = (0.7, 0.0),
    partners: Sequence[AgentSpec] = PARTNERS,
    failures: dict[int, Failure] | None = None,
) -> Played:
    """A system with a skill, sampled and greedy; sampling costs it one point and adds noise.

    `failures` maps the place of a sampled pairing to why it failed.
    """
    episodes, ratings = [], {}
    for temperature in temperatures:
        spec = AgentSpec(model=f"local/runs/{system}", sampling=Sampling(temperature=temperature))
        for place, pairing in enumerate(evaluation_pairings(over, spec, partners)):
            one = episode(pairing, system=system, failure=(failures or {}).get(place) if temperature else None)
            episodes.append(one)
            if one.failure is None:
                cost = 1.0 if temperature else 0.0
                ratings[one.id] = rating(one, skill=skill - cost, noise=1.5 if temperature else 0.5)
    return Played(system=system, manifest=over, episodes=episodes, ratings=ratings)


def judged_by(p: Played, judge: str, *, skill: float, noise: float = 1.0, repeated: int = 0) -> Played:
    """The same conversations as another judge sees them, the first `repeated` of them judged twice."""
    rated = [e for e in p.episodes if e.failure is None]
    ratings = {e.id: rating(e, skill=skill, noise=noise, judge=judge) for e in rated}
    again = [
        rating(e.model_copy(update={"id": f"{e.id}/again"}), skill=skill, noise=noise, judge=judge).model_copy(
            update={"episode_id": e.id}
        )
        for e in rated[:repeated]
    ]
    return replace(p, ratings=ratings, repeats=again)


def rewards(episode: Episode, *, seat: int | None = None) -> list[UtteranceReward]:
    """Drawn rewards for the utterances of the system under test."""
    rng = random.Random(f"rewards/{episode.id}")
    chosen = episode.match.seat if seat is None else seat
    found = []
    for turn in episode.turns:
        if turn.seat != chosen or turn.action.action_type == "none":
            continue
        weights = {name: rng.random() for name in ("goal", "relationship", "knowledge")}
        found.append(
            UtteranceReward(
                episode_id=episode.id,
                turn=turn.index,
                seat=turn.seat,
                points={name: round(10 * w, 2) for name, w in weights.items()},
                normalised=weights,
                reward=10 * sum(weights.values()) / len(weights),
            )
        )
    return found
