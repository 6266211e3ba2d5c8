import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sotopia_rl.errors import GateError
from sotopia_rl.train.reward_report import (
    OutputReport,
    RewardReport,
    best_of_n,
    check_gate,
    expected_best,
    group_keys,
    report_output,
)

ACTUAL = [0.0, 0.5, 1.0, 0.25, 0.75, 0.1, 0.9, 0.4]
GROUPS = [0, 0, 0, 0, 1, 1, 1, 1]


def report(predicted: list[float], actual: list[float] = ACTUAL) -> OutputReport:
    return report_output("value", predicted, actual, GROUPS[: len(actual)], train_mean=0.5)


def write_report(folder: Path, output: OutputReport) -> Path:
    full = RewardReport(groups="prompt", held_out_episodes=2, outputs=(output,))
    (folder / "report.json").write_text(json.dumps(full.model_dump()))
    return folder


def test_a_perfect_model_is_reported_as_perfect() -> None:
    perfect = report(ACTUAL)
    assert (perfect.mse, perfect.pairwise_accuracy, perfect.pairs) == (0.0, 1.0, 12)
    assert perfect.spearman == pytest.approx(1)
    assert perfect.baseline_mse == pytest.approx(np.mean((np.array(ACTUAL) - 0.5) ** 2))
    assert all(point.chosen == pytest.approx(point.oracle) for point in perfect.best_of_n)
    assert all(bin_.predicted == bin_.actual for bin_ in perfect.calibration)


def test_a_model_that_says_one_thing_has_no_correlation_and_guesses_pairs() -> None:
    constant = report([0.5] * 8)
    assert constant.spearman is None
    assert constant.pairwise_accuracy == 0.5


def test_an_inverted_model_orders_no_pair() -> None:
    assert report([-value for value in ACTUAL]).pairwise_accuracy == 0


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=7, unique_by=lambda p: p[0]))
def test_best_of_n_is_the_mean_over_all_choices(pairs: list[tuple[float, float]]) -> None:
    scores, values = np.array([p for p, _ in pairs]), np.array([v for _, v in pairs])
    for n in range(1, len(pairs) + 1):
        choices = [values[max(c, key=lambda i: scores[i])] for c in combinations(range(len(pairs)), n)]
        assert expected_best(scores, values, n) == pytest.approx(np.mean(choices))


def test_best_of_n_stops_where_groups_are_too_small() -> None:
    values = np.array(ACTUAL)
    assert [point.n for point in best_of_n(values, values, [[0, 1, 2, 3], [4, 5]])] == [1, 2, 4]


def test_what_is_compared_is_the_closest_that_enough_rows_share() -> None:
    alone, shared = list(range(50)), ["same"] * 50
    assert group_keys(shared, shared, alone)[0] == "prompt"
    assert group_keys(alone, shared, alone)[0] == "scenario"
    assert group_keys(["a", "a", *alone[2:]], alone, shared) == ("turn", shared)


def test_the_gate_lets_good_reward_models_through(tmp_path: Path) -> None:
    check_gate(write_report(tmp_path, report(ACTUAL)), 0.9)


@pytest.mark.parametrize(
    ("predicted", "words"),
    [([-v for v in ACTUAL], r"Spearman correlation -1.000 is below 0.3"), ([0.5] * 8, "no held-out rank correlation")],
)
def test_the_gate_stops_bad_ones(tmp_path: Path, predicted: list[float], words: str) -> None:
    folder = write_report(tmp_path, report(predicted))
    with pytest.raises(GateError, match=words):
        check_gate(folder, 0.3)
    check_gate(folder, None)


def test_the_gate_stops_a_model_of_which_nothing_is_known(tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"no report\.json"):
        check_gate(tmp_path, 0.3)
