r"""Step 2.1 of the paper: behaviour cloning.

    accelerate launch --config_file ./accelerate_config_sft.yaml ./train_sft.py --model_name $MODEL_PATH \
        --learning_rate 1e-4 --max_length 4096 --train_batch_size 2 --val_batch_size 1 --accumulation_steps 8 \
        --num_epochs 500 --use_lora --evaluation_steps 5 --sft_data_path ../data/sft_data_path.json \
        --template_path ../evals/qwen2.5-7b.jinja --checkpoint_dir ../sft_checkpoints_qwen2.5-7b

The paper's text has 500 steps (--max_steps 500); 500 epochs are what its README says.

The flags of the paper's script mean here what --help says. The same command again goes on where it stopped.
"""

from __future__ import annotations

from sotopia_rl.paper_training import command

if __name__ == "__main__":
    command("sft", __doc__ or "")
