"""Settings under which a training stage takes about a second."""

from sotopia_rl.train.config import GRPOSettings, RewardModelSettings, SFTSettings, TinyModelSettings

TINY = TinyModelSettings(
    max_steps=6, save_every=3, batch_size=8, vocabulary=400, hidden_size=64, layers=2, heads=4, mlp_size=128
)
SFT = SFTSettings(
    learning_rate=3e-3, max_steps=6, save_every=2, eval_every=2, batch_size=8, max_length=512, lora_dropout=0.05
)
RM = RewardModelSettings(
    learning_rate=3e-3, max_steps=6, save_every=2, eval_every=2, batch_size=8, max_length=512, held_out_share=0.3
)
GRPO = GRPOSettings(
    learning_rate=1e-3,
    max_steps=4,
    save_every=2,
    eval_every=2,
    batch_size=8,
    prompts_per_step=2,
    num_generations=4,
    max_prompt_length=512,
    max_completion_length=8,
    gate_min_spearman=None,
    on_collapse="ignore",
    validity_gate=False,  # so short a reply from so small a model is never valid, and equal rewards teach nothing
)
