r"""Step 2.3 of the paper: GRPO against the reward model.

    accelerate launch --config_file ./accelerate_config_grpo.yaml ./train_grpo.py --model_name $MODEL_PATH \
        --policy_adapter_path ../sft_checkpoints_qwen2.5-7b/best-checkpoints \
        --reward_adapter_path ../rm_checkpoints_qwen2.5-7b/best-checkpoints \
        --learning_rate 5e-6 --per_device_train_batch_size 4 --per_device_eval_batch_size 4 \
        --gradient_accumulation_steps 8 --grpo_data_path ../data/grpo_data_path.json \
        --template_path ../evals/qwen2.5-7b.jinja --num_grpo_epochs 2 --use_lora_train_grpo --num_generations 16 \
        --output_dir ../grpo_checkpoints

The flags of the paper's script mean here what --help says. The same command again goes on where it stopped.
"""

from __future__ import annotations

from sotopia_rl.paper_training import command

if __name__ == "__main__":
    command("grpo", __doc__ or "")
