"""Small made-up bargaining talks as training rows: real prompts, JSON replies, a value that depends on the reply."""

import random
from pathlib import Path

from sotopia_rl.dataset import RewardRow, write_rows
from sotopia_rl.episode import Action, Character, Match, Scenario, Turn
from sotopia_rl.models import Message
from sotopia_rl.observe import agent_prompt

PEOPLE = [
    Character(id=f"c{i}", first_name=first, last_name=last, secret="Is broke.")
    for i, (first, last) in enumerate([("Ann", "Lee"), ("Finnegan", "O'Malley"), ("José", "Ruiz")])
]


def talk_match(rng: random.Random, number: int) -> tuple[Match, int]:
    """A match and the price that the buyer should offer."""
    item, price = rng.choice(["lamp", "bike"]), rng.randrange(20, 90, 10)
    scenario = Scenario(
        id=f"s{number}",
        description=f"One person sells a used {item} to another.",
        goals=(f"Buy the {item} for about ${price}.", f"Sell the {item} for about ${price}."),
    )
    first, second = rng.sample(PEOPLE, 2)
    return Match.of(scenario, (first, second), seed=number), price


def reward_rows(episodes: int, *, seed: int = 0, turns: int = 4) -> list[RewardRow]:
    rng = random.Random(seed)
    rows: list[RewardRow] = []
    for number in range(episodes):
        match, price = talk_match(rng, number)
        said: list[Turn] = []
        for index in range(turns):
            seat = 0 if index % 2 == 0 else 1
            offer = rng.randrange(10, 100, 10)
            action = Action(action_type="speak", argument=f"What about ${offer}?")
            if rng.random() < 0.1:
                action = Action(action_type="none")
            prompt = agent_prompt(match, said, seat, profile="compact")
            value = 10 - abs(offer - price) / 10 if action.action_type == "speak" else 0.0
            rows.append(
                RewardRow(
                    prompt=(Message(role="user", content=prompt),),
                    completion=(Message(role="assistant", content=action.to_json()),),
                    episode_id=f"e{number}",
                    scenario_id=match.scenario.id,
                    turn=index,
                    seat=seat,
                    value=value,
                    values={"goal": value / 10, "relationship": 0.5 + value / 40},
                )
            )
            said.append(Turn(index=index, seat=seat, action=action))
    return rows


def rows_file(folder: Path, episodes: int = 24, **options: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    write_rows(reward_rows(episodes, **options), path)
    return path
