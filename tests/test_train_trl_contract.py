"""Pins the inside of TRL and transformers that `train/` leans on; a failure means they changed, not that we did."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from transformers import Trainer, masking_utils
from trl import GRPOConfig, GRPOTrainer, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sotopia_rl.train.adapters import load_policy
from sotopia_rl.train.data import encode_rows
from sotopia_rl.train.loading import load_tokenizer
from sotopia_rl.train.trl_grpo import AGGREGATIONS, GAP, prompt_rows
from sotopia_rl.train.utterance_reward import PROMPT_IDS
from training_rows import reward_rows
from training_settings import GRPO

TRL_CHANGED = f"TRL {trl.__version__} differs from 1.16 in what train/ relies on: "


@pytest.fixture(scope="module")
def seen(base: Path, sft_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a reward function is given, after one step of TRL's own trainer."""
    tokenizer = load_tokenizer(base)
    found: dict[str, Any] = {}

    def reward(**given: Any) -> list[float]:
        found.update(given)
        given["log_metric"]("our_metric", 0.25)
        return [float(i) for i in range(len(given["completions"]))]

    trainer = GRPOTrainer(
        model=load_policy(base, sft_adapter, tokenizer, GRPO),
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            max_steps=1,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=4,
            beta=0.1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_steps=1,
            disable_dropout=True,
        ),
        train_dataset=prompt_rows(encode_rows(tokenizer, reward_rows(2), max_length=512)),
        processing_class=tokenizer,
    )
    trainer.train()
    found |= {"trainer": trainer, "log": trainer.state.log_history[0], "tokenizer": tokenizer}
    return found


def test_rows_reach_the_reward_function(seen: dict[str, Any]) -> None:
    assert {PROMPT_IDS, "row_number", "completion_ids", "log_metric"} <= set(seen), TRL_CHANGED + "reward arguments"
    assert len(seen[PROMPT_IDS]) == len(seen["completion_ids"]) == 4, TRL_CHANGED + "one value per completion"


def test_trl_generates_from_our_prompt_ids(seen: dict[str, Any]) -> None:
    tokenizer = seen["tokenizer"]
    rendered = [
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
        for prompt in seen["prompts"]
    ]
    assert rendered == seen[PROMPT_IDS], TRL_CHANGED + "how prompts are tokenised"


def test_completions_end_with_the_end_token_or_at_the_limit(seen: dict[str, Any]) -> None:
    for ids in seen["completion_ids"]:
        ended = ids[-1] == seen["tokenizer"].eos_token_id
        assert ended or len(ids) == 4, TRL_CHANGED + "completion_ids"
        assert seen["tokenizer"].pad_token_id not in ids, TRL_CHANGED + "completion_ids"


def test_our_metrics_reach_the_log(seen: dict[str, Any]) -> None:
    assert seen["log"]["our_metric"] == 0.25, TRL_CHANGED + "log_metric"
    wanted = {"kl", "entropy", "reward", "reward_std", "completions/mean_length", "completions/clipped_ratio"}
    assert wanted <= set(seen["log"]), TRL_CHANGED + "names of metrics"


def test_the_reference_is_a_frozen_copy_named_ref(seen: dict[str, Any]) -> None:
    model = seen["trainer"].model
    assert set(model.peft_config) == {"default", "ref"}, TRL_CHANGED + "the adapter `ref`"
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".ref." in n), (
        TRL_CHANGED + "`ref` is frozen"
    )


def test_without_an_adapter_named_ref_the_reference_is_the_base() -> None:
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert '"ref" if "ref" in model.peft_config else None' in source, TRL_CHANGED + "the reference without `ref`"


def test_reward_functions_are_called_one_after_the_other_in_their_order() -> None:
    source = inspect.getsource(GRPOTrainer._calculate_rewards)
    assert "zip(self.reward_funcs, self.reward_processing_classes, self.reward_func_names" in source, (
        TRL_CHANGED + "the order of reward functions in _calculate_rewards"
    )
    assert "output_reward_func = reward_func(" in source, TRL_CHANGED + "reward functions are called directly"


def test_rewards_are_combined_before_or_after_they_are_normalised() -> None:
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    for piece in (
        *(f'self.multi_objective_aggregation == "{name}"' for name in AGGREGATIONS.values()),
        "reward_k = (grouped - mean_k) / (std_k + 1e-4)",
        "(reward_k * self.reward_weights.to(device).unsqueeze(0)).nansum(dim=1)",
    ):
        assert piece in source, TRL_CHANGED + f"{piece!r} in _generate_and_score_completions"


def test_packed_rows_are_collated_without_a_mask_and_with_their_own_positions() -> None:
    rows = pack_dataset(Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5]], "labels": [[-100, 2, 3], [-100, 5]]}), 8)
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([rows[i] for i in range(len(rows))])
    assert "attention_mask" not in batch, TRL_CHANGED + "padding-free batches have no mask"
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]], TRL_CHANGED + "positions from seq_lengths"
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5]], TRL_CHANGED + "labels of packed rows"
    kept = inspect.getsource(SFTTrainer._set_signature_columns_if_needed)
    assert '["input_ids", "labels", "seq_lengths"]' in kept, TRL_CHANGED + "columns that SFTTrainer keeps"


def test_rows_that_are_ready_are_not_prepared_again() -> None:
    source = inspect.getsource(SFTTrainer.__init__)
    assert 'args.dataset_kwargs.get("skip_prepare_dataset", False)' in source, TRL_CHANGED + "skip_prepare_dataset"


def test_tokens_are_counted_by_the_mask_that_the_model_is_given() -> None:
    source = inspect.getsource(SFTTrainer.compute_loss)
    for piece in (
        'self.accelerator.gather_for_metrics(inputs["attention_mask"].sum()).sum().item()',
        "self._total_train_tokens += num_tokens_in_batch",
        'self._metrics[mode]["num_tokens"] = [self._total_train_tokens]',
        "outputs = model(**inputs, fused_lm_head=True)",
    ):
        assert piece in source, TRL_CHANGED + f"{piece!r} in SFTTrainer.compute_loss"


def test_a_mask_of_four_axes_is_taken_as_it_is() -> None:
    source = inspect.getsource(masking_utils._preprocess_mask_arguments)
    assert "len(attention_mask.shape) == 4:\n        return True, attention_mask" in source, (
        "transformers changed how a mask of four axes is taken (_preprocess_mask_arguments)"
    )


def test_a_loss_of_our_own_is_divided_by_the_accumulation_steps() -> None:
    assert Trainer.loss_is_scaled_for_ga is None, "transformers changed Trainer.loss_is_scaled_for_ga"
    source = inspect.getsource(Trainer.training_step)
    assert "loss = loss / self.current_gradient_accumulation_steps" in source, (
        "transformers changed how Trainer.training_step divides a loss"
    )


def test_rows_keep_what_is_asked_of_them() -> None:
    assert isinstance(prompt_rows([]), Dataset)


def test_without_vllm_completions_come_from_one_call(seen: dict[str, Any]) -> None:
    trainer = seen["trainer"]
    sampled, logprobs = trainer._generate_single_turn([[5, 6, 7], [8, 9]], None, {}, 1)
    assert (len(sampled), logprobs) == (2, None), TRL_CHANGED + "what _generate_single_turn returns"
    assert all(isinstance(token, int) for ids in sampled for token in ids), TRL_CHANGED + "completion ids are lists"
    assert trainer.eos_token_ids == [seen["tokenizer"].eos_token_id], TRL_CHANGED + "eos_token_ids"
    assert (trainer.max_completion_length, trainer.temperature) == (4, 1.0), TRL_CHANGED + "names of sampling settings"
    source = inspect.getsource(GRPOTrainer._generate)
    assert "= self._generate_single_turn(" in source, TRL_CHANGED + "_generate calls _generate_single_turn"


def test_one_method_weighs_what_was_sampled_for_policy_and_reference() -> None:
    signature = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
    wanted = ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy"]
    assert list(signature)[: len(wanted)] == wanted, TRL_CHANGED + "_get_per_token_logps_and_entropies"
    source = inspect.getsource(GRPOTrainer._get_per_token_logps_and_entropies)
    for piece in (
        "labels=labels, fused_lm_head=True",
        "outputs.log_probs[:, -logits_to_keep:]",
        "return logps, entropies",
    ):
        assert piece in source, TRL_CHANGED + f"{piece!r} in _get_per_token_logps_and_entropies"
    for caller, calls in ((GRPOTrainer._compute_loss, 1), (GRPOTrainer._generate_and_score_completions, 3)):
        found = inspect.getsource(caller).count("self._get_per_token_logps_and_entropies(")
        assert found == calls, TRL_CHANGED + f"{caller.__name__} calls _get_per_token_logps_and_entropies"


def test_completions_come_from_vllm_generation_where_use_vllm_is_true() -> None:
    source = inspect.getsource(GRPOTrainer._generate_single_turn)
    for piece in (
        "if self.use_vllm:",
        "if self.state.global_step != self._last_loaded_step:",
        "self.vllm_generation.sync_weights()",
        "_, completion_ids, logprobs, _ = self.vllm_generation.generate(",
        "[[lp[0] for lp in seq] for seq in logprobs]",
    ):
        assert piece in source, TRL_CHANGED + f"{piece!r} in _generate_single_turn"
    wanted = ["prompts", "images", "num_generations", "profiler"]
    assert all(f"{name}=" in source for name in wanted), TRL_CHANGED + "what vllm_generation.generate is given"


def test_the_importance_ratio_reaches_the_loss_and_the_log() -> None:
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert f'self._metrics[mode]["{GAP}"].append' in source, TRL_CHANGED + GAP
    assert "(old_per_token_logps - sampling_per_token_logps) * mask" in source, TRL_CHANGED + "the importance ratio"
    loss = inspect.getsource(GRPOTrainer._compute_loss)
    assert 'per_token_loss * inputs["importance_sampling_ratio"]' in loss, TRL_CHANGED + "the corrected loss"


def test_a_checkpoint_can_be_written_between_steps() -> None:
    parameters = list(inspect.signature(Trainer._save_checkpoint).parameters)
    assert parameters == ["self", "model", "trial"], "transformers changed Trainer._save_checkpoint"
