"""Components agree with the ANOVA of the textbooks, are unbiased with gaps, and their intervals hold the truth."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sotopia_rl.variance import half_squared_difference, jackknife


def written_out(values, labels, same, different):
    """The definition, pair by pair."""
    found = [
        (values[i] - values[j]) ** 2 / 2
        for i, j in itertools.combinations(range(len(values)), 2)
        if all(labels[n][i] == labels[n][j] for n in same) and all(labels[n][i] != labels[n][j] for n in different)
    ]
    return float(np.mean(found)) if found else None


@given(
    st.lists(st.tuples(st.integers(-10, 10), st.integers(0, 3), st.integers(0, 2), st.integers(0, 1)), min_size=2),
    st.sampled_from(
        [((), ()), (("a",), ()), ((), ("a", "b")), (("a",), ("b",)), (("c",), ("a", "b")), (("b",), ("c",))]
    ),
)
def test_the_fast_sums_are_the_definition_written_out(rows, asked):
    values = np.array([float(v) for v, *_ in rows])
    labels = {name: np.array([row[i] for row in rows], dtype=np.intp) for i, name in ((1, "a"), (2, "b"), (3, "c"))}
    same, different = asked
    expected = written_out(values, labels, same, different)
    found = half_squared_difference(values, labels, same=same, different=different)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-9))


def crossed(rng, *, rows, columns, repeats, sd):
    """[rows x columns x repeats] values with random effects, and their labels."""
    effect = (
        rng.normal(0, sd["row"], (rows, 1, 1))
        + rng.normal(0, sd["column"], (1, columns, 1))
        + rng.normal(0, sd["both"], (rows, columns, 1))
        + rng.normal(0, sd["rest"], (rows, columns, repeats))
    )
    index = np.indices(effect.shape).reshape(3, -1)
    return effect, {"row": index[0], "column": index[1], "cell": index[0] * columns + index[1]}


def components(values, labels):
    def g(same, different):
        return half_squared_difference(values, labels, same=same, different=different)

    far, rest = g((), ("row", "column")), g(("cell",), ())
    row, column = far - g(("row",), ("column",)), far - g(("column",), ("row",))
    return row, column, far - row - column - rest, rest


SD = {"row": 1.0, "column": 0.7, "both": 0.5, "rest": 1.5}


def test_balanced_components_are_those_of_the_two_way_anova():
    values, labels = crossed(np.random.default_rng(0), rows=6, columns=4, repeats=3, sd=SD)
    rows, columns, repeats = values.shape
    cell, row, column, grand = values.mean(2), values.mean((1, 2)), values.mean((0, 2)), values.mean()
    ms_row = columns * repeats * ((row - grand) ** 2).sum() / (rows - 1)
    ms_column = rows * repeats * ((column - grand) ** 2).sum() / (columns - 1)
    inner = cell - row[:, None] - column[None, :] + grand
    ms_both = repeats * (inner**2).sum() / ((rows - 1) * (columns - 1))
    ms_rest = ((values - cell[:, :, None]) ** 2).sum() / (rows * columns * (repeats - 1))
    expected = (
        (ms_row - ms_both) / (columns * repeats),
        (ms_column - ms_both) / (rows * repeats),
        (ms_both - ms_rest) / repeats,
        ms_rest,
    )
    assert components(values.ravel(), labels) == pytest.approx(expected)


def test_components_stay_unbiased_where_observations_are_missing():
    rng = np.random.default_rng(1)
    found = []
    for _ in range(600):
        values, labels = crossed(rng, rows=8, columns=4, repeats=2, sd=SD)
        kept = rng.random(values.size) < 0.8
        found.append(components(values.ravel()[kept], {name: column[kept] for name, column in labels.items()}))
    means, errors = np.mean(found, axis=0), np.std(found, axis=0) / np.sqrt(len(found))
    truth = np.array([sd**2 for sd in SD.values()])
    assert (np.abs(means - truth) < 4 * errors).all()


def test_the_jackknife_of_a_mean_is_the_t_interval_of_cluster_means():
    from scipy import stats

    rng = np.random.default_rng(2)
    values = rng.normal(size=14)
    found = jackknife(lambda kept: {"mean": float(values[kept].mean())}, [str(i) for i in range(14)])
    assert found["mean"] == pytest.approx(stats.ttest_1samp(values, 0).confidence_interval(0.95))


def test_jackknife_intervals_of_the_residual_hold_the_truth():
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        values, labels = crossed(rng, rows=14, columns=2, repeats=3, sd=SD)
        flat, clusters = values.ravel(), labels["row"].astype(str).tolist()
        low, high = jackknife(
            lambda kept, flat=flat, cells=labels["cell"]: {
                "rest": half_squared_difference(flat[kept], {"cell": cells[kept]}, same=("cell",))
            },
            clusters,
        )["rest"]
        covered += low <= SD["rest"] ** 2 <= high
    assert covered / 200 > 0.9


def test_there_is_no_interval_from_two_clusters_nor_of_what_does_not_exist():
    assert jackknife(lambda kept: {"x": 1.0}, ["a", "b"]) == {"x": None}
    assert jackknife(lambda kept: {"x": None}, ["a", "b", "c"]) == {"x": None}
    assert jackknife(lambda kept: {"x": 1.0 if kept.all() else None}, ["a", "b", "c"]) == {"x": None}


def test_pairs_that_do_not_exist_give_no_number():
    labels = {"a": np.zeros(3, dtype=np.intp)}
    assert half_squared_difference(np.arange(3.0), labels, different=("a",)) is None
