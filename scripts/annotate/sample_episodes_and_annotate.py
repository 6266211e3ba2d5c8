"""Step 1b of the paper: attribute an episode score to every utterance with an LLM.

    python sample_episodes_and_annotate.py --data_dir DATA --llm_name gpt-4o \
        --input_file sotopia_pi_bc_episodes.jsonl --output_file sotopia_pi_bc_episodes_annotated.jsonl

The same command again goes on where it stopped. `--llm_name` is an OpenAI model, or any model string of sotopia-rl
(custom/NAME@http://host:port/v1, local/PATH, scripted/annotator).
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from sotopia_rl.attribute import METHODS
from sotopia_rl.errors import SotopiaRLError
from sotopia_rl.llm.limits import ModelLimits
from sotopia_rl.llm.open import ModelPool
from sotopia_rl.paper import Summary, annotate_file, attribution_config


async def annotate(args: argparse.Namespace) -> Summary:
    config = attribution_config(args.attribution_method_name, args.attribution_instruction_name)
    name = args.llm_name if "/" in args.llm_name else f"openai/{args.llm_name}"
    async with ModelPool(ModelLimits(max_spend_usd=args.max_spend_usd)) as pool:
        return await annotate_file(
            args.data_dir / args.input_file,
            args.data_dir / args.output_file,
            pool.get(name) if METHODS[config.method].asks else None,
            config,
            limit=args.max_concurrency,
            on_bad=args.on_bad,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of the files")
    parser.add_argument("--llm_name", required=True)
    parser.add_argument("--input_file", required=True)
    parser.add_argument("--output_file", required=True)
    parser.add_argument("--attribution_method_name", default="direct", help="(default: %(default)s)")
    parser.add_argument(
        "--attribution_instruction_name", default="default-goal", help="SCALE-DIMENSION (default: %(default)s)"
    )
    parser.add_argument("--max_concurrency", type=int, default=10, help="questions at once (default: %(default)s)")
    parser.add_argument("--max_spend_usd", type=float, help="stop when the calls have cost this much")
    parser.add_argument("--on_bad", choices=["refuse", "skip"], default="refuse", help="what to do with a bad line")
    args = parser.parse_args()
    try:
        summary = asyncio.run(annotate(args))
    except SotopiaRLError as error:
        sys.exit(f"error: {error}")
    for problem in summary.bad:
        print(f"left out: {problem}", file=sys.stderr)
    print(f"episodes and annotated agents: {summary}")
    sys.exit(1 if summary.bad else 0)


if __name__ == "__main__":
    main()
