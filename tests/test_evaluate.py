"""Manifests are frozen, pairs are paired, and what has no score is counted, bounded and never averaged."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from played_systems import PARTNERS, manifest, played, rating
from sotopia_rl.episode import Action, AgentSpec, Failure, Sampling, Turn, other
from sotopia_rl.errors import DataError, EvaluationError
from sotopia_rl.evaluate import (
    Manifest,
    Played,
    evaluate,
    evaluation_pairings,
    load_manifest,
    load_results,
    metrics_of,
)

TIMEOUT = Failure(kind="timeout", message="no reply in 30 s", turn=2)
OVER = manifest()


@pytest.fixture(scope="module")
def results():
    systems = [played("base", 2, OVER), played("sft", 4, OVER), played("grpo", 6, OVER)]
    return evaluate(systems, [("grpo", "sft"), ("sft", "base")], seeds={"train": 3})


# --- manifests --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.yaml", "m.json"])
def test_a_saved_manifest_loads_as_the_same_manifest(tmp_path, name):
    OVER.save(tmp_path / name)
    assert load_manifest(tmp_path / name) == OVER
    assert load_manifest(tmp_path / name).sha256 == OVER.sha256


def test_a_manifest_changed_after_it_was_frozen_is_refused(tmp_path):
    path = tmp_path / "m.json"
    OVER.save(path)
    data = json.loads(path.read_text())
    data["matches"][0]["seed"] = 99
    path.write_text(json.dumps(data))
    with pytest.raises(DataError, match="changed after it was frozen"):
        load_manifest(path)


def test_a_manifest_without_a_hash_is_taken_as_it_stands(tmp_path):
    path = tmp_path / "m.json"
    OVER.save(path)
    data = json.loads(path.read_text())
    del data["sha256"]
    path.write_text(json.dumps(data))
    assert load_manifest(path) == OVER


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "not a manifest"),
        ("[]", "found list"),
        ('{"name": "x"}', "matches: Field required"),
        ('{"name": "x", "matches": [], "sha": "1"}', "not a manifest"),
    ],
)
def test_a_file_that_is_no_manifest_is_named_with_what_is_wrong(tmp_path, text, message):
    path = tmp_path / "m.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=message) as raised:
        load_manifest(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_match_stands_in_a_manifest_only_once():
    with pytest.raises(ValueError, match="1 matches stand in it more than once"):
        Manifest(name="twice", matches=(OVER.matches[0], OVER.matches[0]))


def test_the_name_of_a_manifest_does_not_change_its_hash():
    assert manifest(name="other").sha256 == OVER.sha256
    assert manifest(7).sha256 != OVER.sha256


def test_the_system_sits_where_the_match_says_and_meets_every_partner():
    system = AgentSpec(model="local/x")
    pairings = evaluation_pairings(OVER, system, PARTNERS)
    assert len(pairings) == len(OVER.matches) * len(PARTNERS)
    assert all(p.agents[p.match.seat] == system for p in pairings)
    assert {p.agents[other(p.match.seat)].model for p in pairings} == {"scripted/fair", "scripted/tough"}


# --- metrics of an episode --------------------------------------------------------------------------


def said(*texts, attempts=1):
    return tuple(
        Turn(
            index=i,
            seat=i % 2,
            attempts=attempts,
            action=Action(action_type="speak" if text else "none", argument=text),
        )
        for i, text in enumerate(texts)
    )


def episode_of(turns):
    return played("sft", 4, OVER).episodes[0].model_copy(update={"turns": turns})


def test_guards_are_counted_for_the_seat_alone():
    episode = episode_of(said("Hello  there", "Hi", "hello there", "What a lovely long sentence", "no"))
    first = metrics_of(episode, rating(episode, skill=4, noise=0), 0)
    assert first["words_per_utterance"] == pytest.approx(5 / 3)
    assert first["repetition"] == pytest.approx(1 / 3)
    assert first["num_turns"] == 5
    assert metrics_of(episode, rating(episode, skill=4, noise=0), 1)["repetition"] == 0


def test_replies_that_had_to_be_asked_for_again_are_counted_per_turn():
    episode = episode_of(said("a", "b", "c", attempts=3))
    assert metrics_of(episode, rating(episode, skill=4, noise=0), 0)["invalid_replies"] == 2


def test_a_leak_is_an_episode_whose_secret_score_is_below_zero():
    episode = episode_of(said("a", "b"))
    assert metrics_of(episode, rating(episode, skill=4, noise=0), 0)["secret_leaks"] == 1
    assert metrics_of(episode, rating(episode, skill=20, noise=0), 0)["secret_leaks"] == 0


def test_a_seat_that_said_nothing_has_no_length_and_no_repetition():
    episode = episode_of(said("", "Hi"))
    found = metrics_of(episode, rating(episode, skill=4, noise=0), 0)
    assert "words_per_utterance" not in found
    assert "repetition" not in found
    assert found["invalid_replies"] == 0


# --- comparisons ------------------------------------------------------------------------------------


def test_differences_are_a_minus_b_with_their_interval(results):
    row = results.row("grpo", "sft", "sampled", "goal")
    assert row.difference == pytest.approx(row.mean_a - row.mean_b)
    assert row.low < row.difference < row.high
    assert row.low > 0
    assert (row.num_pairs, row.num_scenarios, row.num_excluded) == (32, 8, 0)
    assert row.worst == row.best == pytest.approx(row.difference)


def test_every_score_and_guard_has_a_row_in_both_settings(results):
    found = {(row.setting, row.metric) for row in results.rows if row.system_a == "grpo"}
    for setting in ("sampled", "greedy"):
        assert {(setting, m) for m in ("goal", "overall", "secret_leaks", "words_per_utterance", "num_turns")} <= found


def test_adjusted_p_values_are_never_smaller(results):
    assert all(row.p_holm >= row.p_value for row in results.rows)


def test_results_survive_their_file(results, tmp_path):
    results.save(tmp_path / "results.json")
    assert load_results(tmp_path / "results.json") == results
    row = json.loads((tmp_path / "results.json").read_text())["rows"][0]
    wanted = {"system_a", "system_b", "setting", "metric", "num_pairs", "mean_a", "mean_b", "difference", "low", "high"}
    assert wanted <= set(row)


@pytest.mark.parametrize("text", [None, "{", '{"rows": 1}'])
def test_a_file_that_holds_no_results_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(DataError, match=r"results\.json"):
        load_results(tmp_path / "results.json")


def test_swapping_the_systems_mirrors_the_comparison():
    systems = [played("sft", 4, OVER), played("grpo", 6, OVER)]
    forward = evaluate(systems, [("grpo", "sft")]).row("grpo", "sft", "greedy", "overall")
    backward = evaluate(systems, [("sft", "grpo")]).row("sft", "grpo", "greedy", "overall")
    assert forward.difference == pytest.approx(-backward.difference)
    assert (forward.low, forward.high) == pytest.approx((-backward.high, -backward.low))
    assert forward.p_value == backward.p_value


def test_the_order_of_episodes_changes_nothing():
    sft, grpo = played("sft", 4, OVER), played("grpo", 6, OVER)
    turned = replace(grpo, episodes=list(reversed(grpo.episodes)))
    assert evaluate([sft, grpo], [("grpo", "sft")]) == evaluate([sft, turned], [("grpo", "sft")])


# --- sampled and greedy -----------------------------------------------------------------------------


def test_the_sampled_gain_is_better_play_plus_less_noise(results):
    found = next(d for d in results.decompositions if (d.system_a, d.metric) == ("grpo", "goal"))
    assert found.sampled_gain.value == pytest.approx(found.greedy_gain.value + found.noise_saving.value)
    assert found.noise_saving.value == pytest.approx(found.noise_cost_b.value - found.noise_cost_a.value)
    assert found.over_greedy_b.value == pytest.approx(found.sampled_gain.value - found.noise_cost_b.value)
    assert found.num_pairs == 32
    assert found.greedy_gain.low > 0


def test_a_system_played_in_one_setting_is_compared_in_that_one():
    sft, grpo = played("sft", 4, OVER), played("grpo", 6, OVER, temperatures=[0.0])
    found = evaluate([sft, grpo], [("grpo", "sft")])
    assert {row.setting for row in found.rows} == {"greedy"}
    assert found.decompositions == ()


# --- failures ---------------------------------------------------------------------------------------


def test_a_failed_episode_is_excluded_counted_and_bounded():
    sft = played("sft", 4, OVER)
    grpo = played("grpo", 6, OVER, failures={0: TIMEOUT, 5: TIMEOUT})
    found = evaluate([sft, grpo], [("grpo", "sft")])
    row = found.row("grpo", "sft", "sampled", "goal")
    assert (row.num_pairs, row.num_excluded) == (30, 2)
    assert row.worst < row.difference < row.best
    assert row.best - row.worst == pytest.approx(2 * 10 / 32)  # sft's scores are known: each can move 10 points
    summary = next(s for s in found.systems if (s.system, s.setting) == ("grpo", "sampled"))
    assert summary.failures == {"agent_failed: timeout": 2}
    assert (summary.planned, summary.scored) == (32, 30)


def test_a_missing_rating_a_failed_judge_and_a_missing_episode_are_told_apart():
    sft, whole = played("sft", 4, OVER), played("grpo", 6, OVER, temperatures=[0.7])
    ids = [e.id for e in whole.episodes]
    ratings = {k: v for k, v in whole.ratings.items() if k not in ids[:3]}
    judge_failed = {ids[0]: Failure(kind="bad_reply", message="prose")}
    grpo = replace(whole, episodes=whole.episodes[:-4], ratings=ratings, failures=judge_failed)
    found = evaluate([sft, grpo], [("grpo", "sft")])
    summary = next(s for s in found.systems if s.system == "grpo")
    assert summary.failures == {"judge failed: bad_reply": 1, "not judged": 2, "not played": 4}
    assert found.row("grpo", "sft", "sampled", "goal").num_excluded == 7


def refused(systems, comparisons=(("grpo", "sft"),), **options):
    with pytest.raises(EvaluationError) as raised:
        evaluate(systems, comparisons, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_different_manifests_are_refused_with_counts():
    message = refused([played("sft", 4, OVER), played("grpo", 6, manifest(7))])
    assert "toy (16 matches" in message
    assert "toy (14 matches" in message
    assert "14 matches in common" in message


def test_duplicated_episodes_are_refused_with_counts():
    grpo = played("grpo", 6, OVER)
    doubled = replace(grpo, episodes=[*grpo.episodes, *grpo.episodes[:2]])
    assert "2 sampled pairs have more than one episode" in refused([played("sft", 4, OVER), doubled])


def test_episodes_outside_the_manifest_are_refused_with_counts():
    grpo = played("grpo", 6, manifest(9))
    assert "4 of 36 sampled pairs are not in manifest" in refused(
        [played("sft", 4, OVER), replace(grpo, manifest=OVER)]
    )


def test_partners_that_were_not_asked_for_are_refused():
    message = refused([played("sft", 4, OVER), played("grpo", 6, OVER)], partners=["scripted/fair"])
    assert "16 of 32 sampled pairs" in message


def test_two_judges_are_refused_with_counts():
    sft, grpo = played("sft", 4, OVER), played("grpo", 6, OVER)
    ratings = {k: v.model_copy(update={"judge": "openai/gpt-4o"}) for k, v in grpo.ratings.items()}
    message = refused([sft, replace(grpo, ratings=ratings)])
    assert "openai/gpt-4o 64" in message
    assert "scripted/judge 64" in message


def test_systems_without_a_common_scored_pair_are_refused_with_counts():
    sft = played("sft", 4, OVER, temperatures=[0.7], failures=dict.fromkeys(range(16), TIMEOUT))
    grpo = played("grpo", 6, OVER, temperatures=[0.7], failures=dict.fromkeys(range(16, 32), TIMEOUT))
    message = refused([sft, grpo])
    assert "share no scored sampled pair" in message
    assert "'sft' has 16 scores of 32 (agent_failed: timeout 16)" in message


def test_one_system_without_a_score_does_not_take_the_others_down():
    systems = [played("sft", 4, OVER), played("grpo", 6, OVER), played("bad", 5, OVER, temperatures=[0.7])]
    alone = evaluate(systems[:2], [("grpo", "sft")])
    systems[2] = replace(systems[2], ratings={}, failures={})
    found = evaluate(systems, [("bad", "sft"), ("grpo", "sft")])
    assert found.rows == alone.rows
    (lacking,) = found.unpaired
    assert (lacking.system_a, lacking.system_b, lacking.setting, lacking.num_excluded) == ("bad", "sft", "sampled", 32)
    assert next(s for s in found.systems if s.system == "bad").failures == {"not judged": 32}


def test_a_system_that_played_nothing_is_a_comparison_without_pairs():
    systems = [played("sft", 4, OVER), played("grpo", 6, OVER), Played("late", OVER, [], {})]
    found = evaluate(systems, [("late", "sft"), ("grpo", "sft")])
    assert [(u.system_a, u.setting, u.num_excluded) for u in found.unpaired] == [
        ("late", "sampled", 32),
        ("late", "greedy", 32),
    ]
    assert "'late' was not played" in refused(systems, [("late", "sft")])


def test_where_every_episode_failed_the_causes_are_given_and_not_the_advice_to_judge():
    failed = dict.fromkeys(range(32), TIMEOUT)
    systems = [played(name, 4, OVER, temperatures=[0.7], failures=failed) for name in ("sft", "grpo")]
    message = refused(systems)
    assert message == "none of the 64 episodes has a rating: agent_failed: timeout 64"


def test_two_systems_under_one_name_and_unknown_names_are_refused():
    sft = played("sft", 4, OVER)
    assert "name each once" in refused([sft, sft])
    assert "no episodes for ['grpo']" in refused([sft])


def test_two_models_under_one_system_name_are_refused():
    sft, grpo = played("sft", 4, OVER, temperatures=[0.7]), played("grpo", 6, OVER, temperatures=[0.7])
    mixed = Played("grpo", OVER, [*grpo.episodes[:5], *sft.episodes[5:]], dict(sft.ratings) | dict(grpo.ratings))
    assert "played by 2 models" in refused([sft, mixed])


def test_nothing_judged_is_refused():
    sft, grpo = played("sft", 4, OVER), played("grpo", 6, OVER)
    assert "none of the 128 episodes has a rating" in refused([replace(sft, ratings={}), replace(grpo, ratings={})])


def test_one_scenario_gives_means_without_an_interval():
    over = manifest(1)
    found = evaluate([played("sft", 4, over), played("grpo", 6, over)], [("grpo", "sft")])
    row = found.row("grpo", "sft", "greedy", "goal")
    assert row.num_scenarios == 1
    assert (row.low, row.high, row.detectable) == (None, None, None)


def test_temperature_zero_is_what_makes_a_system_greedy():
    spec = AgentSpec(model="local/x", sampling=Sampling(temperature=0.0))
    assert evaluation_pairings(OVER, spec, PARTNERS)[0].agents[0].sampling.temperature == 0
    assert {row.setting for row in evaluate([played("a", 1, OVER), played("b", 2, OVER)], [("a", "b")]).rows} == {
        "sampled",
        "greedy",
    }
