"""Training: a tiny base model, SFT, the reward model and GRPO, over one frozen base with adapters.

Importing this package, or what says "no torch here", imports none; the trainers do.
"""
