"""Judges and partners as sources of spread: known variances come out again, and what cannot be told is said so."""

from __future__ import annotations

import numpy as np
import pytest

from sotopia_rl.evaluate.cells import Cell, pooled
from sotopia_rl.evaluate.noise import judge_agreement, judge_noise, spread

SD = {"scenario": 1.0, "partner": 0.8, "scenario x partner": 0.5, "judge": 0.6, "taste": 0.7, "noise": 0.4, "rest": 1.2}


def panel(rng, *, scenarios=10, partners=3, matches=2, judges=3, judgements=2, sd=SD):
    """A and B by judge, whose differences have the given standard deviations by source."""
    of = {name: rng.normal(0, sd[name], shape) for name, shape in (
        ("scenario", scenarios), ("partner", partners), ("scenario x partner", (scenarios, partners)), ("judge", judges)
    )}  # fmt: skip
    scored = {(j, side): {} for j in range(judges) for side in "ab"}
    repeats = {place: {} for place in scored}
    scenario_of = {}
    for s in range(scenarios):
        for m in range(matches):
            scenario_of[f"{s}/{m}"] = f"scenario {s}"
            for p in range(partners):
                key = (f"{s}/{m}", f"partner {p}")
                shared = of["scenario"][s] + of["partner"][p] + of["scenario x partner"][s, p]
                shared += rng.normal(0, sd["rest"])
                for j in range(judges):
                    seen = 5 + shared + of["judge"][j] + rng.normal(0, sd["taste"])
                    for side, level in (("a", seen), ("b", 5.0)):
                        # a difference has the noise of both of its sides
                        said = [{"goal": level + rng.normal(0, sd["noise"] / 2**0.5)} for _ in range(judgements)]
                        scored[j, side][key] = said[0]
                        if judgements > 1:
                            repeats[j, side][key] = said
    cells = {
        place: Cell(place[1], "sampled", "model", f"judge {place[0]}", scored[place], {}, repeats[place])
        for place in scored
    }
    return {f"judge {j}": (cells[j, "a"], cells[j, "b"]) for j in range(judges)}, scenario_of


def by_source(found):
    return {c.source: c for c in found.components}


@pytest.mark.slow
def test_known_variances_come_out_again():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(40):
        a_and_b, scenario_of = panel(rng)
        result = spread(a_and_b, scenario_of, "goal", confidence=0.95)
        found.append([c.variance for c in result.components])
    sources = list(by_source(result))
    means, errors = np.mean(found, axis=0), np.std(found, axis=0) / np.sqrt(len(found))
    named = {"judge x conversation": "taste", "judge noise": "noise", "conversation": "rest"}
    truth = [SD[named.get(source, source)] ** 2 for source in sources]
    assert (np.abs(means - truth) < 4 * errors).all(), dict(zip(sources, zip(means, truth, strict=True), strict=True))


def test_one_judge_and_one_partner_leave_less_to_tell_and_say_so():
    a_and_b, scenario_of = panel(np.random.default_rng(1), partners=1, judges=1, judgements=1)
    found = by_source(spread(a_and_b, scenario_of, "goal", confidence=0.95))
    assert [source for source, c in found.items() if c.variance is not None] == ["scenario", "conversation"]
    assert found["partner"].note == "one partner: cannot be told"
    assert found["judge"].note == "one judge: cannot be told"
    assert "--repeat-judge 2" in found["judge noise"].note
    assert found["conversation"].note == "holds the judge's noise"


def test_scenarios_played_once_give_no_component_of_scenario_and_partner():
    a_and_b, scenario_of = panel(np.random.default_rng(2), matches=1, judges=1)
    found = by_source(spread(a_and_b, scenario_of, "goal", confidence=0.95))
    assert found["scenario x partner"].variance is None
    assert "inside conversation" in found["scenario x partner"].note
    assert found["conversation"].variance > 0


def test_a_judge_that_disagrees_with_itself_is_measured():
    a_and_b, scenario_of = panel(np.random.default_rng(3), scenarios=14, judges=1)
    cells = {"only": {("a", "sampled"): a_and_b["judge 0"][0], ("b", "sampled"): a_and_b["judge 0"][1]}}
    (found,) = [n for n in judge_noise(with_every_score(cells), scenario_of) if n.metric == "goal"]
    assert found.low < SD["noise"] / 2**0.5 < found.high
    assert (found.num_episodes, found.num_judgements) == (168, 336)


def with_every_score(by_judge):
    """The same number for each of the scores, which are all looked at."""
    from sotopia_rl.results import SCORES

    def filled(metrics):
        return dict.fromkeys(SCORES, metrics["goal"])

    return {
        judge: {
            place: Cell(
                c.system,
                c.setting,
                c.model,
                c.judge,
                {k: filled(m) for k, m in c.scored.items()},
                c.failed,
                {k: [filled(m) for m in said] for k, said in c.repeats.items()},
            )
            for place, c in cells.items()
        }
        for judge, cells in by_judge.items()
    }


def test_judges_that_see_the_same_agree_and_judges_that_guess_do_not():
    rng = np.random.default_rng(4)
    scenario_of = {f"m{i}": f"s{i // 2}" for i in range(40)}
    level = rng.normal(5, 2, 40)

    def cell(judge, scores):
        return Cell("a", "sampled", "x", judge, {(f"m{i}", "p"): {"goal": v} for i, v in enumerate(scores)}, {})

    same = {j: {("a", "sampled"): cell(j, level + rng.normal(0, 0.3, 40))} for j in ("x", "y", "z")}
    guessed = {j: {("a", "sampled"): cell(j, rng.normal(5, 2, 40))} for j in ("x", "y", "z")}
    (agree,), (guess,) = judge_agreement(same, scenario_of), judge_agreement(guessed, scenario_of)
    assert agree.alpha > 0.9
    assert agree.low <= agree.alpha <= agree.high
    assert guess.alpha < 0.4
    assert (agree.num_episodes, agree.num_scenarios, set(agree.means)) == (40, 20, {"x", "y", "z"})


def test_one_judge_has_nobody_to_agree_with():
    assert judge_agreement({"x": {}}, {}) == []


def test_the_pool_is_the_mean_over_judges_and_lacks_what_one_of_them_lacks():
    keys = [("m1", "p"), ("m2", "p"), ("m3", "p")]
    x = Cell("a", "sampled", "model", "x", {keys[0]: {"goal": 4.0}, keys[1]: {"goal": 6.0}}, {keys[2]: "not played"})
    y = Cell("a", "sampled", "model", "y", {keys[0]: {"goal": 7.0}}, {keys[1]: "not judged", keys[2]: "not played"})
    found = pooled([x, y])
    assert found.scored == {keys[0]: {"goal": 5.5}}
    assert found.failed == {keys[1]: "not judged (y)", keys[2]: "not played"}
    assert pooled([x]) is x


@pytest.mark.parametrize("count", [1, 2])
def test_too_little_to_speak_of_spread_gives_none(count):
    a_and_b, scenario_of = panel(np.random.default_rng(5), scenarios=count, partners=1, matches=1, judges=1)
    assert spread(a_and_b, scenario_of, "goal", confidence=0.95) is None


def test_dimensions_that_a_judge_was_not_asked_for_are_passed_over():
    said = [{"overall": 4.0, "charm": 3.0}, {"overall": 5.0, "charm": 4.0}]
    keys = [(f"m{i}", "p") for i in range(4)]
    cell = Cell("a", "sampled", "x", "j", dict.fromkeys(keys, said[0]), {}, dict.fromkeys(keys, said))
    found = judge_noise({"j": {("a", "sampled"): cell}}, {f"m{i}": f"s{i}" for i in range(4)})
    assert [n.metric for n in found] == ["overall"]
    assert found[0].sd == pytest.approx(0.5**0.5)
