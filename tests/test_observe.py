"""The renderer: equal to what SOTOPIA sent, blind where it should be, and a pure function of its inputs."""

import asyncio
import itertools
import re
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sotopia_data import golden, match_of, match_of_combo, needs_sotopia_data, profiles
from sotopia_rl.episode import ACTION_TYPES, Action, AgentSpec, Character, Match, Scenario, Turn, sha256_text
from sotopia_rl.errors import ConfigError, DataError
from sotopia_rl.models import Reply
from sotopia_rl.observe import (
    PROFILES,
    action_text,
    agent_prompt,
    judge_prompt,
    judge_view,
    observation_text,
    opening_context,
)
from sotopia_rl.prompts import source, template_sha256
from sotopia_rl.simulate import Pairing, SimulateConfig, play

VERSIONS = {"sotopia-0.1.0rc5": "paper", "sotopia-0.1.4": "sotopia-0.1.4", "sotopia-0.1.5": "sotopia-0.1.5"}

ANN = Character(
    id="ann",
    first_name="Ann",
    last_name="O'Malley",
    age=31,
    occupation="Baker",
    gender="Woman",
    gender_pronoun="She/her",
    public_info="Ann sings.",
    personality_and_values="Ann is calm.",
    secret="Ann is broke.",
)
LI = Character(
    id="li",
    first_name="雷",
    last_name="李",
    age=40,
    occupation="Judge",
    gender="Nonbinary",
    gender_pronoun="They/them",
    public_info="They hike.",
    personality_and_values="They are stern.",
    secret="They took a bribe.",
)


def match_between(first=ANN, second=LI, *, relationship=0, description="A kitchen.", goals=("Sell", "Buy")):
    scenario = Scenario(id="s", description=description, goals=goals, relationship=relationship)
    return Match.of(scenario, (first, second))


def said(*arguments):
    return [turn(i, "speak", argument) for i, argument in enumerate(arguments)]


def turn(index, action_type, argument=""):
    return Turn(index=index, seat=index % 2, action=Action(action_type=action_type, argument=argument))


def without_action_list(prompt):
    return re.sub(r"action types are\n[^\n]*\.\n", "action types are\n", prompt)


# What SOTOPIA sent


@needs_sotopia_data
@pytest.mark.parametrize("version", ["0.1.4", "0.1.5"])
def test_opening_contexts_equal_the_published_ones(version):
    contexts = golden(f"contexts_sotopia_{version}.json")
    assert len(contexts) == 100
    for combo_id, expected in contexts.items():
        match = match_of_combo(combo_id)
        seen = [opening_context(match, seat, profile=f"sotopia-{version}") for seat in (0, 1)]
        assert seen == expected["contexts"], combo_id


def recorded_conversation(judge_text):
    """The match and turns behind the golden prompts."""
    scenario = next(s for s in profiles().scenarios.values() if "common friends: Lawrence." in s.description)
    people = {c.name: c.id for c in profiles().characters.values()}
    match = match_of(scenario.id, people["Rafael Cortez"], people["Oliver Thompson"])
    utterances = re.findall(r'said: "(.*)"\n', judge_text)
    return match, [*said(*utterances), turn(len(utterances), "leave")]


@needs_sotopia_data
@pytest.mark.parametrize("version", VERSIONS)
def test_agent_prompts_equal_the_published_ones_but_for_the_order_of_actions(version):
    sent = golden("prompts_sent_by_version.json")[version]
    match, turns = recorded_conversation(sent["judge"]["prompt"])
    for k in (0, 1, 2):
        prompt = agent_prompt(match, turns[:k], k % 2, profile=VERSIONS[version])
        assert without_action_list(prompt) == without_action_list(sent[f"agent_turn{k}"]["prompt"])
        assert " ".join(ACTION_TYPES) + ".\n" in prompt


@needs_sotopia_data
@pytest.mark.parametrize("version", VERSIONS)
def test_judge_prompts_equal_the_published_ones(version):
    sent = golden("prompts_sent_by_version.json")[version]["judge"]["prompt"]
    match, turns = recorded_conversation(sent)
    assert judge_prompt(match, turns, profile=VERSIONS[version]) == sent


@needs_sotopia_data
def test_every_observation_of_a_published_episode_is_rendered_alike():
    log = golden("redis_EpisodeLog_sotopia-0.1.4.json")["value"]
    match = match_of(log["environment"], *log["agents"])
    names = [character.name for character in match.characters]
    groups = log["messages"]
    assert [text for _, _, text in groups[0][:2]] == [
        opening_context(match, seat, profile="sotopia-0.1.4") for seat in (0, 1)
    ]
    kinds = set()
    for index, (group, after) in enumerate(itertools.pairwise(groups)):
        played = action_of(group[2 + index % 2][2])
        kinds.add(played.action_type)
        assert action_text(played) == group[2 + index % 2][2]
        observed = observation_text(Turn(index=index, seat=index % 2, action=played), names[index % 2])
        assert [text for _, _, text in after[:2]] == [observed, observed]
    assert kinds == set(ACTION_TYPES)


def action_of(text):
    plain = {"did nothing": "none", "left the conversation": "leave"}
    if text in plain:
        return Action(action_type=plain[text])
    if text.startswith("said: "):
        return Action(action_type="speak", argument=text[len('said: "') : -1])
    kind, argument = re.fullmatch(r"\[(.*?)\] (.*)", text).groups()
    return Action(action_type=kind, argument=argument)


@needs_sotopia_data
def test_the_default_profile_differs_from_the_published_one_in_the_judges_prompt_only():
    match = match_of_combo(profiles().combos[0].id)
    turns = said("Hi.", "Hello.")
    for k in (0, 1, 2):
        published = agent_prompt(match, turns[:k], k % 2, profile="sotopia-0.1.4")
        assert agent_prompt(match, turns[:k], k % 2) == published
    assert judge_prompt(match, turns).startswith(judge_view(match, turns))


# Who sees what


PUBLIC = "Ann O'Malley is a 31-year-old female baker. She/her pronouns. Ann sings."
PERSONAL = "Personality and values description: Ann is calm."
KNOWN = {
    0: "Unknown",
    1: "Ann O'Malley ",
    2: f"{PUBLIC} ",
    3: f"{PUBLIC} {PERSONAL} ",
    4: f"{PUBLIC} {PERSONAL} ",
    5: f"{PUBLIC} {PERSONAL} ",
}


@pytest.mark.parametrize("relationship", KNOWN)
def test_what_is_known_of_the_partner_depends_on_the_relationship(relationship):
    match = match_between(relationship=relationship)
    assert f"Ann O'Malley's background: {KNOWN[relationship]}\n" in opening_context(match, 1)
    assert "Ann O'Malley's background: Unknown\n" in opening_context(match, 1, profile="sotopia-0.1.5")


def test_an_agent_knows_itself_and_the_environment_knows_everybody():
    match = match_between()
    whole = f"{PUBLIC} {PERSONAL} Ann's secrets: Ann is broke."
    assert f"Ann O'Malley's background: {whole}\n" in opening_context(match, 0)
    everything = opening_context(match, "environment")
    assert f"Ann O'Malley's background: {whole}\n" in everything
    assert everything.startswith("Here is the context of this interaction:\nScenario: A kitchen.\n")
    assert everything.endswith("雷's secrets: They took a bribe.\nAnn O'Malley's goal: Sell\n雷 李's goal: Buy")


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("relationship", range(6))
def test_no_agent_is_told_its_partners_secret_or_goal(profile, relationship):
    match = match_between(relationship=relationship)
    first, second = (agent_prompt(match, [], seat, profile=profile) for seat in (0, 1))
    assert "Ann is broke." in first
    assert "Buy" not in first
    assert "They took a bribe." not in first
    assert "They took a bribe." in second
    assert "Sell" not in second
    assert "Ann is broke." not in second


def test_what_a_character_lacks_is_left_out():
    bare = Character(id="b", first_name="Bo", last_name="")
    aged = Character(id="c", first_name="Cy", last_name="Oak", age=50, gender_pronoun="He/him")
    match = match_between(bare, aged, relationship=3)
    assert "Bo's background: Bo\nCy Oak's background: Cy Oak is a 50-year-old. He/him pronouns. \n" in (
        opening_context(match, 0)
    )
    artist = Character(id="d", first_name="Di", last_name="Elm", occupation="Artist", public_info="Di paints.")
    assert "Di Elm is an artist. Di paints.\n" in opening_context(match_between(artist), 0)


# Tags in scenarios and goals


def test_text_for_a_viewer_is_shown_to_that_viewer_and_the_environment_only():
    description = "A party.<p viewer='agent_0'> You know it.</p><p viewer=\"environment\"> The answer is Lee.</p> End."
    match = match_between(description=description)
    assert "Scenario: A party. You know it. End.\n" in opening_context(match, 0)
    assert "Scenario: A party. End.\n" in opening_context(match, 1)
    assert "Scenario: A party. You know it. The answer is Lee. End.\n" in opening_context(match, "environment")


def test_hint_tags_go_and_their_text_stays():
    goal = "Win (<extra_info>you are late <strategy_hint>Hint: run</strategy_hint></extra_info>)"
    match = match_between(goals=(f"{goal} <clarification_hint>now</clarification_hint>", "Rest"))
    assert "Ann O'Malley's goal: Win (you are late Hint: run) now\n" in opening_context(match, 0)
    assert "Ann O'Malley's goal: Unknown\n" in opening_context(match, 1)


def test_a_hidden_passage_hides_the_tags_inside_it():
    match = match_between(description="A<p viewer='environment'>B<extra_info>C</extra_info>D</p>E")
    assert "Scenario: AE\n" in opening_context(match, 0)
    assert "Scenario: ABCDE\n" in opening_context(match, "environment")


def test_other_angle_brackets_in_a_scenario_are_text():
    match = match_between(description="Pay < 5 & > 3, <b>really</b> {{ now }}")
    assert "Scenario: Pay < 5 & > 3, <b>really</b> {{ now }}\n" in opening_context(match, 0)


@pytest.mark.parametrize(
    "text", ["<p viewer='environment'>The answer", "The answer</p>", "<p><extra_info>The answer</p></extra_info>"]
)
def test_a_broken_tag_is_refused_before_it_can_show_what_it_should_hide(text):
    with pytest.raises(DataError, match=r"scenario s: .*correct the scenario's text"):
        agent_prompt(match_between(description=text), [], 0)


# What people say


AWKWARD = [
    "<b>No</b>",
    "I <3 you",
    "did nothing",
    "{action_list}",
    "{{ history }} {% if %} {# no #}",
    "one\n\ntwo\n   three",
    'She said: "no"',
    "line\u2028separator\x85and\rmore",
    "<p viewer='environment'>secret</p>",
    "<extra_info>hint</extra_info>",
    "é 李雷 🙂",
    "&amp; &lt;",
    "",
]


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("utterance", AWKWARD)
def test_an_utterance_passes_through_unchanged(utterance, profile):
    match = match_between()
    turns = said(utterance, "Well.")
    for seat in (0, 1):
        prompt = agent_prompt(match, turns, seat, profile=profile)
        assert f'Turn #0: Ann O\'Malley said: "{utterance}"\n\nTurn #1: 雷 李 said: "Well."\n' in prompt
    assert f'Turn #1\nAnn O\'Malley said: "{utterance}"\nTurn #2\n' in judge_prompt(match, turns, profile=profile)


def test_the_five_actions_read_as_in_sotopia():
    texts = [action_text(Action(action_type=kind, argument="X")) for kind in ACTION_TYPES]
    assert texts == [
        "did nothing",
        'said: "X"',
        "[non-verbal communication] X",
        "[action] X",
        "left the conversation",
    ]


def test_a_silent_turn_is_an_empty_observation_and_a_bare_turn_for_the_judge():
    match = match_between()
    turns = [turn(0, "speak", "Hi"), turn(1, "none"), turn(2, "leave")]
    assert '"Hi"\n\nTurn #1: \n\nTurn #2: Ann O\'Malley left the conversation\n' in agent_prompt(match, turns, 1)
    assert judge_view(match, turns).endswith(
        "Turn #1\nAnn O'Malley said: \"Hi\"\nTurn #2\nTurn #3\nAnn O'Malley left the conversation"
    )
    assert judge_view(match, turns, first_turn_number=0).endswith(
        "Turn #1\nTurn #2\nAnn O'Malley left the conversation"
    )


def test_the_compact_profile_is_context_history_and_turn_number():
    match = match_between()
    context = opening_context(match, 1, profile="compact")
    assert context == opening_context(match, 1, profile="sotopia-0.1.4")
    prompt = agent_prompt(match, said("Hi"), 1, profile="compact")
    assert prompt == f'You are 雷 李.\n{context}\nTurn #0: Ann O\'Malley said: "Hi"\nYou are at Turn #1.'


def test_an_unknown_profile_is_named_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'sotopia-0\.2'; choose one of default, compact, paper"):
        agent_prompt(match_between(), [], 0, profile="sotopia-0.2")


@pytest.mark.parametrize("profile", PROFILES.values(), ids=str)
def test_each_prompt_file_names_its_source(profile):
    for name in (profile.agent, profile.judge, "context.jinja", "format_paper.jinja"):
        assert re.match(r"\{#- (Source: .*SOTOPIA \d|Source: .*SOTOPIA 0|Ours)", source(name)), name
        assert template_sha256(name) == sha256_text(source(name))


# Laws


actions = st.builds(
    Action,
    action_type=st.sampled_from(ACTION_TYPES),
    argument=st.one_of(st.sampled_from(AWKWARD), st.text(max_size=60)),
)
turn_lists = st.lists(actions, max_size=8).map(
    lambda actions: [Turn(index=i, seat=i % 2, action=action) for i, action in enumerate(actions)]
)
profile_names = st.sampled_from(list(PROFILES))


@given(turns=turn_lists, profile=profile_names, seat=st.sampled_from([0, 1]))
def test_a_prompt_is_a_function_of_match_turns_seat_and_profile(turns, profile, seat):
    match = match_between()
    again = Match.model_validate_json(match.model_copy(update={"id": "other", "seed": 7, "seat": 1}).model_dump_json())
    stored = [Turn.model_validate_json(t.model_dump_json()).model_copy(update={"reply": "x"}) for t in turns]
    first = agent_prompt(match, turns, seat, profile=profile)
    assert agent_prompt(again, stored, seat, profile=profile) == first
    assert judge_prompt(again, stored, profile=profile) == judge_prompt(match, turns, profile=profile)


@given(turns=turn_lists, profile=profile_names, seat=st.sampled_from([0, 1]))
def test_a_prompt_begins_as_the_one_before_it_up_to_its_tail(turns, profile, seat):
    match = match_between()
    prompts = [agent_prompt(match, turns[:k], seat, profile=profile) for k in range(len(turns) + 1)]
    for k, (earlier, later) in enumerate(itertools.pairwise(prompts)):
        start, tail = earlier.rsplit(f"You are at Turn #{k}.", 1)
        assert later.startswith(start.removesuffix(".\n"))
        assert later.endswith(tail)


@given(first=turn_lists, second=turn_lists, profile=profile_names)
def test_different_histories_of_one_length_give_different_prompts(first, second, profile):
    visible = [[(t.action.action_type, shown_argument(t)) for t in turns] for turns in (first, second)]
    if len(first) == len(second) and visible[0] != visible[1]:
        match = match_between()
        prompts = {agent_prompt(match, turns, 0, profile=profile) for turns in (first, second)}
        assert len(prompts) == 2


def shown_argument(turn):
    return "" if turn.action.action_type in ("none", "leave") else turn.action.argument


@dataclass
class Replays:
    """A chat model that plays given actions, and keeps the prompts it got."""

    actions: list[Action]
    prompts: list[str] = field(default_factory=list)
    name: str = "replays"

    async def complete(self, messages, sampling, *, seed=None, schema=None):
        (message,) = messages
        self.prompts.append(message.content)
        return Reply(text=self.actions[len(self.prompts) - 1].to_json())

    async def __aenter__(self):
        return self

    async def __aexit__(self, *exc):
        return None


speakable = actions.filter(lambda a: a.action_type in ("none", "leave") or a.argument.strip())


@given(actions=st.lists(speakable, min_size=1, max_size=8), profile=profile_names)
def test_the_prompt_of_every_played_turn_renders_again(actions, profile):
    model = Replays(actions)
    agent = AgentSpec(model=model.name)
    config = SimulateConfig(prompt_profile=profile, max_turns=len(actions))
    pairing = Pairing(match_between(), (agent, agent))
    episode = asyncio.run(play(pairing, (model, model), tag="t", config=config))
    assert episode.status == "completed"
    for played, sent in zip(episode.turns, model.prompts, strict=True):
        prompt = agent_prompt(episode.match, episode.turns[: played.index], played.seat, profile=episode.prompt_profile)
        assert prompt == sent
        assert sha256_text(prompt) == played.prompt_sha256
