"""How several outputs of a reward model become one advantage, against sums written out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl import GRPOConfig, GRPOTrainer

from sotopia_rl.errors import ConfigError, TrainingError
from sotopia_rl.train.adapters import RewardScorer, load_policy
from sotopia_rl.train.config import GRPOSettings
from sotopia_rl.train.data import encode_rows
from sotopia_rl.train.folder import read_metrics
from sotopia_rl.train.grpo import is_action, train_grpo
from sotopia_rl.train.loading import load_tokenizer
from sotopia_rl.train.reward_model import train_reward_model
from sotopia_rl.train.trl_grpo import AGGREGATIONS, prompt_rows
from sotopia_rl.train.utterance_reward import PROMPT_IDS, OutputReward, UtteranceReward, output_weights
from training_rows import reward_rows
from training_settings import GRPO, RM

REWARDS = np.array([[0.9, 0.1], [0.4, 0.3], [0.4, 0.9], [0.0, 0.2], [0.5, 0.5], [0.6, 0.5], [0.2, 0.4], [0.1, 0.5]])
"""[B, D] of two groups of four."""
WEIGHTS = [0.75, 0.25]


@pytest.fixture(scope="module")
def two_outputs(rows: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = RM.model_copy(update={"dimensions": ("goal", "relationship"), "max_steps": 2})
    return train_reward_model(rows, base, settings, tmp_path_factory.mktemp("rm2"))


class Fixed:
    """Stands where the reward model does, and gives the rewards above."""

    outputs = ("goal", "relationship")

    def score(self, sequences: list[list[int]]) -> torch.Tensor:
        return torch.tensor(REWARDS[: len(sequences)], dtype=torch.float32)


def advantages_in_trl(combine: str, base: Path, sft_adapter: Path, folder: Path) -> list[float]:
    tokenizer = load_tokenizer(base)
    settings = GRPO.model_copy(update={"combine": combine})
    reward = UtteranceReward(Fixed(), is_action, settings, tokenizer.eos_token_id)  # type: ignore[arg-type]
    trainer = GRPOTrainer(
        model=load_policy(base, sft_adapter, tokenizer, GRPO),
        reward_funcs=reward.functions(),
        args=GRPOConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            max_steps=1,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=4,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            reward_weights=WEIGHTS,
            multi_objective_aggregation=AGGREGATIONS[combine],
        ),
        train_dataset=prompt_rows(encode_rows(tokenizer, reward_rows(2), max_length=512)),
        processing_class=tokenizer,
    )
    trainer.train()
    return list(trainer._logs["advantages"])


def within_groups(rewards: np.ndarray) -> np.ndarray:
    groups = rewards.reshape(2, 4, -1)
    spread = groups.std(axis=1, ddof=1, keepdims=True)
    return ((groups - groups.mean(axis=1, keepdims=True)) / (spread + 1e-4)).reshape(8, -1)


def test_combining_rewards_weighs_them_and_then_compares_within_the_group(
    base: Path, sft_adapter: Path, tmp_path: Path
) -> None:
    expected = within_groups((REWARDS @ WEIGHTS)[:, None])[:, 0]
    assert advantages_in_trl("rewards", base, sft_adapter, tmp_path) == pytest.approx(expected, abs=1e-4)


def test_combining_advantages_compares_each_dimension_first(base: Path, sft_adapter: Path, tmp_path: Path) -> None:
    added = within_groups(REWARDS) @ WEIGHTS
    expected = (added - added.mean()) / (added.std(ddof=1) + 1e-4)  # TRL puts the sum on one scale over the batch
    assert advantages_in_trl("advantages", base, sft_adapter, tmp_path) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("combine", ["rewards", "advantages"])
def test_every_dimension_has_its_curve(
    rows: Path, base: Path, sft_adapter: Path, two_outputs: Path, tmp_path: Path, combine: str
) -> None:
    settings = GRPO.model_copy(update={"combine": combine, "max_steps": 1, "dimension_weights": {"goal": 3.0}})
    train_grpo(rows, base, sft_adapter, two_outputs, settings, tmp_path)
    (line,) = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "reward" in line]
    assert line["reward"] == pytest.approx(0.75 * line["reward_goal"] + 0.25 * line["reward_relationship"], abs=1e-5)
    assert {"kl", "entropy", "length", "validity", "reward_goal_std"} <= set(line)


def test_an_unknown_dimension_is_named_before_training(
    rows: Path, base: Path, sft_adapter: Path, two_outputs: Path, tmp_path: Path
) -> None:
    settings = GRPO.model_copy(update={"dimension_weights": {"secret": 1.0}})
    with pytest.raises(ConfigError, match="the reward model has no secret, only goal, relationship"):
        train_grpo(rows, base, sft_adapter, two_outputs, settings, tmp_path)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=5))
def test_weights_add_up_to_one_in_the_order_of_the_outputs(given_weights: list[float]) -> None:
    names = [f"d{i}" for i in range(len(given_weights))]
    given_by_name = dict(zip(names, given_weights, strict=True))
    if sum(given_weights) == 0:
        with pytest.raises(ConfigError, match="all are 0"):
            output_weights(names, given_by_name)
        return
    weights = output_weights(names, given_by_name)
    assert sum(weights) == pytest.approx(1)
    assert weights == pytest.approx([w / sum(given_weights) for w in given_weights])


def test_outputs_that_are_not_weighed_weigh_the_same() -> None:
    assert output_weights(["goal", "relationship"], {}) == [0.5, 0.5]


def test_rewards_that_are_no_numbers_stop_the_run(base: Path, sft_adapter: Path, reward_adapter: Path) -> None:
    tokenizer = load_tokenizer(base)
    model = load_policy(base, sft_adapter, tokenizer, GRPO)
    scorer = RewardScorer(model, reward_adapter, batch_size=4)
    scorer.head_DH = scorer.head_DH * float("nan")
    reward = OutputReward(UtteranceReward(scorer, is_action, GRPOSettings(), tokenizer.eos_token_id), 0, "value")
    with pytest.raises(TrainingError, match="no numbers"):
        reward(
            completions=[[{"role": "assistant", "content": "x"}]],
            completion_ids=[[5]],
            row_number=[0],
            log_metric=lambda name, value: None,
            **{PROMPT_IDS: [[1, 2]]},
        )


def test_the_outputs_are_named_after_the_report(two_outputs: Path, base: Path, sft_adapter: Path) -> None:
    tokenizer = load_tokenizer(base)
    model = load_policy(base, sft_adapter, tokenizer, GRPO)
    scorer = RewardScorer(model, two_outputs, batch_size=4)
    assert scorer.outputs == ("goal", "relationship")
    assert scorer.score([([5, 6], [7]), ([5], [6])]).shape == (2, 2)
    assert json.loads((two_outputs / "report.json").read_text())["outputs"][1]["name"] == "relationship"
