"""Training at the size of the paper on one GPU: the Qwen2.5-7B architecture with random weights.

    python benchmarks/gpu.py                             on a GPU, about ten minutes; 16 GB of disk for the weights
    python benchmarks/gpu.py --size tiny --device cpu    the same code in two minutes, to see that it is not broken

Prints one table: SFT tokens/s and the share of the GPU's peak FLOP/s, reward-model samples/s, GRPO seconds per step
with 16 completions of 4,096-token prompts; each with bf16 LoRA and with QLoRA, with its peak memory beside the plan's
(docs/scale.md). The stages are the package's own, each in a process of its own so that its peak is its own. Random
weights never end a reply, so that every completion has its full length: the slowest case.

FLOP: 2 per weight and token forward and 2 backward (the frozen weights have no gradients of their own), and
attention's 12 x layers x width x length / 2 (causal) per token; recomputed activations are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sotopia_rl.dataset import RewardRow, write_rows
from sotopia_rl.models import Message
from sotopia_rl.train.config import GRPOSettings, RewardModelSettings, SFTSettings
from sotopia_rl.train.memory import QWEN25_7B, Shape, plan

TINY = Shape(layers=2, hidden=64, mlp=128, heads=4, key_value_heads=2, vocabulary=600, attention_bias=True)
SIZES = {"7b": (QWEN25_7B, 4096, 128), "tiny": (TINY, 256, 16)}
"""Shape, tokens of a prompt, tokens of a completion."""
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12, "4090": 165e12, "A10G": 70e12}
"""Dense bfloat16 FLOP/s by what the device's name holds, from the makers' data sheets (SXM where there are two)."""
STAGES = ("sft", "rm", "grpo")
PRECISIONS = {"bf16 LoRA": "none", "QLoRA": "nf4"}
COMPLETIONS = 16


def make_base(shape: Shape, tokens: int, folder: Path) -> None:
    """Random weights in bfloat16, a small tokenizer trained on the rows' words, and rows of `tokens` tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from sotopia_rl.train.data import prompt_token_ids
    from sotopia_rl.train.tiny import tiny_tokenizer

    logging.disable_progress_bar()
    words = [f"w{number:03d}" for number in range(400)]
    tokenizer = tiny_tokenizer([" ".join(words[start:] + words[:start]) for start in range(0, 400, 40)], 560)
    # Llama with biases on q, k and v is Qwen2 in all but its name, under which transformers would ignore the tokenizer
    config = LlamaConfig(
        **shape.config_fields,
        attention_bias=shape.attention_bias,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def prompt(number: int, length: int) -> Message:
        return Message(role="user", content=" ".join(words[(number + i) % 400] for i in range(length)))

    length = tokens // 2
    while len(prompt_token_ids(tokenizer, [prompt(0, length)])) > tokens - 16:
        length -= max(1, length // 64)
    rows = [
        RewardRow(
            prompt=(prompt(number, length),),
            completion=(Message(role="assistant", content=f"w{number:03d}"),),
            episode_id=f"e{number}",
            scenario_id="s",
            turn=0,
            seat=0,
            value=number % 10,
        )
        for number in range(64)
    ]
    write_rows(rows, folder / "rows.jsonl")


def settings_of(stage: str, precision: str, args: argparse.Namespace) -> Any:
    """Settings of one line of the table."""
    _, tokens, reply = SIZES[args.size]
    shared = {
        "device": args.device,
        "quantise": precision,
        "max_steps": args.steps + 1,
        "save_every": 1000,
        "gradient_checkpointing": True,
        "batch_size": args.batch_size,
    }
    if stage == "grpo":
        grpo = {
            "prompts_per_step": 1,
            "num_generations": COMPLETIONS,
            "max_prompt_length": tokens,
            "max_completion_length": reply,
            "validity_gate": False,
            "gate_min_spearman": None,
            "on_collapse": "ignore",
        }
        return GRPOSettings.model_validate(shared | grpo)
    cls = SFTSettings if stage == "sft" else RewardModelSettings
    held_out = 0.05 if stage == "rm" else 0.0  # its report needs some rows
    return cls.model_validate(shared | {"max_length": tokens, "held_out_share": held_out, "eval_every": 1000})


def measure(stage: str, precision: str, args: argparse.Namespace) -> dict[str, float]:
    """Seconds per step (the first left out) and peak bytes of one stage, in this process."""
    import torch

    from sotopia_rl.train.grpo import train_grpo
    from sotopia_rl.train.reward_model import train_reward_model
    from sotopia_rl.train.sft import train_sft

    base, out = Path(args.base), Path(args.base) / f"{stage}-{precision}"
    rows, settings = base / "rows.jsonl", settings_of(stage, precision, args)
    times: list[float] = []

    def progress(_done: int, _total: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    run: dict[str, Callable[[], object]] = {
        "sft": lambda: train_sft(rows, base, settings, out, progress=progress),
        "rm": lambda: train_reward_model(rows, base, settings, out, progress=progress),
        "grpo": lambda: train_grpo(
            rows,
            base,
            base / f"sft-{precision}" / "adapter",
            base / f"rm-{precision}" / "adapter",
            settings,
            out,
            progress=progress,
        ),
    }
    run[stage]()
    if torch.cuda.is_available() and args.device != "cpu":
        peak = float(torch.cuda.max_memory_reserved())
    else:
        peak = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": (times[-1] - times[0]) / (len(times) - 1), "peak": peak}


def flops(shape: Shape, tokens: int) -> float:
    """Of one training row in SFT with an adapter, forward and backward."""
    weights = shape.linear_parameters + shape.vocabulary * shape.hidden
    return tokens * (4.0 * weights + 12.0 * shape.layers * shape.hidden * tokens / 2)


def line(stage: str, name: str, found: dict[str, float], args: argparse.Namespace, device: str) -> str:
    """One line of the table."""
    shape, tokens, reply = SIZES[args.size]
    rows = args.batch_size
    share = ""
    if stage == "grpo":
        speed = f"{found['seconds']:.2f} s/step ({COMPLETIONS} x {tokens}+{reply} tokens)"
    elif stage == "rm":
        speed = f"{rows / found['seconds']:.2f} samples/s"
    else:
        speed = f"{rows * tokens / found['seconds']:,.0f} tokens/s"
        peak = next((value for part, value in PEAKS.items() if part in device), None)
        share = f"{rows * flops(shape, tokens) / found['seconds'] / peak:.0%}" if peak else ""
    estimate = plan(
        shape,
        stage,  # type: ignore[arg-type]
        precision="nf4" if PRECISIONS[name] == "nf4" else "bfloat16",
        tokens=tokens,
        rows=rows,
        completions=COMPLETIONS,
        reply_tokens=reply,
    )
    return f"| {stage} | {name} | {speed} | {share} | {found['peak'] / 1e9:.1f} | {estimate.total / 1e9:.1f} |"


def run_alone(stage: str, precision: str, args: argparse.Namespace, base: str) -> dict[str, float] | str:
    """`measure` in a process of its own; what it said where it failed."""
    command = [sys.executable, __file__, "--size", args.size, "--device", args.device, "--steps", str(args.steps)]
    command += ["--batch-size", str(args.batch_size), "--base", base, "--one", stage, precision]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def table(args: argparse.Namespace) -> int:
    """Measure every line and print it; the number of lines that failed."""
    import torch

    on_gpu = torch.cuda.is_available() and args.device != "cpu"
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {os.cpu_count()} cores"
    print(
        f"{device}, torch {torch.__version__}, {args.size} shape with random weights, {args.batch_size} rows a pass\n"
    )
    print("| stage | weights | speed | of peak FLOP/s | peak GB | plan GB |\n|---|---|---|---|---|---|", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as base:
        shape, tokens, _ = SIZES[args.size]
        make_base(shape, tokens, Path(base))
        for name, precision in PRECISIONS.items():
            for stage in STAGES:
                found = run_alone(stage, precision, args, base)
                failed += isinstance(found, str)
                shown = f"| {stage} | {name} | failed: {found} | | | |" if isinstance(found, str) else ""
                print(shown or line(stage, name, found, args, device), flush=True)  # type: ignore[arg-type]
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, help="default: 7b on a GPU, tiny without one")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--steps", type=int, default=3, help="measured steps per line (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=2, help="rows per pass (default: %(default)s)")
    parser.add_argument("--base", help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one, args)))
        return
    if args.size is None:
        import torch

        args.size = "7b" if torch.cuda.is_available() and args.device != "cpu" else "tiny"
    sys.exit(1 if table(args) else 0)


if __name__ == "__main__":
    main()
