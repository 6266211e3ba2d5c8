"""Agreement: published examples, scipy, and label files in which something is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from attributed_episodes import PROVENANCE
from sotopia_rl.agreement import Label, agreement, krippendorff_alpha, labels_of, read_labels
from sotopia_rl.episode import Attribution, UtteranceWeight
from sotopia_rl.errors import DataError

# K. Krippendorff, Computing Krippendorff's Alpha-Reliability (2011): examples A (nominal, two observers) and
# C (any metric, four observers, missing data). 0 stands for no label.
TWO_OBSERVERS = np.array([[0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]])
FOUR_OBSERVERS = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3],
        [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
    ]
)


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_equals_the_published_example(level, alpha):
    units = [[int(v) for v in column if v] for column in FOUR_OBSERVERS.T]
    assert krippendorff_alpha(units, level) == pytest.approx(alpha, abs=0.0005)


def test_alpha_equals_the_published_example_of_two_observers():
    assert krippendorff_alpha(TWO_OBSERVERS.T.tolist(), "nominal") == pytest.approx(0.095, abs=0.0005)


def test_alpha_through_labels_is_the_same():
    found = [
        Label(episode=f"e{unit % 3}", turn=unit, label=value, rater=f"r{rater}")
        for rater, row in enumerate(FOUR_OBSERVERS)
        for unit, value in enumerate(row.tolist())
        if value
    ]
    result = agreement(found, level="interval", resamples=50)
    assert result.alpha.value == pytest.approx(0.849, abs=0.0005)
    assert (result.num_units, result.num_episodes, result.raters) == (11, 3, ("r0", "r1", "r2", "r3"))
    assert result.alpha.low <= result.alpha.value <= result.alpha.high
    assert len(result.pairs) == 6


units = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=12)
LEVELS = st.sampled_from(["nominal", "ordinal", "interval"])


@given(units, LEVELS)
def test_alpha_is_at_most_one_and_one_exactly_when_all_agree(ratings, level):
    alpha = krippendorff_alpha(ratings, level)
    pairable = [unit for unit in ratings if len(unit) > 1]
    if alpha is None:
        assert len({label for unit in pairable for label in unit}) < 2
    else:
        assert alpha <= 1
        assert (alpha == pytest.approx(1)) == all(len(set(unit)) == 1 for unit in pairable)


@given(units, LEVELS, st.randoms(use_true_random=False))
def test_alpha_knows_no_order_of_raters_or_units(ratings, level, rng):
    alpha = krippendorff_alpha(ratings, level)
    shuffled = [rng.sample(unit, len(unit)) for unit in rng.sample(ratings, len(ratings))]
    again = krippendorff_alpha(shuffled, level)
    assert (alpha is None) == (again is None)
    assert alpha is None or again == pytest.approx(alpha)


@given(units)
def test_interval_alpha_ignores_scale_and_ordinal_alpha_any_order_preserving_change(ratings):
    for level, change in (("interval", lambda v: 3 * v - 7), ("ordinal", lambda v: v**3)):
        alpha = krippendorff_alpha(ratings, level)
        again = krippendorff_alpha([[change(v) for v in unit] for unit in ratings], level)
        assert (alpha is None) == (again is None)
        assert alpha is None or again == pytest.approx(alpha)


def noisy_labels(noise: float, episodes: int = 40) -> list[Label]:
    rng = np.random.default_rng(1)
    found = []
    for episode in range(episodes):
        for turn in range(6):
            truth = int(rng.integers(0, 4))
            other = int(rng.integers(0, 4)) if rng.random() < noise else truth
            for rater, value in (("a", truth), ("b", other)):
                found.append(Label(episode=f"e{episode}", turn=turn, label=value, rater=rater))
    return found


def test_correlations_equal_scipys():
    found = noisy_labels(0.4)
    (pair,) = agreement(found, resamples=200).pairs
    x = [label.label for label in found if label.rater == "a"]
    y = [label.label for label in found if label.rater == "b"]
    assert pair.pearson.value == pytest.approx(stats.pearsonr(x, y).statistic)
    assert pair.spearman.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert pair.pearson.low < pair.pearson.value < pair.pearson.high
    assert (pair.num_units, pair.num_episodes) == (240, 40)


def test_more_noise_is_less_agreement():
    alphas = [agreement(noisy_labels(noise), resamples=100).alpha for noise in (0.0, 0.3, 0.9)]
    assert alphas[0].value == 1
    assert alphas[0].low > alphas[1].high > alphas[1].low > alphas[2].high


def test_intervals_draw_whole_episodes():
    """The same labels in one episode a turn, or in few episodes of equal turns: the second says less."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(12, 2)) + rng.normal(size=(12, 1))
    widths = []
    for clusters in (120, 12):
        found = [
            Label(episode=f"e{i % clusters}", turn=i // clusters, label=float(values[i % 12, r]), rater=str(r))
            for i in range(120)
            for r in (0, 1)
        ]
        (pair,) = agreement(found, level="interval", resamples=300).pairs
        widths.append(pair.pearson.high - pair.pearson.low)
    assert widths[1] > 2 * widths[0]


def test_what_is_undetermined_is_said_to_be():
    same = [Label(episode=f"e{i}", turn=0, label=1, rater=r) for i in range(4) for r in "ab"]
    result = agreement(same, resamples=20)
    assert result.alpha.value is None
    assert "undetermined" in str(result)
    with pytest.raises(DataError, match="no utterance has labels of two raters"):
        agreement(same[::2])


def test_attributions_are_labels_of_their_annotator_and_method():
    attribution = Attribution(
        episode_id="e",
        seat=0,
        dimension="goal",
        method="direct-5",
        annotator="openai/gpt-4o",
        weights=(UtteranceWeight(turn=0, weight=5), UtteranceWeight(turn=2, weight=1)),
        top_weight=5,
        provenance=PROVENANCE,
    )
    found = list(labels_of([attribution]))
    assert [(label.turn, label.label, label.rater) for label in found] == [
        (0, 1.0, "openai/gpt-4o (direct-5)"),
        (2, 0.2, "openai/gpt-4o (direct-5)"),
    ]


# --- files -------------------------------------------------------------------------------------------------------

CSV = "episode,turn,label,rater\ne1,0,3,ann\ne1,2,0,ann\ne1,0,2,bob\n"


def test_csv_and_json_lines_say_the_same(tmp_path):
    (tmp_path / "l.csv").write_text("\ufeff" + CSV, encoding="utf-8")
    rows = [
        dict(zip(CSV.split("\n", maxsplit=1)[0].split(","), line.split(","), strict=True)) for line in CSV.split()[1:]
    ]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_labels(tmp_path / "l.csv") == read_labels(tmp_path / "l.jsonl")
    assert len(read_labels(tmp_path / "l.csv").labels) == 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("e1,7,3,bob", "turn 7 is no utterance of e1 (those are 0, 2)"),
        ("e9,0,3,bob", "unknown episode e9"),
        ("e1,two,3,bob", "field turn"),
        ("e1,-1,3,bob", "field turn"),
        ("e1,2,high,bob", "field label"),
        ("e1,2,nan,bob", "field label"),
        ("e1,2,,bob", "field label: Field required"),
        ("e1,2,3", "another number of fields"),
        ("e1,2,3,bob,x", "another number of fields"),
        ("e1,0,1,ann", "ann has labelled turn 0 of e1 before"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line_and_counted(line, said, tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text(CSV + line + "\n")

    def turns(episode):
        return {0, 2} if episode == "e1" else None

    with pytest.raises(DataError) as refusal:
        read_labels(path, turns=turns)
    assert f"{path}:5: " in str(refusal.value)
    assert said in str(refusal.value)
    read = read_labels(path, turns=turns, on_bad="skip")
    assert len(read.labels) == 3
    assert len(read.bad) == 1
    assert said in read.bad[0]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("l.csv", "episode,turn,score,rater\n", "the header lacks label"),
        ("l.csv", "episode,turn,label,rater\n", "no usable label"),
        ("l.jsonl", '{"episode": "e1", "tu', "not JSON"),
        ("l.jsonl", "[1]\n", "expected an object, found list"),
        ("l.jsonl", '{"episode": "e1", "turn": 0, "label": 1, "rater": "a", "colour": 2}', "field colour"),
        ("none.csv", None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_label_file_is_refused(name, content, said, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError) as refusal:
        read_labels(path)
    assert said in str(refusal.value)
    assert str(path) in str(refusal.value)
