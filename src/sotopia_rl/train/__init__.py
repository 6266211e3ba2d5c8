"""Training: a tiny base model, SFT, the reward model and GRPO, over one frozen base with adapters.

Importing this package, `config`, `folder` or `reward_report` does not import torch; the trainers do.
"""
