import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import load_peft_weights
from safetensors.torch import load_file
from trl import GRPOTrainer

from sotopia_rl import monitor
from sotopia_rl.dataset import PromptRow, read_rows
from sotopia_rl.errors import ConfigError, GateError, TrainingError
from sotopia_rl.report.curves import CURVES, curve_view
from sotopia_rl.train.adapters import RewardScorer, load_policy
from sotopia_rl.train.batches import padded
from sotopia_rl.train.config import GRPOSettings
from sotopia_rl.train.data import encode_rows
from sotopia_rl.train.folder import claim, read_metrics
from sotopia_rl.train.grpo import Policy, is_action, train_grpo
from sotopia_rl.train.loading import load_tokenizer
from sotopia_rl.train.publish import finished_before
from sotopia_rl.train.rollout import sample_here
from sotopia_rl.train.trl_grpo import make_trainer
from sotopia_rl.train.utterance_reward import PROMPT_IDS, UtteranceReward
from training_settings import GRPO, RM, SFT

VALID = '{"action_type": "speak", "argument": "What about $50?"}'


@pytest.fixture(scope="module")
def grpo_adapter(
    rows: Path, base: Path, sft_adapter: Path, reward_adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return train_grpo(rows, base, sft_adapter, reward_adapter, GRPO, tmp_path_factory.mktemp("grpo"))


def test_the_model_samples_what_its_own_generate_would(base: Path, sft_adapter: Path) -> None:
    tokenizer = load_tokenizer(base)
    model = load_policy(base, sft_adapter, tokenizer, GRPO)
    model.train()
    prompts = [[5, 6, 7, 8], [9, 8], [5, 6, 7, 8], [40, 41, 42]]
    almost_greedy = {"stop_tokens": {tokenizer.eos_token_id}, "max_tokens": 12, "temperature": 1e-6}
    found = sample_here(model, prompts, **almost_greedy)
    assert model.training
    model.eval()
    for prompt, ids in zip(prompts, found, strict=True):
        whole = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=12,
            do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        assert ids == whole[0, len(prompt) :].tolist()


def test_equal_prompts_get_samples_of_their_own_and_torchs_seed_decides(base: Path, sft_adapter: Path) -> None:
    model = load_policy(base, sft_adapter, load_tokenizer(base), GRPO)

    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return sample_here(model, [[5, 6, 7, 8]] * 6, stop_tokens={3, 4, 5}, max_tokens=12, temperature=1.5)

    found = sample(0)
    assert found == sample(0) != sample(1)
    assert len({tuple(ids) for ids in found}) > 1
    for ids in found:  # whole with the stop token that ended it, or as long as may be
        assert not {3, 4, 5} & set(ids[:-1])
        assert ids[-1] in {3, 4, 5} or len(ids) == 12


@pytest.mark.parametrize("rows_of", [[0, 0, 1, 0, 2, 2], [0, 1, 2]])
def test_prompts_read_once_give_trls_log_probabilities_and_gradients(
    base: Path, sft_adapter: Path, reward_adapter: Path, rows: Path, tmp_path: Path, rows_of: list[int]
) -> None:
    tokenizer = load_tokenizer(base)
    model = load_policy(base, sft_adapter, tokenizer, GRPO)
    reward = UtteranceReward(RewardScorer(model, reward_adapter, batch_size=4), is_action, GRPO, tokenizer.eos_token_id)
    encoded = encode_rows(tokenizer, list(read_rows(PromptRow, rows))[:4], max_length=512)
    trainer = make_trainer(
        model, tokenizer, reward, GRPO, claim(tmp_path, "grpo", GRPO, {}, resume=False), prompts=encoded
    )
    prompts = [[5, 6, 7, 8, 9], [11, 12], [21, 22, 23]]
    completions = [[31, 32, 33], [34], [35, 36], [31, 32, 33], [37, 38, 39], [40]][: len(rows_of)]
    inputs = tokenizer.pad({"input_ids": [prompts[row] for row in rows_of]}, padding_side="left", return_tensors="pt")
    ids = torch.cat([inputs["input_ids"], padded(completions, tokenizer.pad_token_id)], dim=1)
    mask = torch.cat([inputs["attention_mask"], padded([[1] * len(c) for c in completions], 0)], dim=1)

    def weighed(method: Any) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        logps, entropy, _ = method(trainer, model, ids, mask, 3, batch_size=4, compute_entropy=True)
        inside = mask[:, -3:].bool()
        (logps[inside].sum() + entropy[inside].sum()).backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return logps[inside].detach(), entropy[inside].detach(), grads

    ours = weighed(type(trainer)._get_per_token_logps_and_entropies)
    theirs = weighed(GRPOTrainer._get_per_token_logps_and_entropies)
    assert torch.allclose(ours[0], theirs[0], atol=1e-5)
    assert torch.allclose(ours[1], theirs[1], atol=1e-5)
    assert len(ours[2]) == len(theirs[2]) > 0
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours[2], theirs[2], strict=True))
    assert max(grad.abs().max() for grad in ours[2]) > 1e-3


def comparable(path: Path) -> list[dict[str, object]]:
    """Metrics without what depends on the clock."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(path)]


def test_only_the_policy_moves(rows: Path, base: Path, sft_adapter: Path, reward_adapter: Path, tmp_path: Path) -> None:
    found: dict[str, torch.Tensor] = {}

    def look(step: int, policy: Policy) -> dict[str, float]:
        found.update({name: p.detach().clone() for name, p in policy.model.named_parameters()})
        return {"score": 0.0}

    settings = GRPO.model_copy(update={"max_steps": 1, "eval_every": 1})
    train_grpo(rows, base, sft_adapter, reward_adapter, settings, tmp_path, eval_hook=look)
    prefix = "base_model.model."
    sft, reward = load_peft_weights(str(sft_adapter)), load_peft_weights(str(reward_adapter))
    checkpoint = load_file(base / "model.safetensors")
    for name, parameter in found.items():
        if ".default." in name:
            assert not torch.equal(parameter, sft[name.replace(".default", "")]), name
        elif ".ref." in name:
            assert torch.equal(parameter, sft[name.replace(".ref", "")]), name
        elif ".reward." in name:
            assert torch.equal(parameter, reward[name.replace(".reward", "")]), name
        else:
            assert torch.equal(parameter, checkpoint[name.removeprefix(prefix).replace(".base_layer", "")]), name
    kinds = {kind for kind in ("default", "ref", "reward") if any(f".{kind}." in name for name in found)}
    assert kinds == {"default", "ref", "reward"}


def test_the_policy_starts_at_its_reference(grpo_adapter: Path) -> None:
    first = read_metrics(grpo_adapter.parent / "metrics.jsonl")[0]
    assert first["kl"] == 0.0


def test_the_curves_that_tell_of_collapse_and_hacking_are_all_there(grpo_adapter: Path) -> None:
    lines = read_metrics(grpo_adapter.parent / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    wanted = {"reward", "reward_std", "reward_model_score", "validity", "kl", "entropy", "length", "cut_off"}
    assert all(wanted <= set(line) for line in lines)


def test_every_metric_that_the_report_draws_is_written_by_a_training_stage(
    rows: Path, base: Path, sft_adapter: Path, reward_adapter: Path, tmp_path: Path
) -> None:
    judged = {"score": 5.0, **dict.fromkeys(monitor.CURVES, 1.0)}
    train_grpo(
        rows,
        base,
        sft_adapter,
        reward_adapter,
        GRPO.model_copy(update={"max_steps": 1, "eval_every": 1}),
        tmp_path,
        eval_hook=lambda step, policy: judged,
        leaks_secret=lambda row, text: False,
    )
    runs = (sft_adapter.parent, reward_adapter.parent, tmp_path)
    written = {name for run in runs for line in read_metrics(run / "metrics.jsonl") for name in line}
    assert {name for _, labels in CURVES for name in labels} <= written
    drawn = {chart.title for run in runs for chart in curve_view(read_metrics(run / "metrics.jsonl")).charts}
    assert drawn == {title for title, _ in CURVES}


def test_the_result_is_the_policy_alone(base: Path, grpo_adapter: Path) -> None:
    assert not any(folder.is_dir() for folder in grpo_adapter.iterdir())
    model = load_policy(base, grpo_adapter, load_tokenizer(base), GRPO)
    assert list(model.peft_config) == ["default"]


@pytest.mark.slow
def test_a_run_stopped_in_the_middle_ends_like_an_unbroken_one(
    rows: Path, base: Path, sft_adapter: Path, reward_adapter: Path, grpo_adapter: Path, tmp_path: Path
) -> None:
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_grpo(rows, base, sft_adapter, reward_adapter, GRPO, tmp_path, progress=stop)
    resumed = train_grpo(rows, base, sft_adapter, reward_adapter, GRPO, tmp_path)
    weights, unbroken = load_peft_weights(str(resumed)), load_peft_weights(str(grpo_adapter))
    assert all(torch.equal(weights[name], unbroken[name]) for name in unbroken)
    assert not any(torch.equal(tensor, load_peft_weights(str(sft_adapter))[name]) for name, tensor in weights.items())
    assert comparable(tmp_path / "metrics.jsonl") == comparable(grpo_adapter.parent / "metrics.jsonl")


@pytest.mark.parametrize("stage", ["sft", "rm", "grpo"])
def test_a_finished_command_says_so_without_loading_torch(
    rows: Path,
    base: Path,
    sft_adapter: Path,
    reward_adapter: Path,
    grpo_adapter: Path,
    tmp_path: Path,
    stage: str,
) -> None:
    result, settings, inputs = {
        "sft": (sft_adapter, SFT, ["--rows", rows]),
        "rm": (reward_adapter, RM, ["--rows", rows]),
        "grpo": (grpo_adapter, GRPO, ["--prompts", rows, "--policy", sft_adapter, "--reward-model", reward_adapter]),
    }[stage]
    config = tmp_path / "settings.yaml"
    config.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    program = (
        "import sys; from sotopia_rl.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(*(name for name in ('torch', 'transformers', 'scipy') if name in sys.modules), file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, stage, *inputs, "--base", base, "--output", result.parent]
    found = subprocess.run([*map(str, command), "--config", str(config)], capture_output=True, text=True, check=True)
    assert str(result) in found.stdout
    assert found.stderr == f"{result.parent}: finished already, nothing to train\n\n"


def test_a_finished_folder_is_no_answer_to_other_rows(rows: Path, base: Path, sft_adapter: Path) -> None:
    with pytest.raises(ConfigError, match="rows is not what it was"):
        finished_before("sft", SFT, sft_adapter.parent, rows=base / "config.json", base=base)
    with pytest.raises(ConfigError, match=r"settings\.lora_r was 8, now 4"):
        finished_before("sft", SFT.model_copy(update={"lora_r": 4}), sft_adapter.parent, rows=rows, base=base)


def test_a_judge_beside_the_training_does_not_change_it(
    rows: Path, base: Path, sft_adapter: Path, reward_adapter: Path, grpo_adapter: Path, tmp_path: Path
) -> None:
    def judge(step: int, policy: Policy) -> dict[str, float]:
        torch.rand(3)
        assert not policy.model.training
        return {"score": -step, "goal": 5.0}

    settings = GRPO.model_copy(update={"keep": "best"})
    adapter = train_grpo(rows, base, sft_adapter, reward_adapter, settings, tmp_path, eval_hook=judge)
    judged = read_metrics(tmp_path / "metrics.jsonl")
    assert [line for line in judged if "eval_score" in line] == [
        {"step": 2, "eval_score": -2, "eval_goal": 5.0},
        {"step": 4, "eval_score": -4, "eval_goal": 5.0},
    ]
    unjudged = comparable(grpo_adapter.parent / "metrics.jsonl")
    assert [line for line in comparable(tmp_path / "metrics.jsonl") if "reward" in line] == unjudged
    assert json.loads((adapter / "best.json").read_text()) == {"step": 2, "metric": "eval_score", "value": -2}


def test_the_reference_can_be_the_base(
    rows: Path, base: Path, sft_adapter: Path, reward_adapter: Path, tmp_path: Path
) -> None:
    settings = GRPO.model_copy(update={"ref": "base", "max_steps": 1})
    train_grpo(rows, base, sft_adapter, reward_adapter, settings, tmp_path)
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["kl"] > 0


def test_a_collapse_stops_the_run_with_the_best_weights(
    rows: Path, base: Path, sft_adapter: Path, reward_adapter: Path, tmp_path: Path
) -> None:
    update = {"on_collapse": "stop", "min_entropy": 100.0, "max_steps": 9, "eval_every": 2}
    settings = GRPO.model_copy(update=update)
    train_grpo(rows, base, sft_adapter, reward_adapter, settings, tmp_path)
    finished = json.loads((tmp_path / "finished.json").read_text())
    assert finished["collapsed"] is True
    assert finished["steps"] == 5
    assert finished["best_step"] in (2, 4)


def test_a_collapse_before_anything_is_worth_keeping_is_an_error(
    rows: Path, base: Path, sft_adapter: Path, reward_adapter: Path, tmp_path: Path
) -> None:
    update = {"on_collapse": "stop", "min_validity": 1.0, "max_steps": 9, "eval_every": 50}
    settings = GRPO.model_copy(update=update)
    with pytest.raises(TrainingError, match=r"step 5: .*validity below 1.0.*raise max_completion_length \(8\)"):
        train_grpo(rows, base, sft_adapter, reward_adapter, settings, tmp_path)


def test_a_collapse_can_be_a_warning(
    rows: Path, base: Path, sft_adapter: Path, reward_adapter: Path, tmp_path: Path
) -> None:
    update = {"on_collapse": "warn", "min_entropy": 100.0, "max_steps": 5}
    train_grpo(rows, base, sft_adapter, reward_adapter, GRPO.model_copy(update=update), tmp_path)
    warnings = [line["warning"] for line in read_metrics(tmp_path / "metrics.jsonl") if "warning" in line]
    assert len(warnings) == 1
    assert "entropy below 100.0 for 5 steps" in warnings[0]


def test_a_reward_model_below_the_gate_is_refused(
    rows: Path, base: Path, sft_adapter: Path, reward_adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(GateError, match="Spearman"):
        train_grpo(
            rows, base, sft_adapter, reward_adapter, GRPO.model_copy(update={"gate_min_spearman": 1.0}), tmp_path
        )


# --- the reward function -------------------------------------------------------------------------------------------


def reward_of(settings: GRPOSettings, base: Path, sft_adapter: Path, reward_adapter: Path) -> UtteranceReward:
    tokenizer = load_tokenizer(base)
    scorer = RewardScorer(load_policy(base, sft_adapter, tokenizer, settings), reward_adapter, batch_size=4)
    scorer.head_DH = scorer.head_DH * 1000  # scores far from zero, of either sign
    return UtteranceReward(
        scorer=scorer,
        is_valid=is_action,
        settings=settings,
        eos_token_id=tokenizer.eos_token_id,
        leaks_secret=lambda row, text: "$" in text,
    )


def rewards(
    reward: UtteranceReward, base: Path, texts: list[str], *, cut_off: set[int] = frozenset()
) -> tuple[list[float], dict[str, float]]:  # type: ignore[assignment]
    tokenizer = load_tokenizer(base)
    metrics: dict[str, float] = {}
    ids = [
        [*tokenizer(t)["input_ids"], *([] if i in cut_off else [tokenizer.eos_token_id])] for i, t in enumerate(texts)
    ]
    values_B1 = reward.score(
        prompts=[],
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        completion_ids=ids,
        row_number=list(range(len(texts))),
        log_metric=metrics.__setitem__,
        **{PROMPT_IDS: [[1, 2, 3]] * len(texts)},
    )
    return [value for (value,) in values_B1], metrics


INVALID = ["", "Hello!", '{"action_type": "shout", "argument": "x"}', '{"action_type": "speak"}', "[]", "{{{"]


def test_no_invalid_reply_is_worth_as_much_as_a_valid_one(base: Path, sft_adapter: Path, reward_adapter: Path) -> None:
    reward = reward_of(GRPO.model_copy(update={"validity_gate": True}), base, sft_adapter, reward_adapter)
    valid = [VALID, '{"action_type": "leave", "argument": ""}', '{"action_type": "none", "argument": ""}']
    values, metrics = rewards(reward, base, [*valid, *INVALID, VALID], cut_off={len(valid) + len(INVALID)})
    assert min(values[: len(valid)]) >= 0
    assert set(values[len(valid) :]) == {GRPO.invalid_reward}
    assert metrics["validity"] == len(valid) / len(values)
    assert metrics["secret_leaks"] == 2 / len(values)


def test_without_the_gate_every_reply_gets_the_score_of_the_reward_model(
    base: Path, sft_adapter: Path, reward_adapter: Path
) -> None:
    reward = reward_of(GRPO, base, sft_adapter, reward_adapter)
    values, metrics = rewards(reward, base, [VALID, *INVALID])
    assert GRPO.invalid_reward not in values
    assert metrics["reward_model_score"] == pytest.approx(sum(values) / len(values))


def test_a_prompt_of_another_kind_of_row_is_read_as_a_prompt() -> None:
    assert set(PromptRow.model_fields) == {"prompt", "episode_id", "scenario_id", "turn", "seat"}
