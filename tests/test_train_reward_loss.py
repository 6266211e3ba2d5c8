from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import load_peft_weights

from sotopia_rl.train.folder import read_metrics
from sotopia_rl.train.reward_loss import ranking_loss
from sotopia_rl.train.reward_model import train_reward_model
from training_settings import RM

numbers = st.floats(-4, 4, width=32).map(lambda x: round(x, 2))
batches = st.integers(1, 3).flatmap(
    lambda outputs: st.lists(
        st.tuples(*[st.lists(numbers, min_size=outputs, max_size=outputs)] * 2), min_size=1, max_size=6
    )
)


def tensors(batch: list[tuple[list[float], list[float]]]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([p for p, _ in batch]), torch.tensor([t for _, t in batch])


def by_hand(predicted: torch.Tensor, targets: torch.Tensor) -> float:
    lacking = []
    for d in range(targets.shape[1]):
        for i in range(len(targets)):
            for j in range(len(targets)):
                margin = float(targets[i, d] - targets[j, d])
                if margin > 0:
                    lacking.append(max(0.0, margin - float(predicted[i, d] - predicted[j, d])))
    return sum(lacking) / len(lacking) if lacking else 0.0


@given(batches)
def test_the_loss_of_pairs_equals_a_sum_written_out_by_hand(batch: list[tuple[list[float], list[float]]]) -> None:
    predicted, targets = tensors(batch)
    assert float(ranking_loss(predicted, targets)) == pytest.approx(by_hand(predicted, targets), abs=1e-5)


@given(batches, numbers)
def test_perfect_predictions_cost_nothing_wherever_they_lie(
    batch: list[tuple[list[float], list[float]]], shift: float
) -> None:
    predicted, targets = tensors(batch)
    assert float(ranking_loss(targets + shift, targets)) == pytest.approx(0, abs=1e-5)
    assert float(ranking_loss(2 * targets, targets)) == pytest.approx(0, abs=1e-5)  # further apart is free
    moved = float(ranking_loss(predicted + shift, targets))
    assert moved == pytest.approx(float(ranking_loss(predicted, targets)), abs=1e-5)


@given(batches)
def test_pairs_in_the_wrong_order_cost_more_than_their_distance(batch: list[tuple[list[float], list[float]]]) -> None:
    _, targets = tensors(batch)
    spread = float(ranking_loss(torch.zeros_like(targets), targets))
    assert float(ranking_loss(-targets, targets)) == pytest.approx(2 * spread, abs=1e-4)


def test_its_gradient_pulls_a_pair_apart_in_the_right_direction() -> None:
    predicted = torch.tensor([[0.5], [0.5]], requires_grad=True)
    ranking_loss(predicted, torch.tensor([[1.0], [0.0]])).backward()
    assert predicted.grad is not None
    assert predicted.grad[0] < 0 < predicted.grad[1]


@pytest.mark.slow
def test_the_ranking_loss_is_trained_and_counts(rows: Path, base: Path, tmp_path: Path) -> None:
    one_step = {"max_steps": 1, "held_out_share": 0.0}
    plain = train_reward_model(rows, base, RM.model_copy(update=one_step), tmp_path / "mse")
    ranked = train_reward_model(
        rows, base, RM.model_copy(update={**one_step, "loss": "mse_ranking", "ranking_weight": 2.0}), tmp_path / "both"
    )
    losses = [read_metrics(adapter.parent / "metrics.jsonl")[0]["loss"] for adapter in (plain, ranked)]
    assert losses[1] > losses[0]  # the head starts at zero: every pair lacks its whole distance


@pytest.mark.slow
def test_accumulating_two_batches_is_one_batch_of_twice_the_size(rows: Path, base: Path, tmp_path: Path) -> None:
    settings = RM.model_copy(update={"max_steps": 3, "held_out_share": 0.0, "max_grad_norm": 1e9})
    once = train_reward_model(rows, base, settings, tmp_path / "once")
    halves = settings.model_copy(update={"batch_size": 4, "accumulation": 2})
    twice = train_reward_model(rows, base, halves, tmp_path / "twice")
    curves = [read_metrics(adapter.parent / "metrics.jsonl") for adapter in (once, twice)]
    for name in ("loss", "grad_norm"):
        expected = [line[name] for line in curves[0] if name in line]
        assert [line[name] for line in curves[1] if name in line] == pytest.approx(expected, rel=1e-4)
    assert set(load_peft_weights(str(once))) == set(load_peft_weights(str(twice)))
