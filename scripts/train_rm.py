r"""Step 2.2 of the paper: the reward model.

    accelerate launch --config_file ./accelerate_config_rm.yaml ./train_rm.py --model_name $MODEL_PATH \
        --learning_rate 1e-5 --max_length 4096 --train_batch_size 1 --val_batch_size 1 --accumulation_steps 8 \
        --num_epochs 30 --evaluation_steps 50 --reward_data_path ../data/rm_data_path.json \
        --template_path ../evals/qwen2.5-7b.jinja --checkpoint_dir ../rm_checkpoints_qwen2.5-7b

The flags of the paper's script mean here what --help says. The same command again goes on where it stopped.
"""

from __future__ import annotations

from sotopia_rl.paper_training import command

if __name__ == "__main__":
    command("rm", __doc__ or "")
