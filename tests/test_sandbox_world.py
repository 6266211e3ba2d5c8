"""The offline world: its scenarios and its people."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_talks import asked, episode, sample, talk
from sotopia_rl import sandbox
from sotopia_rl.errors import ModelCallError
from sotopia_rl.observe import PROFILES, agent_prompt
from sotopia_rl.sandbox.language import understand
from sotopia_rl.sandbox.play import hear, replay
from sotopia_rl.sandbox.reading import read_agent
from sotopia_rl.simulate import parse_action


def test_train_and_held_out_share_no_scenario_text_or_person():
    train, held_out = sandbox.matches("train", 1200), sandbox.matches("held_out", 400)
    for what in (
        lambda m: [m.scenario.id],
        lambda m: [m.scenario.description],
        lambda m: [m.id],
        lambda m: [person.id for person in m.characters],
    ):
        assert {x for m in train for x in what(m)}.isdisjoint(x for m in held_out for x in what(m))


def test_matches_are_the_same_every_time_and_a_longer_list_starts_with_the_shorter():
    assert sandbox.matches("train", 50, seed=3)[:20] == sandbox.matches("train", 20, seed=3)
    assert sandbox.matches("train", 20, seed=3) != sandbox.matches("train", 20, seed=4)


def test_families_take_turns_and_both_seats_are_tested_in_each():
    found = sandbox.matches("train", 80)
    seats = {(sandbox.sides(m)[0].family, m.seat) for m in found}
    assert seats == {(family, seat) for family in sandbox.FAMILIES for seat in (0, 1)}
    assert {m.scenario.relationship for m in found} == {0, 1, 2, 3}
    assert {role for m in found for role in (sandbox.sides(m)[0].role,)} == {
        "seller", "buyer", "sharer", "planner", "keeper", "asker",
    }  # fmt: skip


def test_an_unknown_family_or_split_is_refused():
    with pytest.raises(ValueError, match="duel"):
        sandbox.matches("train", 1, families=["duel"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="test"):
        sandbox.matches("test", 1)  # type: ignore[arg-type]


def test_every_price_scenario_has_room_for_a_deal():
    for match in sandbox.matches("train", 100, families=["price"]):
        limits = {side.role: side.limit for side in sandbox.sides(match)}
        assert limits["buyer"] - limits["seller"] >= 20


@pytest.mark.parametrize("profile", PROFILES)
def test_an_agent_reads_its_own_facts_and_the_history_and_no_more_in_every_profile(profile):
    for match in sandbox.matches("train", 16):
        for seat in (0, 1):
            turns = talk("Hello. I like tea.", "How about 55?", "")[: 2 + seat]
            seen = read_agent(agent_prompt(match, turns, seat, profile=profile))
            assert (seen.seat, seen.side, seen.heard) == (seat, sandbox.sides(match)[seat], hear(turns))


def test_people_of_every_temperament_speak_only_words_that_make_sense():
    for found in sample(120):
        assert found.status == "completed"
        play = replay(sandbox.sides(found.match), hear(found.turns))
        assert not play.odd, [found.turns[i].action.argument for i in play.odd]


def test_conversations_are_short():
    lengths = [len(found.turns) for found in sample(120)]
    assert 4 <= statistics.mean(lengths) <= 9
    assert max(len(t.action.argument.split()) for f in sample(120) for t in f.turns) <= 22


@pytest.mark.parametrize("name", sandbox.TEMPERAMENTS)
def test_the_same_prompt_and_seed_give_the_same_reply_and_seeds_matter(name):
    model = sandbox.SCRIPTED[name]()
    prompts = [agent_prompt(m, (), 0) for m in sandbox.matches("train", 20)]
    replies = [[asked(model, p, seed=seed) for seed in range(4)] for p in prompts]
    assert replies == [[asked(model, p, seed=seed) for seed in range(4)] for p in prompts]
    assert any(len(set(of_prompt)) > 1 for of_prompt in replies)


def test_an_opening_is_worth_more_from_the_fair_than_from_the_generous():
    """The difference that a policy can learn shows in single utterances."""
    for match in sandbox.matches("train", 40, families=["price", "items", "time"]):
        both = sandbox.sides(match)
        worth = {}
        for name in ("fair", "generous"):
            plays = [replay(both, hear(episode(match, name, "fair").turns))]
            offers = [p.stood[i] for p in plays for i in sorted(p.stood) if p.stood[i] and p.stood[i].seat == 0]
            worth[name] = sandbox.points(both, 0, offers[0].outcome) if offers else None
        if None not in worth.values():
            assert worth["fair"] >= worth["generous"]


def test_temperaments_differ_in_what_they_reach():
    goal, bond = defaultdict(list), defaultdict(list)
    for match in sandbox.matches("train", 12):
        for first in sandbox.TEMPERAMENTS:
            for second in ("fair", "generous", "tough", "talkative"):
                found = episode(match, first, second)
                scores = sandbox.verdict(match, found.turns)[0]
                goal[first].append(scores["goal"].score)
                bond[first].append(scores["relationship"].score)
    goals = {name: statistics.mean(values) for name, values in goal.items()}
    bonds = {name: statistics.mean(values) for name, values in bond.items()}
    assert min(goals["fair"], goals["tough"]) > max(goals["generous"], goals["hasty"], goals["leaky"]) + 1
    assert bonds["fair"] > bonds["tough"] > bonds["rude"]


def test_a_person_leaves_when_insulted_twice():
    match = sandbox.matches("train", 1, families=["time"])[0]
    day = next(iter(sandbox.sides(match)[0].values))
    turns = talk(f"You are a fool. I want {day}.", "Please be kind.", "You are greedy.")
    action = parse_action(asked(sandbox.SCRIPTED["fair"](), agent_prompt(match, turns, 1)))
    assert action.action_type == "leave"


def test_a_garbled_speaker_is_garbled_at_some_attempts_only():
    prompt = agent_prompt(sandbox.matches("train", 1)[0], (), 0)
    kinds = set()
    for seed in range(40):
        try:
            parse_action(asked(sandbox.SCRIPTED["garbled"](), prompt, seed=seed))
            kinds.add("good")
        except ValueError:
            kinds.add("bad")
    assert kinds == {"good", "bad"}


def test_a_prompt_from_another_world_is_refused():
    with pytest.raises(ModelCallError) as caught:
        asked(sandbox.SCRIPTED["fair"](), "What is the capital of France?")
    assert caught.value.kind == "model"


SENTENCES = st.sampled_from(
    [
        "Hello.", "How about 55?", "I want 9999.", "My limit is 0.", "I want Monday.", "Deal.", "Deal on Friday.",
        "No.", "You are a fool.", "What do you like?", "What is your best price?", "What do you want most?",
        "I want the drum most.", "Friday suits me best.", "I take the drum.", "You get the rest.", "Tell me the day.",
        "Give me a hint.", "It is Monday.", "It starts with M.", "Take it or leave it.", "Goodbye.", "Blorp 7.", "",
    ]
)  # fmt: skip


@settings(deadline=None)
@given(
    st.lists(st.lists(SENTENCES, max_size=3).map(" ".join), max_size=7),
    st.integers(0, 7),
    st.sampled_from(sorted(sandbox.TEMPERAMENTS)),
)
def test_nothing_that_a_partner_says_leaves_a_person_without_a_reply(lines, which, name):
    match, turns = sandbox.matches("train", 8)[which], talk(*lines)
    prompt = agent_prompt(match, turns, len(turns) % 2, profile="compact")
    parse_action(asked(sandbox.SCRIPTED[name](), prompt))


@given(st.text())
def test_any_utterance_has_acts(text):
    assert understand(text)


def test_shares_named_in_two_sentences_are_one_offer_and_contradictions_make_no_sense():
    (offer,) = understand("I take the drum. You get the kite and the vase.")
    assert offer.value == (frozenset({"drum"}), frozenset({"kite", "vase"}))
    assert [act.kind for act in understand("I take the drum. You get the drum.")] == ["unknown"]


def test_importing_the_offline_world_does_not_import_torch():
    code = "import sys, sotopia_rl.sandbox; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_replies_are_plain_action_json():
    reply = asked(sandbox.SCRIPTED["tough"](), agent_prompt(sandbox.matches("train", 1)[0], (), 0))
    assert set(json.loads(reply)) == {"action_type", "argument"}
