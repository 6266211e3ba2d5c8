"""A GRPO step that reads each prompt once for all of its completions, against one that reads every sequence whole.

    python benchmarks/grpo.py                 ten minutes on one CPU core
    python benchmarks/grpo.py --steps 5       more measured steps

Both are the same training, prompts, models and settings, in one run: sampling, rewards, reference, loss and its
gradient. "Whole" is TRL's own sampling (transformers' generate) and log-probabilities, and a reward model that reads
prompt and reply in one. Prompts have the lengths of SOTOPIA's (default profile, talks of 4 to 20 turns); the model is a
random Llama of five million parameters, whose completions run on to their limit: only speed can be read from this.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from training import hush, make_base, talks
from trl import GRPOTrainer

from sotopia_rl.dataset import write_rows
from sotopia_rl.train import prompt_once
from sotopia_rl.train.config import GRPOSettings, RewardModelSettings, SFTSettings
from sotopia_rl.train.data import encode_rows, reply_text
from sotopia_rl.train.folder import read_metrics
from sotopia_rl.train.grpo import train_grpo
from sotopia_rl.train.loading import load_tokenizer
from sotopia_rl.train.reward_model import train_reward_model
from sotopia_rl.train.sft import train_sft
from sotopia_rl.train.trl_grpo import PolicyTrainer

OVERRIDDEN = ("_generate_single_turn", "_get_per_token_logps_and_entropies")


@contextmanager
def reading_whole() -> Iterator[None]:
    """Put TRL's own methods back, and have the reward model read every sequence whole."""
    ours = {name: getattr(PolicyTrainer, name) for name in OVERRIDDEN}
    plain = prompt_once.can_prefill
    try:
        for name in OVERRIDDEN:
            setattr(PolicyTrainer, name, getattr(GRPOTrainer, name))
        prompt_once.can_prefill = lambda _config: False
        yield
    finally:
        for name, method in ours.items():
            setattr(PolicyTrainer, name, method)
        prompt_once.can_prefill = plain


def seconds_per_step(inputs: tuple[Path, Path, Path, Path], settings: GRPOSettings, out: Path) -> float:
    """Median of all steps but the first."""
    train_grpo(*inputs, settings, out)
    return statistics.median(line["seconds"] for line in read_metrics(out / "metrics.jsonl")[1:] if "seconds" in line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2, help="measured steps each (default: %(default)s)")
    args = parser.parse_args()
    hush()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        data = talks(6, random.Random(0))
        rows, base = scratch / "rows.jsonl", make_base(data, scratch / "base")
        write_rows(data, rows)
        encoded = encode_rows(load_tokenizer(base), data, max_length=8192, reply=reply_text)
        lengths = sorted(len(row.prompt_ids) for row in encoded)
        print(f"{torch.get_num_threads()} threads; Python {sys.version.split()[0]}, torch {torch.__version__}")
        print(f"prompts of {lengths[0]} to {lengths[-1]} tokens, median {statistics.median(lengths):.0f}")
        once = {"max_steps": 1, "batch_size": 2, "max_length": 8192, "save_every": 1000}
        sft = train_sft(rows, base, SFTSettings.model_validate(once), scratch / "sft")
        reward = train_reward_model(rows, base, RewardModelSettings.model_validate(once), scratch / "rm")
        print("\n| prompts x completions, tokens each | whole, s/step | prompt once, s/step | faster by |")
        print("|---|---|---|---|", flush=True)
        for prompts, completions, length in ((1, 8, 16), (1, 16, 64)):
            settings = GRPOSettings(
                max_steps=args.steps + 1, prompts_per_step=prompts, num_generations=completions, save_every=1000,
                batch_size=prompts * completions, max_prompt_length=8192, max_completion_length=length,
                gate_min_spearman=None, on_collapse="ignore", validity_gate=False, eval_every=1000,
            )  # fmt: skip
            inputs, name = (rows, base, sft, reward), f"{prompts} x {completions}, {length}"
            with reading_whole():
                whole = seconds_per_step(inputs, settings, scratch / f"whole-{name}")
            ours = seconds_per_step(inputs, settings, scratch / f"once-{name}")
            print(f"| {name} | {whole:.2f} | {ours:.2f} | {whole / ours:.1f} |", flush=True)


if __name__ == "__main__":
    main()
