"""The attribution methods: what each asks an annotator, and how its answer becomes weights.

A method is a row of `METHODS`. The reward of utterance t on a dimension is later G x A(t) with
A(t) = weight(t) / top weight in [0, 1] and G the episode's score (Sotopia-RL, arXiv 2508.03905, section 4.1),
so a method is nothing but a definition of A.

Two kinds of question exist. A *weight* question asks for a whole number from 0 to a top weight per utterance.
A *score* question asks for points on the dimension's own range per utterance (how things stand after it, or how
they would have ended without it); the weight is then the points that the utterance moved the score towards where
it ended, and the top weight is the score itself, so that G x A(t) is those points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from sotopia_rl.attribute.config import AttributionConfig, MethodName
from sotopia_rl.dimensions import Dimension
from sotopia_rl.llm.structured import UnusableReply

Weights = dict[int, float]
"""By turn index."""


@dataclass(frozen=True)
class Case:
    """One dimension of one agent in one episode.

    `score` is the episode's score in points, None where no judge scores the dimension.
    """

    dimension: Dimension
    score: float | None
    config: AttributionConfig


@dataclass(frozen=True)
class Method:
    """How one method asks and weighs.

    `asks` is the kind of question, None where no annotator is asked: the answers of `exact` are then
    `sandbox.exact_credit`, those of the others zeros that only say which turns there are. `top` and `weigh` take
    the case (and the answers). `check` raises `UnusableReply` where an answer breaks a rule of the method that no
    single number shows. With `answered` an utterance is rated with the partner's next turn in view.
    """

    name: MethodName
    asks: Literal["weight", "score"] | None
    weigh: Callable[[Weights, Case], Weights]
    top: Callable[[Case], float]
    asked_top: Callable[[AttributionConfig], int] = lambda config: config.scale
    check: Callable[[Mapping[int, int]], None] = lambda _answers: None
    answered: bool = False

    @property
    def template(self) -> str:
        return f"attribution_{self.name}.jinja"

    @property
    def needs_score(self) -> bool:
        """Whether the weights depend on the episode's score."""
        return self.asks == "score"

    def answer_range(self, dimension: Dimension, config: AttributionConfig) -> tuple[int, int]:
        """Least and greatest number that the annotator may give."""
        if self.asks == "score":
            return dimension.low, dimension.high
        return 0, self.asked_top(config)


def _as_answered(answers: Weights, _case: Case) -> Weights:
    return dict(answers)


def _shares(answers: Weights, _case: Case) -> Weights:
    """Weights that sum to one. `_some_weight` has refused answers that are all zero."""
    total = math.fsum(answers.values())
    return {turn: weight / total for turn, weight in answers.items()}


def _full_score(answers: Weights, _case: Case) -> Weights:
    return dict.fromkeys(answers, 1.0)


def _equal_shares(answers: Weights, _case: Case) -> Weights:
    return {turn: 1 / len(answers) for turn in answers}


def _discounted(answers: Weights, case: Case) -> Weights:
    """1 for the last utterance, times `discount` for each step back."""
    turns = sorted(answers, reverse=True)
    return {turn: case.config.discount**steps for steps, turn in enumerate(turns)}


def moved_points(differences: Weights, score: float) -> Weights:
    """Points by which each utterance moved the score towards where it ended, clipped to 0..|score|."""
    sign = -1.0 if score < 0 else 1.0
    return {turn: min(max(sign * points, 0.0), abs(score)) for turn, points in differences.items()}


def _progress(answers: Weights, case: Case) -> Weights:
    """Differences of successive standings, the first from the dimension's neutral point.

    A standing is judged once the partner has answered. Right after the utterance an offer would have earned nothing,
    and its acceptance would be credited to whatever the agent says next (the published code does that).
    """
    standing = float(min(max(0, case.dimension.low), case.dimension.high))
    differences: Weights = {}
    for turn in sorted(answers):
        differences[turn] = answers[turn] - standing
        standing = answers[turn]
    return moved_points(differences, _score(case))


def _without(answers: Weights, case: Case) -> Weights:
    """The score minus what it would have been without the utterance."""
    score = _score(case)
    return moved_points({turn: score - points for turn, points in answers.items()}, score)


def _score(case: Case) -> float:
    assert case.score is not None
    return case.score


def _scale(case: Case) -> float:
    return float(case.config.scale)


def _one(_case: Case) -> float:
    return 1.0


def _whole_score(case: Case) -> float:
    """A score of 0 leaves nothing to share: all weights are 0, and the top weight only has to be positive."""
    return abs(_score(case)) or 1.0


def _some_weight(answers: Mapping[int, int]) -> None:
    if not any(answers.values()):
        raise UnusableReply("every weight is 0, but they are shared out to sum to one: give at least one above 0")


def _one_key(answers: Mapping[int, int]) -> None:
    marked = [turn for turn, mark in answers.items() if mark]
    if len(marked) != 1:
        raise UnusableReply(f"exactly one turn must have 1 and all others 0; {len(marked)} turns have 1")


def _just_one(_config: AttributionConfig) -> int:
    return 1


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("direct", "weight", _as_answered, _scale),
        Method("direct_normalised", "weight", _shares, _one, check=_some_weight),
        Method("singular", "weight", _as_answered, _one, asked_top=_just_one, check=_one_key),
        Method("scaled", None, _discounted, _one),
        Method("uniform", None, _full_score, _one),
        Method("uniform_split", None, _equal_shares, _one),
        Method("goal_progress", "score", _progress, _whole_score, answered=True),
        Method("response_only", "weight", _as_answered, _scale),
        Method("utterance_quality", "weight", _as_answered, _scale),
        Method("counterfactual", "score", _without, _whole_score),
        Method("exact", None, _as_answered, _one),
    )
}
